"""Percentiles of latency under Poisson arrivals, from two Markov chains on one iteration time.

*Fast* (:mod:`planner.load.prefill_queue`): how many prompt tokens wait, beside a given number ``n`` of decodes. It gives the
time to the first token, and how long a request decodes at this ``n``.

*Slow*: how many requests decode, a birth–death chain with departures at ``n`` over that time, up to the slots. On the clock
that stops while prompts are computed, arrivals come in clusters: whoever comes during a prefill joins at its end. A cluster is
the progeny of one prompt, each bringing those that come while it is computed (Borel's law for fixed lengths; M. Dwass, "The
total progeny in a branching process", 1969). Levels are crossed up by clusters and down one by one, which gives the
stationary law by recursion. Processor sharing makes it insensitive to output lengths while slots are free; waiting for a slot
is that of M/M/c, scaled as M/G/c to the variation of what requests keep full slots busy with.

Holds for iteration-level policies where ``n`` changes slowly next to the prompts, for Poisson arrivals, without preemption.
Bursts, priorities, static batches and an overcommitted KV pool are for the simulator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import lgamma

import numpy as np

from planner.costs.queueing import ggc_wait_s, mmc_wait_s
from planner.errors import Infeasible, Problem, SpecError
from planner.load.balance import Balance
from planner.load.iteration_time import Array, Price
from planner.load.length_law import LengthLaw
from planner.load.prefill_queue import FirstToken, PrefillQueue
from planner.load.requests import Lengths
from planner.load.scheduler import Scheduler

__all__ = ["Percentiles", "generation", "percentiles", "summary"]

_LEVELS = 4
_NARROW = 0.1
"""Variation of ``n`` (relative) below which two levels stand for it."""
_RARE = 1e-4
"""Chance of an empty batch below which it needs no level of its own."""
_MOST_STATES = 4096
_WIDTH = 12.0
"""Standard deviations of ``n`` beyond which states are left out."""
_LONGEST_CLUSTER = 400
_WAITS = -np.log1p(-(np.arange(64) + 0.5) / 64)
"""Exponential waits of mean 1 with equal chances."""
_NEGLIGIBLE = 1e-6
_BINS_PER_E = 400
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Latencies of a pool at one rate: ``mean``, ``p50``, ``p90`` and ``p99`` in seconds, and ``at`` if asked for.

    Attributes:
        ttft_s: to the first token.
        tpot_s: per output token after it; the mean is over tokens, the percentiles over requests (rough: moments only).
        decodes: requests that decode at a time, on average.
        waits: fraction of requests that wait for a slot.
    """

    ttft_s: dict[str, float]
    tpot_s: dict[str, float]
    decodes: float
    waits: float


