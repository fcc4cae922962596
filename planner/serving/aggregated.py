"""Prompts and generation in one pool: the steady state of continuous batching at a number of requests in flight.

Every iteration generates one token for each running sequence and takes along as many prompt tokens as its budget leaves. With
``n`` requests in flight, ``d`` of them generate and the others wait for or run their prompts. A prompt of ``P`` tokens takes
``P/c`` iterations that carry ``c`` prompt tokens; an answer of ``O`` tokens takes ``O − 1`` iterations behind it. Of the
``(O − 1)/d`` iterations between two answers, ``P/c`` are therefore mixed ones: a fraction ``φ = P·d/(c·(O − 1))``, up to 1. All
means follow from the times of a mixed and of a generating iteration, and from Little's law for prompts.

Clients that replace every answer at once begin together. Their prompts come back as the answers end: in step where answers are
of one length, scattered over a window that grows with every answer where they are not (:class:`_Cohort`). The wait within such
a window is that of as many independent sources with one prompt each in it (:func:`~planner.costs.queueing.clients_wait_s`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from planner.costs.queueing import clients_wait_s, wait_quantile_s
from planner.costs.serving import held_up_share
from planner.ledger import Array
from planner.serving.iteration import Iterations
from planner.specs.traffic import Traffic

__all__ = ["QUANTILES", "Steady", "steady"]

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_ROUNDS = 12  # of the damped fixed point between generating and waiting requests
_UNIFORM = 12.0**0.5  # width of a uniform distribution in standard deviations
_NORMAL = {0.5: 0.0, 0.9: 1.2815515655446004, 0.95: 1.6448536269514722, 0.99: 2.3263478740408408}


@dataclass(frozen=True, slots=True, eq=False)
class Steady:
    """Means of one replica per row; see the module's text for the symbols.

    Attributes:
        requests_per_s: answers that the replica completes.
        decodes: generating sequences.
        tpot_s: time between two tokens of an answer.
        tpot_deviation_s: standard deviation, over requests, of their mean time between tokens.
        prefill_s: time of a prompt's own iterations.
        ttft_s: from arrival to the first token.
        wait_s: part of it before the prompt's first iteration.
        prefill_load: fraction of time that prompts are at work.
        mixed_s, decode_s: time of a mixed iteration, and of a generating one per token that a sequence gains in it.
        slot_wait_s, slot_waits: part of the time to the first token that is a wait for a slot, and the chance of one.
    """

    requests_per_s: Array
    decodes: Array
    tpot_s: Array
    tpot_deviation_s: Array
    prefill_s: Array
    ttft_s: Array
    wait_s: Array
    prefill_load: Array
    mixed_s: Array
    decode_s: Array
    slot_wait_s: Array | float = 0.0
    slot_waits: Array | float = 0.0

    def ttft_at(self, quantile: float) -> Array:
        """A quantile of the time to the first token: waits' tails are exponential where there are any, and add up."""
        tails = wait_quantile_s(quantile, np.clip(self.prefill_load, 1e-9, 0.999), self.wait_s)
        tails = tails + wait_quantile_s(quantile, self.slot_waits, self.slot_wait_s)
        return np.asarray(self.ttft_s - self.wait_s - self.slot_wait_s + tails)

    def tpot_at(self, quantile: float) -> Array:
        """A quantile, over requests, of the mean time between tokens: normal."""
        return np.asarray(
            np.maximum(self.tpot_s + normal_quantile(quantile) * self.tpot_deviation_s, self.decode_s)
        )

    def take(self, index: Array) -> Steady:
        """Some rows."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value[index] for name, value in columns.items() if np.ndim(value)})


def normal_quantile(quantile: float) -> float:
    """The standard normal quantile (Acklam's rational approximation is not needed: the few that are asked for are tabulated).

    >>> normal_quantile(0.5), round(normal_quantile(0.975), 2)
    (0.0, 1.96)
    """
    if quantile in _NORMAL:
        return _NORMAL[quantile]
    from statistics import NormalDist

    return NormalDist().inv_cdf(quantile)


def steady(
    iterations: Iterations, traffic: Traffic, in_flight: Array, chunk_tokens: Array, *, queued: bool = False,
    held_back: float = 0.0,
) -> Steady:  # fmt: skip
    """The steady state of every row with so many requests in flight per replica.

    Args:
        iterations: the recipe on the rows' meshes.
        traffic: lengths of prompts and answers.
        in_flight: requests in flight per replica.
        chunk_tokens: tokens of an iteration, per attention rank.
        queued: others always wait outside, so that an iteration that takes prompts takes all that it can, on every rank.
        held_back: iterations for which a prompt is held back, so that others run with it; the caller adds the wait for them.
    """
    mesh = iterations.ctx.mesh
    batch = in_flight / mesh.pp  # sequences of one of the batches on a pipeline
    budget = np.maximum(chunk_tokens * mesh.dp - (iterations.step_tokens - 1.0) * batch, 1.0)
    intake = _Intake(budget, queued, held_back)
    state = _balance(iterations, traffic, batch, intake, _generating(traffic, batch, 0.9 * batch))
    decodes = _generating(traffic, batch, _settled(iterations, traffic, batch, intake, state))
    state = _balance(iterations, traffic, batch, intake, decodes)
    per_token = {
        name: getattr(state, name) / iterations.accepted
        for name in ("tpot_s", "tpot_deviation_s", "decode_s")
    }
    return replace(
        state, requests_per_s=state.requests_per_s * mesh.pp, decodes=state.decodes * mesh.pp, **per_token
    )


def _generating(traffic: Traffic, batch: Array, decodes: Array) -> Array:
    """Sequences that generate: at most all, none where an answer is a single token."""
    if traffic.osl <= 1:
        return np.zeros_like(batch)
    return np.asarray(np.clip(decodes, np.minimum(1e-3, batch), batch))


@dataclass(frozen=True, slots=True, eq=False)
class _Intake:
    """How an engine takes prompts: tokens of an iteration on all ranks, and what :func:`steady` is told of those that wait."""

    budget: Array
    queued: bool
    held_back: float


@dataclass(frozen=True, slots=True, eq=False)
class _Cohort:
    """Prompts that share iterations with a prompt.

    Attributes:
        prompts: that come in the same iteration, itself included.
        scatter: iterations over which the prompts of all clients are spread; infinite for independent arrivals.
        priced: prompt tokens of a mixed iteration as every attention rank has as many as the busiest.
        served: prompt tokens of a mixed iteration.
    """

    prompts: Array
    scatter: Array
    priced: Array
    served: Array


def _balance(
    iterations: Iterations, traffic: Traffic, batch: Array, intake: _Intake, decodes: Array
) -> Steady:
    """The state with a given number of generating sequences: two iterations are priced."""
    cohort = _cohort(iterations, traffic, batch, intake, decodes)
    context = decodes * (traffic.isl + traffic.osl * (1.0 + traffic.length_scv) / 2.0)
    zero = np.zeros_like(batch)
    decode_s = iterations(decodes, context, zero, zero)
    chunk, keys = cohort.priced, np.full_like(batch, traffic.prompt_context)
    if iterations.software.prompts == "first":  # generation waits for an iteration of prompts alone
        mixed_s = decode_s + iterations(zero, zero, chunk, keys)
    else:
        mixed_s = iterations(decodes, context, chunk, keys)
    return _means(iterations, traffic, batch, intake.budget, cohort, decodes, decode_s, mixed_s)


def _cohort(
    iterations: Iterations, traffic: Traffic, batch: Array, intake: _Intake, decodes: Array
) -> _Cohort:
    """What a mixed iteration takes along: the prompts that come while one passes or is held back, and those that come in step."""
    budget, ranks, steps, prompt = (
        intake.budget,
        iterations.ctx.mesh.dp,
        max(iterations.steps(traffic.osl), 1.0),
        traffic.computed_isl,
    )
    if intake.queued:
        full = np.minimum(np.maximum(budget - decodes, ranks), prompt * np.maximum(batch, 1.0))
        return _Cohort(np.ones_like(batch), np.full_like(batch, np.inf), full, full)
    each = (1.0 + intake.held_back) * decodes / steps if traffic.osl > 1 else _prompts_alone(traffic, batch)
    arriving = np.maximum(1.0, each)
    scatter, together = np.full_like(batch, np.inf), np.ones_like(batch)
    if traffic.concurrency is not None:
        answers = np.inf if traffic.requests_per_client is None else traffic.requests_per_client / 2.0
        # Ends of answers wander apart: a variance per answer, and a uniform spread of the same variance.
        spread = (
            0.0 if traffic.length_scv == 0.0 else _UNIFORM * steps * np.sqrt(traffic.length_scv * answers)
        )
        scatter = np.full_like(batch, spread)
        if iterations.software.prompts == "first":
            together = 1.0 + np.maximum(batch - 1.0, 0.0) / (1.0 + scatter)
    prompts = np.maximum(arriving, together)
    priced = np.minimum(np.maximum(budget - decodes, ranks), prompt * np.maximum(prompts, ranks))
    return _Cohort(together, scatter, priced, np.minimum(priced, prompts * prompt))


def _prompts_alone(traffic: Traffic, batch: Array) -> Array:
    """Prompts of an iteration where answers are a single token: every iteration takes all that came during the one before.

    A request spends its own iteration and what is left of the one that runs (:func:`_ahead_s`): Little's law for iterations.
    """
    if traffic.concurrency is None:
        return np.asarray(batch / (1.0 - 0.5 * np.expm1(-batch)))
    return np.asarray(batch / (1.0 + np.clip(batch - 1.0, 0.0, 1.0)))


def _wait_s(
    iterations: Iterations, traffic: Traffic, batch: Array, budget: Array, cohort: _Cohort, load: Array, busy_s: Array,
    mixed: Array, decode_s: Array, mixed_s: Array,
) -> Array:  # fmt: skip
    """What a prompt waits for others.

    Independent arrivals queue for prompts' turns (M/D/1, at most all others). Clients that replace every answer at once bring
    their prompts over a window, which is the whole cycle in the long run; the first prompt of each comes with all the others.
    """
    ranks = iterations.ctx.mesh.dp
    others = np.maximum(batch / ranks - 1.0, 0.0)
    if traffic.concurrency is None:
        return np.asarray(np.minimum(load * busy_s / (2.0 * (1.0 - load)), others * busy_s))
    # Attention ranks run their prompts side by side: a rank's clients wait for each other. Answers end by iterations, however
    # long these are, so that load is iterations with a prompt among those in which prompts come.
    passes = traffic.computed_isl * ranks / cohort.priced
    window = np.maximum((others + 1.0) * passes / ((others + 1.0) * passes + cohort.scatter), mixed)
    # Ends that follow each other by a prompt's time do not collide unless they are scattered by as much.
    apart = np.minimum(cohort.scatter / (_UNIFORM * passes), 1.0)
    in_step_s = np.maximum(cohort.prompts * traffic.computed_isl / cohort.served - 1.0, 0.0) / 2.0 * mixed_s
    wait_s = apart * clients_wait_s(others, passes * mixed_s, window) + in_step_s
    if traffic.requests_per_client is None:
        return np.asarray(wait_s)
    full = np.maximum(budget, cohort.priced)
    together_s = traffic.computed_isl * ranks * ((mixed_s - decode_s) / cohort.priced + decode_s / full)
    first = 1.0 / traffic.requests_per_client
    return np.asarray(first * others / 2.0 * together_s + (1.0 - first) * wait_s)


def _ahead_s(
    traffic: Traffic, batch: Array, cohort: _Cohort, passes: Array, mixed: Array, token_s: Array, decode_s: Array,
    mixed_s: Array,
) -> Array:  # fmt: skip
    """What is left of the iteration that runs when a prompt comes.

    Of independent arrivals, half, if any runs: an engine whose requests do not wait for each other holds none with the chance
    ``exp(−n)`` (M/G/∞; Kleinrock, "Queueing Systems", vol. 1, section 3.4). A client that replaces its answer finds the next
    iteration begun without it, if there are other clients, and waits for all of it: one with the prompts of those whose answers
    ended just before, where answers end in step.
    """
    if traffic.concurrency is None:
        return np.asarray(-0.5 * np.expm1(-batch) * token_s)
    apart = np.minimum(cohort.scatter / (_UNIFORM * passes), 1.0)
    together = np.maximum(cohort.prompts, 1.0 / passes)
    others = np.clip(1.0 - together / np.maximum(batch, 1.0), 0.0, 1.0)
    full = apart * mixed + (1.0 - apart) * others
    running = np.clip(batch - 1.0, 0.0, 1.0)
    return np.asarray(running * (decode_s + full * (mixed_s - decode_s)))


def _means(
    iterations: Iterations,
    traffic: Traffic,
    batch: Array,
    budget: Array,
    cohort: _Cohort,
    decodes: Array,
    decode_s: Array,
    mixed_s: Array,
) -> Steady:
    prompt, steps = traffic.computed_isl, iterations.steps(traffic.osl)
    passes = prompt / cohort.served  # mixed iterations per prompt
    mixed = np.minimum(passes * decodes / max(steps, 1e-9), 1.0) if steps > 0.0 else np.ones_like(batch)
    # Who generates sees the prompts of others: those in step that run behind the own, and those that come in the meantime.
    if traffic.concurrency is None:
        seen = decodes
    else:
        beside = np.minimum(cohort.prompts, cohort.served / prompt)
        strangers = np.clip(1.0 - cohort.prompts / np.maximum(batch, 1.0), 0.0, 1.0)
        seen = (cohort.prompts - beside) / 2.0 + strangers * decodes
    token, stages = np.minimum(passes * seen / max(steps, 1.0), 1.0), np.ones_like(batch)
    if traffic.concurrency is None and np.any(iterations.ctx.mesh.pp > 1.0):
        stages = iterations.ctx.mesh.pp
        held = held_up_share(stages * decodes / max(steps, 1.0), passes, stages)
        mixed, token = (np.where(stages > 1.0, held, share) for share in (mixed, token))
    token_s = decode_s + token * (mixed_s - decode_s)
    mean_s = decode_s + mixed * (mixed_s - decode_s)
    busy_s = passes * mixed_s
    # Between two answers there are (O - 1)/d iterations, or as many as a prompt takes.
    if steps > 0.0:
        between_s = np.maximum(steps / np.maximum(decodes, 1e-9) * mean_s, busy_s)
    else:
        between_s = np.maximum(mixed_s / np.maximum(_prompts_alone(traffic, batch), 1e-9), busy_s)
    rate = 1.0 / between_s
    load = np.minimum(rate * busy_s, 0.999)
    alone_s = mixed_s - decode_s if iterations.software.prompts == "first" else mixed_s
    parts = np.maximum(prompt * iterations.ctx.mesh.dp / cohort.priced, 1.0)
    prefill_s = (1.0 + (parts - 1.0) / stages) * alone_s
    # Whichever batch of a pipeline is next begins a prompt, and the next one its next part.
    ahead_s = _ahead_s(traffic, batch, cohort, passes, mixed, token_s, decode_s, mixed_s) / stages
    if traffic.osl > 1:
        wait_s = ahead_s + _wait_s(
            iterations, traffic, batch, budget, cohort, load, busy_s, mixed, decode_s, mixed_s
        )
    else:  # all that are in the replica are prompts: Little's law has what the budget keeps waiting
        wait_s = np.maximum(batch * between_s - prefill_s, ahead_s)
    spread = np.sqrt(mixed * (1.0 - mixed) / max(steps, 1.0)) * np.maximum(mixed_s - decode_s, 0.0)
    return Steady(
        requests_per_s=rate, decodes=decodes, tpot_s=token_s, tpot_deviation_s=spread, prefill_s=prefill_s,
        ttft_s=prefill_s + wait_s + iterations.software.admitted_s(traffic.isl), wait_s=wait_s, prefill_load=load,
        mixed_s=mixed_s, decode_s=decode_s,
    )  # fmt: skip


def _settled(iterations: Iterations, traffic: Traffic, batch: Array, intake: _Intake, state: Steady) -> Array:
    """Generating sequences by Little's law for those that do not generate, with iterations that take what they took.

    Iterations are nearly constant in the few per cent by which the number moves; the caller prices the result anew.
    """
    decodes = state.decodes
    for _ in range(_ROUNDS):
        cohort = _cohort(iterations, traffic, batch, intake, decodes)
        found = _means(
            iterations, traffic, batch, intake.budget, cohort, decodes, state.decode_s, state.mixed_s
        )
        inside_s = (
            found.prefill_s if intake.queued else found.ttft_s
        )  # others take a place as soon as it is free
        decodes = 0.5 * decodes + 0.5 * _generating(traffic, batch, batch - found.requests_per_s * inside_s)
    return np.asarray(decodes)
