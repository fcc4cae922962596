"""What requests that arrive on their own see of a pool: mean and percentiles by the chains of :mod:`planner.load.chain`.

The search ranks thousands of candidates by means; what it lists is put through the chains, and carries the rate at which *their*
latencies keep the limits. A replica with ``pp`` stages has as many batches under way. To a prompt that is one engine that
begins an iteration ``pp`` times as often: its iterations take a ``pp``-th of a batch's way through the stages and advance a
``pp``-th of the requests, and the way itself is added once to the first token. To an answer it is a round of all batches, which
one with prompt tokens holds up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from planner.costs.serving import held_up_share
from planner.errors import Infeasible, Problem
from planner.load.balance import Balance
from planner.load.chain import generation, percentiles, summary
from planner.load.fixed_point import steady_load
from planner.load.iteration_time import Array, Price, Sampled
from planner.load.length_law import LengthLaw
from planner.load.prefill_queue import PrefillQueue
from planner.load.requests import Lengths
from planner.load.scheduler import Scheduler, scheduler
from planner.specs.traffic import Traffic

if TYPE_CHECKING:
    from planner.serving.iteration import Iterations

__all__ = ["NEARLY", "Latencies", "Line", "decode_pool", "highest_rate", "mixed_pool", "prefill_pool"]

_NODES = (14, 40)
"""Of the tables of a plan's iterations: decodes, prompt tokens."""
_TRIES = 6
_PARTS = (1.0, 0.2, 0.03)
"""Of what means allow, where the rate that chains allow is looked for."""
_BISECTIONS = 30
_CLOSE = 0.96
_SAME = 0.99
NEARLY = 0.9
"""Found over allowed from which a limit is said to bind."""
_GOAL = 0.5 * (1.0 + _CLOSE)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Time to the first token and between tokens, seconds: ``mean``, ``p50``, ``p90``, ``p99``, ``at`` the asked percentile."""

    ttft_s: Mapping[str, float]
    tpot_s: Mapping[str, float]

    def missed(self, traffic: Traffic) -> tuple[float, str]:
        """The worst of found over allowed, and which limit it is of; 0 without limits.

        A percentile of whole answers is taken as the sum of both percentiles, which bounds it from above.
        """
        where = "mean" if traffic.percentile is None else "at"
        first_s, token_s = self.ttft_s[where], self.tpot_s[where]
        ratios = [(0.0, "memory")]
        if traffic.ttft_s is not None:
            ratios.append((first_s / traffic.ttft_s, "ttft"))
        if traffic.tpot_s is not None and traffic.osl > 1:
            ratios.append((token_s / traffic.tpot_s, "tpot"))
        if traffic.e2e_s is not None:
            ratios.append(((first_s + (traffic.osl - 1.0) * token_s) / traffic.e2e_s, "e2e"))
        return max(ratios)


@dataclass(frozen=True, slots=True)
class Line:
    """A replica's iterations as a table, the stages that a batch passes in them, and what a sequence gains and passes in one.

    ``beside``: prompts run beside generation, not in iterations of their own; ``ranks`` are attention ranks, whose budgets
    together are ``budget``.
    """

    table: Sampled
    stages: float
    budget: float
    accepted: float = 1.0
    step_tokens: float = 1.0
    beside: bool = True
    ranks: float = 1.0

    @classmethod
    def of(cls, iterations: Iterations, traffic: Traffic, decodes: float, budget: float) -> Line:
        """The table of a replica (one mesh) for at most so many sequences, and tokens of an iteration on all attention ranks."""

        def price(n: Array, context: Array, prefill: Array, seen: Array) -> Array:
            return iterations(n, context, prefill, seen / np.maximum(prefill, 1.0))

        stages = float(iterations.ctx.mesh.pp[0])
        most = max(int(np.ceil(decodes / stages)), 1)
        typical = float(traffic.isl + traffic.osl)
        return cls(
            Sampled.of(price, most, max(int(budget), 2), typical, _NODES),
            stages,
            budget,
            iterations.accepted,
            iterations.step_tokens,
            iterations.software.prompts == "beside",
            float(iterations.ctx.mesh.dp[0]),
        )

    def price(self, context_scale: float = 1.0) -> Price:
        """The time of the engine that begins an iteration ``stages`` times as often."""
        p = self.stages

        def seconds(n: Array, context: Array, prefill: Array, seen: Array) -> Array:
            each = np.multiply(context, context_scale / p)
            return np.asarray(self.table(np.divide(n, p), each, prefill, seen) / p)

        return seconds

    def round_s(self, traffic: Traffic, slots: float, rate_per_s: float) -> float:
        """Mean seconds in which all batches of a pipeline generate once: a prompt's pass where one is about, or one without.

        The time that a round takes says how many requests are there, and they say how long it takes: bisection.
        """
        steps = (traffic.osl - 1.0) / self.accepted
        context = traffic.isl + traffic.osl * (1.0 + traffic.length_scv) / 2.0

        def found_s(round_s: float) -> float:
            each = min(rate_per_s * steps * round_s, slots) / self.stages
            room = max(self.budget - each * self.step_tokens, 1.0)
            part = min(traffic.computed_isl, room)
            alone_s, held_s = (
                float(self.table(each, each * context, m, m * traffic.prompt_context)) for m in (0.0, part)
            )
            share = held_up_share(rate_per_s * round_s, traffic.computed_isl / part, self.stages)
            return alone_s + float(share) * (held_s - alone_s)

        low, high = found_s(0.0), found_s(np.inf)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if found_s(middle) > middle else (low, middle)
        return high

    def way_s(self, traffic: Traffic, decodes: float = 0.0, longest_s: float = 0.0) -> float:
        """What pipeline stages and attention ranks add to the first token, beside the queue.

        The last tokens of a prompt pass every stage in their own time, or that of a longer batch ahead (``longest_s``); and a
        prompt is run by one rank, with that rank's budget, while the queue is one of all ranks together.
        """
        each, prompt = decodes / self.stages, traffic.computed_isl

        def pass_s(tokens: float) -> float:
            context = each * (traffic.isl + traffic.osl / 2.0)
            return float(self.table(each, context, tokens, tokens * traffic.prompt_context))

        own = min(prompt, self.budget / self.ranks)
        whole, spread = pass_s(own * self.ranks), pass_s(min(prompt, self.budget))
        rank_s = max(prompt / own * whole - max(prompt / self.budget, 1.0) * spread, 0.0) / self.stages
        stage_s = max(whole / self.stages, longest_s)
        return (self.stages - 1.0) * stage_s + (rank_s if self.ranks > 1.0 else 0.0)


def mixed_pool(line: Line, traffic: Traffic, slots: float, decodes: float, rate_per_s: float) -> Latencies:
    """Chunks of prompts beside generation, at a replica's rate; about ``decodes`` of its ``slots`` requests generate.

    Raises:
        Infeasible: the rate is beyond what the replica can serve.
    """
    p, steps = line.stages, (traffic.osl - 1.0) / line.accepted
    true = Lengths(float(traffic.isl), float(traffic.osl), 0.0, traffic.length_scv, traffic.prefix_hit)
    slower = Lengths(float(traffic.isl), steps * p + 1.0, 0.0, traffic.length_scv, traffic.prefix_hit)
    price = line.price(float(true.context_tokens / slower.context_tokens))
    # A pp-th of the decodes take a place in the budget, or as many as a step checks tokens.
    budget = line.budget + decodes * (1.0 - line.step_tokens / p)
    round_s = 0.0
    if p > 1.0:  # prompts meet more decodes than one engine that begins iterations p times as often has
        paced_s = p * float(steady_load(price, _rules(slots, budget), slower, rate_per_s).tpot_s[0])
        round_s = max(line.round_s(traffic, slots, rate_per_s), paced_s)
        held = rate_per_s * steps * round_s
        if held >= slots:
            raise _beyond(rate_per_s, slots / (steps * round_s))
        price = _beside_more(price, round_s / paced_s, slots)
        budget = line.budget + held * (paced_s / round_s - line.step_tokens / p)
    rules = replace(_rules(slots, budget), mixed=line.beside)
    found = percentiles(price, rules, slower, rate_per_s, _asked(traffic))
    way_s, scale = line.way_s(traffic, found.decodes), max(p, round_s / found.tpot_s["mean"])
    ttft = {name: seconds + way_s for name, seconds in found.ttft_s.items()}
    return Latencies(ttft, {name: seconds * scale / line.accepted for name, seconds in found.tpot_s.items()})


def _beside_more(price: Price, times: float, slots: float) -> Price:
    """A price whose iterations hold some times the decodes that they are asked for, up to the slots."""

    def seconds(n: Array, context: Array, prefill: Array, seen: Array) -> Array:
        more = np.maximum(np.minimum(times, slots / np.maximum(n, 1e-9)), 1.0)
        return price(n * more, context * more, prefill, seen)

    return seconds


def prefill_pool(line: Line, traffic: Traffic, rate_per_s: float) -> dict[str, float]:
    """Seconds from a prompt's arrival at a replica that runs nothing else to its end.

    Raises:
        Infeasible: the rate is beyond what the replica can serve.
    """
    lengths = Lengths(float(traffic.isl), 1.0, 0.0, 0.0, traffic.prefix_hit)
    balance = Balance.of(line.price(), _rules(1e9, line.budget), lengths)
    pace_s = (
        float(balance.prefill_s(np.array(0.0), np.array(line.budget))) * traffic.computed_isl / line.budget
    )
    if rate_per_s * pace_s >= 1.0:
        raise _beyond(rate_per_s, 1.0 / pace_s)
    queue = PrefillQueue(balance, rate_per_s, 0.0, LengthLaw.of(traffic.computed_isl, 0.0))
    found = queue.first_token()
    # A batch cannot overtake: the longest of those that follow each other is met at every stage.
    way_s = line.way_s(traffic, longest_s=found.longest_s)
    return {
        name: value + way_s for name, value in summary(found.seconds, found.chances, _asked(traffic)).items()
    }


def decode_pool(line: Line, traffic: Traffic, slots: float, rate_per_s: float) -> dict[str, float]:
    """Seconds between tokens of a replica that generates alone.

    Raises:
        Infeasible: the rate is beyond what the replica can serve.
    """
    p, steps = line.stages, (traffic.osl - 1.0) / line.accepted
    true = Lengths(float(traffic.isl), float(traffic.osl), 0.0, traffic.length_scv)
    slower = Lengths(float(traffic.isl), steps * p + 1.0, 0.0, traffic.length_scv)
    price = line.price(float(true.context_tokens / slower.context_tokens))
    found = generation(price, slots, slower, rate_per_s, _asked(traffic))
    return {name: seconds * p / line.accepted for name, seconds in found.tpot_s.items()}


def highest_rate(
    latencies: Callable[[float], Latencies], traffic: Traffic, rate_per_s: float, most_per_s: float
) -> tuple[float, Latencies] | None:
    """The rate, up to ``most_per_s``, at which the chains' latencies just keep the limits; None where no load to speak of does.

    Begins at ``rate_per_s``, what means allow; where nothing near it keeps them, again at ever smaller parts of it. A given
    rate of the traffic is kept, or it is not.
    """
    if traffic.rate_per_s is not None:
        return _nearby(latencies, traffic, rate_per_s, most_per_s, 1)
    tries = (_nearby(latencies, traffic, part * rate_per_s, most_per_s, _TRIES) for part in _PARTS)
    return next((found for found in tries if found is not None), None)


def _nearby(
    latencies: Callable[[float], Latencies],
    traffic: Traffic,
    rate_per_s: float,
    most_per_s: float,
    tries: int,
) -> tuple[float, Latencies] | None:
    """The rate that keeps the limits, beginning at one; None where so many tries find none."""
    kept: tuple[float, Latencies] | None = None
    low, high = (0.0, 0.0), (most_per_s, np.inf)  # rates, and found over allowed at them
    rate = min(rate_per_s, most_per_s)
    for _ in range(tries):
        try:
            found = latencies(rate)
            ratio = found.missed(traffic)[0]
        except Infeasible:
            ratio = np.inf
        if ratio <= 1.0:
            kept, low = (rate, found), (rate, ratio)
            if rate >= most_per_s or ratio >= _CLOSE or rate >= _SAME * high[0]:
                break
        else:
            high = rate, ratio
        rate = _between(*low, *high)
    return kept


def _between(low: float, ratio_low: float, high: float, ratio_high: float) -> float:
    """Where a ratio that grows faster and faster would be just below 1."""
    if low <= 0.0:
        return float(high * max(_GOAL / ratio_high, 0.25) if np.isfinite(ratio_high) else 0.9 * high)
    if not np.isfinite(ratio_high):
        return float(min(high, low * min((_GOAL / max(ratio_low, 1e-3)) ** 0.5, 1.5)))
    part = np.log(_GOAL / ratio_low) / np.log(ratio_high / ratio_low)
    return float(low + (high - low) * np.clip(part, 0.05, 0.95))


def _rules(slots: float, budget: float) -> Scheduler:
    return scheduler("sarathi", max(int(slots), 1), max(int(budget), 1))


def _asked(traffic: Traffic) -> float | None:
    return None if traffic.percentile is None else traffic.percentile / 100.0


def _beyond(rate_per_s: float, most_per_s: float) -> Infeasible:
    return Infeasible(
        Problem("rate", f"{rate_per_s:.4g} requests/s", f"less than {most_per_s:.4g} requests/s")
    )