def percentiles(
    price: Price, rules: Scheduler, lengths: Lengths, rate_per_s: float, at: float | None = None
) -> Percentiles:
    """Of one pool (numbers, not rows) under Poisson arrivals.

    Args:
        at: one more quantile, 0 to 1.

    Raises:
        SpecError: a static batch, which has no such chain.
        Infeasible: the rate is beyond what the pool can serve.

    >>> from planner.load.iteration_time import Affine
    >>> from planner.load.scheduler import scheduler
    >>> load = percentiles(Affine(20e-3, 0.2e-3), scheduler("sarathi", 4096, 4096), Lengths(1, 101), 20.0)
    >>> round(load.decodes, 1)  # (a + b)λD/(1 − bλD) = 40.4/0.6
    67.3
    """
    if rules.gated:
        raise SpecError(
            Problem("scheduler", "a static batch", "iteration-level batching", "Use the simulator.")
        )
    balance = Balance.of(price, rules, lengths)
    most = balance.bound()[0]
    slots, full_per_s = float(most * balance.decodes), float(most / balance.full_s(most))
    _check_rate(rate_per_s, full_per_s)
    prompts = LengthLaw.of(float(lengths.computed_tokens), float(lengths.prompt_cv2))
    decodes = _states(balance, rate_per_s, slots, prompts.cv2)
    taken = bool(decodes[-1] >= slots)  # whether the last state is that of no free slot
    cycle_s, prefill_load = _cycles(balance, decodes[1:], rate_per_s)
    stay_s = float(balance.decodes) * cycle_s
    if taken:
        stay_s[-1] = slots / full_per_s
    load = min(float(np.interp(rate_per_s, decodes[1:] / stay_s, prefill_load)), 0.98)
    outputs = LengthLaw.of(max(float(lengths.decodes), 1.0), float(lengths.output_cv2))
    clusters = _cluster_load(load, prompts.cv2, outputs), prompts.cv2
    chance = _decode_law(decodes, stay_s, load, clusters, rate_per_s)
    levels = _levels(decodes, chance)
    fast = [PrefillQueue(balance, rate_per_s, level, prompts).first_token() for level in levels]
    stay_s = _corrected(stay_s, decodes[1:], float(balance.decodes), levels, fast)
    if taken:
        stay_s[-1] = slots / full_per_s
    chance = _decode_law(decodes, stay_s, load, clusters, rate_per_s)
    shares = _shares(decodes, chance, levels)
    seconds = [queue.seconds for queue in fast]
    chances = [queue.chances * share for queue, share in zip(fast, shares, strict=True)]
    if taken and chance[-1] > _NEGLIGIBLE:
        alone_s, weight = PrefillQueue(balance, rate_per_s, slots, prompts).alone()
        work_cv2 = float(balance.work_cv2(np.array(slots), np.array(full_per_s)))
        wait_s = _slot_wait_s(rate_per_s, full_per_s, slots, work_cv2)
        seconds.append((alone_s[:, None] + wait_s * _WAITS).ravel())
        chances.append(np.repeat(weight * chance[-1] / len(_WAITS), len(_WAITS)))
    mean = float(chance @ decodes)
    tpot_s = mean / (rate_per_s * float(balance.decodes))
    # Prefills within a stay: a compound Poisson number of busy periods of M/G/1, λθE[S²]/(1 − ρ)² per iteration.
    prompt_s2 = (load / rate_per_s) ** 2 * (1.0 + prompts.cv2)
    stalls_s2 = rate_per_s * tpot_s * prompt_s2 / (1.0 - load) ** 2
    drift_s2 = _drift_s2(decodes[1:], chance[1:], stay_s / float(balance.decodes))
    floor_s = float(balance.decode_s(np.array(1.0)))
    tpot = {"mean": tpot_s} | _tpot_quantiles(tpot_s, floor_s, outputs, drift_s2, stalls_s2, at)
    if float(lengths.decodes) <= 0.0:
        tpot = dict.fromkeys(tpot, 0.0)  # nothing comes after the first token
    ttft = summary(np.concatenate(seconds), np.concatenate(chances), at)
    return Percentiles(ttft, tpot, mean, float(chance[-1]) if taken else 0.0)


def generation(
    price: Price, slots: float, lengths: Lengths, rate_per_s: float, at: float | None = None
) -> Percentiles:
    """Of a pool that generates alone, on caches that come from elsewhere as a Poisson stream; the first token has come before.

    A request waits for a slot (``ttft_s`` is that wait) and for the iteration under way, both of which count between tokens.

    Raises:
        Infeasible: the rate is beyond what the pool can serve.

    >>> from planner.load.iteration_time import Affine
    >>> load = generation(Affine(20e-3, 0.2e-3), 4096.0, Lengths(1, 101), 20.0)
    >>> round(load.decodes, 2)  # (a + b)λD/(1 − bλD) = 40.4/0.6
    67.33
    """
    d = max(float(lengths.decodes), 1.0)
    grid = np.unique(np.round(np.geomspace(1.0, slots, 64)))

    def step_s(n: Array) -> Array:
        return np.asarray(price(n, n * lengths.context_tokens, np.zeros_like(n), np.zeros_like(n)))

    full_per_s = slots / (d * float(step_s(np.array(slots))))
    _check_rate(rate_per_s, full_per_s)
    mean = float(np.interp(rate_per_s, np.maximum.accumulate(grid / (d * step_s(grid))), grid))
    n = _window(mean, 1.0, slots)
    stay_s = d * step_s(n[1:])
    chance = _one_by_one(n, stay_s, rate_per_s)
    outputs = LengthLaw.of(d, float(lengths.output_cv2))
    waits = float(chance[-1]) if n[-1] >= slots else 0.0
    wait_s = _slot_wait_s(rate_per_s, full_per_s, slots, outputs.cv2) if waits else 0.0
    decodes = float(chance @ n)
    step = decodes / (rate_per_s * d)
    tpot_s = step * (1.0 + 0.5 / d) + waits * wait_s / d
    spread_s2 = waits * (2.0 - waits) * wait_s**2 / d
    drift_s2 = _drift_s2(n[1:], chance[1:], stay_s / d)
    tpot = {"mean": tpot_s} | _tpot_quantiles(
        tpot_s, float(step_s(np.array(1.0))), outputs, drift_s2, spread_s2, at
    )
    slot_s = np.concatenate([[1e-9], wait_s * _WAITS])
    wait = summary(slot_s, np.concatenate([[1.0 - waits], np.full(len(_WAITS), waits / len(_WAITS))]), at)
    return Percentiles(wait, tpot, decodes, waits)


