"""Prompts and generation in one pool: the steady state of continuous batching at a number of requests in flight.

Every iteration generates one token for each running sequence and takes along as many prompt tokens as its budget leaves. With
``n`` requests in flight, ``d`` of them generate and the others wait for or run their prompts. A prompt of ``P`` tokens takes
``P/c`` iterations that carry ``c`` prompt tokens; an answer of ``O`` tokens takes ``O − 1`` iterations behind it. Of the
``(O − 1)/d`` iterations between two answers, ``P/c`` are therefore mixed ones: a fraction ``φ = P·d/(c·(O − 1))``, up to 1. All
means follow from the times of a mixed and of a generating iteration, and from Little's law for prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from planner.costs.queueing import wait_quantile_s
from planner.iteration import Iterations
from planner.ledger import Array
from planner.specs.traffic import Traffic

__all__ = ["QUANTILES", "Steady", "steady"]

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_ROUNDS = 12  # of the damped fixed point between generating and waiting requests
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


def steady(iterations: Iterations, traffic: Traffic, in_flight: Array, chunk_tokens: Array) -> Steady:
    """The steady state of every row with so many requests in flight per replica.

    Args:
        iterations: the recipe on the rows' meshes.
        traffic: lengths of prompts and answers.
        in_flight: requests in flight per replica.
        chunk_tokens: tokens of an iteration, per attention rank.
    """
    mesh = iterations.ctx.mesh
    batch = in_flight / mesh.pp  # sequences of one of the batches on a pipeline
    budget = np.maximum(chunk_tokens * mesh.dp - (iterations.step_tokens - 1.0) * batch, 1.0)
    state = _balance(iterations, traffic, batch, budget, _generating(traffic, batch, 0.9 * batch))
    decodes = _generating(traffic, batch, _settled(iterations, traffic, batch, budget, state))
    state = _balance(iterations, traffic, batch, budget, decodes)
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


def _balance(iterations: Iterations, traffic: Traffic, batch: Array, budget: Array, decodes: Array) -> Steady:
    """The state with a given number of generating sequences: two iterations are priced."""
    chunk = _chunk(iterations, traffic, budget, decodes)
    context = decodes * (traffic.isl + traffic.osl * (1.0 + traffic.length_scv) / 2.0)
    zero = np.zeros_like(batch)
    decode_s = iterations(decodes, context, zero, zero)
    mixed_s = iterations(decodes, context, chunk, np.full_like(chunk, traffic.prompt_context))
    return _means(iterations, traffic, batch, chunk, decodes, decode_s, mixed_s)


def _chunk(iterations: Iterations, traffic: Traffic, budget: Array, decodes: Array) -> Array:
    """Prompt tokens of a mixed iteration: the prompts that come while one passes are packed together, as the budget allows."""
    together = traffic.computed_isl * np.maximum(1.0, decodes / max(iterations.steps(traffic.osl), 1.0))
    return np.asarray(np.clip(np.minimum(budget - decodes, together), 1.0, None))


def _wait_s(
    iterations: Iterations, traffic: Traffic, batch: Array, load: Array, busy_s: Array, extra_s: Array
) -> Array:
    """What a prompt waits for others.

    Independent arrivals queue for prompts' turns (M/D/1, at most all others). Clients that replace every answer at once keep
    requests together that began together: a fixed share of the others' prompts comes first.
    """
    others = np.maximum(batch / iterations.ctx.mesh.dp - 1.0, 0.0)
    if traffic.concurrency is not None:
        return np.asarray(float(iterations.software.wave_share) * others * extra_s)
    return np.asarray(np.minimum(load * busy_s / (2.0 * (1.0 - load)), others * busy_s))


def _means(
    iterations: Iterations,
    traffic: Traffic,
    batch: Array,
    chunk: Array,
    decodes: Array,
    decode_s: Array,
    mixed_s: Array,
) -> Steady:
    prompt, steps = traffic.computed_isl, iterations.steps(traffic.osl)
    passes = prompt / chunk  # mixed iterations per prompt
    mixed = np.minimum(passes * decodes / max(steps, 1e-9), 1.0) if steps > 0.0 else np.ones_like(batch)
    apart = 1.0 if traffic.concurrency is None else 1.0 - min(float(iterations.software.wave_share), 1.0)
    # A prompt that runs among prompts delays nobody who generates.
    token_s = decode_s + apart * mixed * (mixed_s - decode_s)
    mean_s = decode_s + mixed * (mixed_s - decode_s)
    busy_s = passes * mixed_s
    # Between two answers there are (O - 1)/d iterations, or as many as a prompt takes.
    between_s = np.maximum(steps / np.maximum(decodes, 1e-9) * mean_s, busy_s) if steps > 0.0 else busy_s
    rate = 1.0 / between_s
    load = np.minimum(rate * busy_s, 0.999)
    extra_s = passes * iterations.ctx.mesh.dp * (mixed_s - decode_s)
    wait_s = 0.5 * token_s + _wait_s(iterations, traffic, batch, load, busy_s, extra_s)
    prefill_s = np.maximum(passes, 1.0) * mixed_s
    spread = np.sqrt(mixed * (1.0 - mixed) / max(steps, 1.0)) * np.maximum(mixed_s - decode_s, 0.0)
    return Steady(
        requests_per_s=rate, decodes=decodes, tpot_s=token_s, tpot_deviation_s=spread, prefill_s=prefill_s,
        ttft_s=prefill_s + wait_s + float(iterations.software.admission_s), wait_s=wait_s, prefill_load=load,
        mixed_s=mixed_s, decode_s=decode_s,
    )  # fmt: skip


def _settled(iterations: Iterations, traffic: Traffic, batch: Array, budget: Array, state: Steady) -> Array:
    """Generating sequences by Little's law for those that do not generate, with iterations that take what they took.

    Iterations are nearly constant in the few per cent by which the number moves; the caller prices the result anew.
    """
    decodes = state.decodes
    for _ in range(_ROUNDS):
        chunk = _chunk(iterations, traffic, budget, decodes)
        found = _means(iterations, traffic, batch, chunk, decodes, state.decode_s, state.mixed_s)
        decodes = 0.5 * decodes + 0.5 * _generating(
            traffic, batch, batch - found.requests_per_s * found.ttft_s
        )
    return np.asarray(decodes)