def _check_rate(rate_per_s: float, most_per_s: float) -> None:
    if rate_per_s >= most_per_s:
        raise Infeasible(
            Problem(
                "rate",
                f"{rate_per_s:.4g} requests/s, {rate_per_s / most_per_s - 1:.1%} beyond what the pool serves",
                f"less than {most_per_s:.4g} requests/s",
            )
        )


# -- how many decode -----------------------------------------------------------------------------------------------------


def _states(balance: Balance, rate_per_s: float, slots: float, prompt_cv2: float) -> Array:
    """Numbers of decodes to follow, ascending: 0 up to the slots, or where those are many, the part in which ``n`` ever is."""
    if slots <= _MOST_STATES / 4:
        return _window(0.0, 1.0, slots)
    grid = np.unique(np.round(np.geomspace(1.0, slots, 64)))
    cycle_s, prefill_load = _cycles(balance, grid, rate_per_s)
    leaves_per_s = np.maximum.accumulate(grid / (float(balance.decodes) * cycle_s))
    mean = float(np.interp(rate_per_s, leaves_per_s, grid))
    load = min(float(np.interp(mean, grid, prefill_load)), 0.98)
    return _window(mean, 1.0 + 2.0 * load * (1.0 + prompt_cv2) / (1.0 - load) ** 2, slots)


def _window(mean: float, spread: float, slots: float) -> Array:
    """States around a mean whose variance is at most ``spread`` times that of Poisson's law; all of them where they are few."""
    if slots <= _MOST_STATES / 4:
        return np.concatenate([[0.0], np.minimum(np.arange(1.0, np.ceil(slots) + 1.0), slots)])
    width = _WIDTH * np.sqrt(mean * spread) + _WIDTH
    low = max(0.0, np.floor(mean - width))
    high = min(np.ceil(slots), np.ceil(mean + width), low + _MOST_STATES)
    return np.concatenate([[low], np.minimum(np.arange(low + 1.0, high + 1.0), slots)])


def _cycles(balance: Balance, n: Array, rate_per_s: float) -> tuple[Array, Array]:
    """Seconds from one decode iteration to the next beside ``n``, prefills of the arrivals in it included; their share of it."""
    alone_s = balance.decode_s(n)
    x = rate_per_s * alone_s
    cycle_s = alone_s
    for _ in range(4):  # exact at once where the price is affine
        per_request_s = (balance.cycle_s(n, x) - alone_s) / x
        cycle_s = alone_s / np.maximum(1.0 - rate_per_s * per_request_s, 1e-2)
        x = rate_per_s * cycle_s
    return cycle_s, 1.0 - alone_s / cycle_s


def _decode_law(
    n: Array, stay_s: Array, load: float, clusters: tuple[float, float], rate_per_s: float
) -> Array:
    """Stationary law over ``n`` (0 first); the last state holds the tail of those that wait for a slot.

    Args:
        load: share of time in prefills, which the clock leaves out.
        clusters: load that makes the clusters, and the squared variation of prompts.
    """
    arrives_per_s = rate_per_s * (1.0 - clusters[0]) / (1.0 - load)  # clusters, such that all requests come
    leaves_per_s = n[1:] / (stay_s * (1.0 - load))
    beyond = _cluster_tail(*clusters, min(len(n) - 1, _LONGEST_CLUSTER))[::-1]
    chance = np.zeros(len(n))
    chance[0] = 1.0
    for j in range(1, len(n)):
        reach = min(j, len(beyond))
        up = chance[j - reach : j] @ beyond[len(beyond) - reach :]
        chance[j] = arrives_per_s / leaves_per_s[j - 1] * up
        if chance[j] > 1e100:
            chance[: j + 1] /= chance[j]
    chance[-1] /= max(1.0 - rate_per_s * stay_s[-1] / n[-1], 1e-3)
    return chance / np.sum(chance)


def _one_by_one(n: Array, stay_s: Array, rate_per_s: float) -> Array:
    """As :func:`_decode_law` without clusters: ``π_j = π_{j−1}·λ/μ_j``."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(rate_per_s * stay_s / n[1:]))])
    chance = np.exp(logs - np.max(logs))
    chance[-1] /= max(1.0 - rate_per_s * stay_s[-1] / n[-1], 1e-3)
    return np.asarray(chance / np.sum(chance))


def _cluster_load(load: float, prompt_cv2: float, outputs: LengthLaw) -> float:
    """The load whose clusters spread ``n`` in a chain of exponential lengths as the true ones do with theirs.

    What a cluster adds to the variance of ``n`` is ``E[J(J − 1)]/E[J]`` times the share of time that two of its members are both
    there, ``∫F̄²/∫F̄``: 1 for fixed lengths, ½ for exponential ones, less for wider laws (batch arrivals at infinitely many
    servers; D. N. Shanbhag, "On infinite server queues with batch arrivals", 1966).
    """

    def excess(rho: float) -> float:
        return rho * (1.0 + rho * prompt_cv2) / (1.0 - rho) ** 2 + rho / (1.0 - rho)

    wanted, low, high = 2.0 * outputs.shared_fraction() * excess(load), 0.0, 0.98
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if excess(middle) < wanted else (low, middle)
    return low


def _cluster_tail(load: float, prompt_cv2: float, count: int) -> Array:
    """Chances that a cluster exceeds ``0 … count − 1``: ``P(J = k) = P(X_1 + … + X_k = k − 1)/k`` (Otter–Dwass).

    A prompt brings a Poisson number of others while it is computed: negative binomial where its length is gamma.

    >>> _cluster_tail(0.5, 0.0, 3).round(4).tolist()  # Borel: e^{-1/2}, e^{-1}/2
    [1.0, 0.3935, 0.2095]
    """
    if load < 1e-9:
        return np.concatenate([[1.0], np.zeros(count - 1)])
    k = np.arange(1.0, count)
    if prompt_cv2 < 1e-4:
        log_chance = -load * k + (k - 1.0) * np.log(load * k) - _log_gamma(k + 1.0)
    else:
        shape = 1.0 / prompt_cv2
        log_chance = _log_gamma(k - 1.0 + k * shape) - _log_gamma(k + 1.0) - _log_gamma(k * shape)
        log_chance += k * shape * np.log(shape / (shape + load)) + (k - 1.0) * np.log(load / (shape + load))
    return np.concatenate([[1.0], np.maximum(1.0 - np.cumsum(np.exp(log_chance)), 0.0)])


_log_gamma: Callable[[Array], Array] = np.vectorize(lgamma, otypes=[float])


def _levels(n: Array, chance: Array) -> list[float]:
    """Where the fast chain is solved: no decodes unless that is rare, and means of equal parts of the rest (with free slots)."""
    levels = [0.0] if n[0] == 0.0 and chance[0] > _RARE else []
    inner, weight = n[1:-1], chance[1:-1]
    if np.sum(weight) <= 0.0:
        return [*levels, float(n[-1])]
    cumulated = np.cumsum(weight) / np.sum(weight)
    mean = float(np.average(inner, weights=weight))
    spread = float(np.sqrt(np.average((inner - mean) ** 2, weights=weight))) / mean
    count = _LEVELS if spread > _NARROW else _LEVELS // 2
    parts = np.split(np.arange(len(inner)), np.searchsorted(cumulated, np.arange(1, count) / count))
    levels += [float(np.average(inner[p], weights=weight[p])) for p in parts if np.sum(weight[p]) > 0.0]
    return levels


def _shares(n: Array, chance: Array, levels: list[float]) -> list[float]:
    """Chance of the states nearest to each level; those of the last state wait, and are not among them unless alone."""
    nodes = np.array(levels)
    free = n[:-1] if len(n) > 2 else n
    nearest = np.searchsorted(0.5 * (nodes[1:] + nodes[:-1]), free)
    if levels[0] == 0.0:
        nearest[(free > 0.0) & (nearest == 0)] = 1
    shares: list[float] = np.bincount(nearest, chance[: len(free)], minlength=len(levels)).tolist()
    return shares


def _corrected(stay_s: Array, n: Array, d: float, levels: list[float], fast: list[FirstToken]) -> Array:
    """Decode times as the fast chain has them, carried over from its levels to all ``n``."""
    known = [(level, queue) for level, queue in zip(levels, fast, strict=True) if level > 0.0]
    at = np.array([level for level, _ in known])
    exact_s = np.array([queue.cycle_s * d + queue.pause_s for _, queue in known])
    ratio: Array = np.interp(n, at, exact_s / np.interp(at, n, stay_s))
    return stay_s * ratio


def _slot_wait_s(rate_per_s: float, full_per_s: float, slots: float, work_cv2: float) -> float:
    """Mean wait of those that wait: exponential, M/M/c scaled to the variation of the work as M/G/c."""
    servers = max(round(slots), 1)
    service_s = servers / full_per_s
    poisson_s = mmc_wait_s(rate_per_s, service_s, servers)
    scale = ggc_wait_s(rate_per_s, service_s, servers, 1.0, work_cv2) / poisson_s if poisson_s > 0.0 else 1.0
    return float(scale) / (full_per_s - rate_per_s)


# -- percentiles -------------------------------------------------------------------------------------------------------------


def summary(seconds: Array, chances: Array, at: float | None = None) -> dict[str, float]:
    """Mean and quantiles of outcomes, gathered in bins of a quarter per cent."""
    floor_s = max(float(np.min(seconds)), 1e-9)
    bins = (np.log(np.maximum(seconds, floor_s) / floor_s) * _BINS_PER_E).astype(int)
    mass = np.bincount(bins, chances)
    total = float(np.sum(mass))
    cumulated = (np.cumsum(mass) - 0.5 * mass) / total
    values_s = floor_s * np.exp((np.arange(len(mass)) + 0.5) / _BINS_PER_E)
    held = mass > 0.0
    found = {"mean": float(seconds @ chances) / total}
    return found | {
        name: float(np.interp(q, cumulated[held], values_s[held])) for name, q in _wanted(at).items()
    }


def _drift_s2(n: Array, chance: Array, cycle_s: Array) -> float:
    """Variance of ``θ(n)`` as tokens see it."""
    seen = chance * n / (chance @ n)
    return float(seen @ (cycle_s - seen @ cycle_s) ** 2)


def _tpot_quantiles(
    mean_s: float,
    floor_s: float,
    outputs: LengthLaw,
    drift_s2: float,
    stalls_s2: float,
    at: float | None = None,
) -> dict[str, float]:
    """Over requests: the mean of ``d`` cycles, above ``floor_s`` as a gamma law with its variance; short outputs vary more.

    - ``n`` drifts while a request stays, and forgets at the rate at which requests leave: ``2(r − 1 + e^{−r})/r²`` of its
      variance remains for an output ``r`` times as long as the mean;
    - prefills add ``stalls_s2/d``.
    """
    tokens, weight = outputs.nodes()
    tokens = np.maximum(tokens, 1.0)
    r = tokens / outputs.mean
    variance_s2 = drift_s2 * 2.0 * (r - 1.0 + np.exp(-r)) / r**2 + stalls_s2 / tokens
    above_s = max(mean_s - floor_s, 1e-9 * mean_s)
    laws = [LengthLaw.of(above_s, min(float(v) / above_s**2, 100.0)) for v in variance_s2]
    at_s = above_s * np.geomspace(1e-3, 1e3, 800)
    below = sum(
        w * np.interp(at_s, law.points, law.below, left=0.0) for law, w in zip(laws, weight, strict=True)
    )
    return {name: floor_s + float(np.interp(q, below, at_s)) for name, q in _wanted(at).items()}


def _wanted(at: float | None) -> dict[str, float]:
    return _QUANTILES if at is None else {**_QUANTILES, "at": at}
