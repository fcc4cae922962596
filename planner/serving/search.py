"""The exact search of one pool: the highest load that every candidate carries within its promises, and the best of them.

A candidate is a recipe on a mesh with an iteration budget. Its load is the number of requests in flight: throughput and latencies
grow with it but for small dips where a tile of a kernel begins, so the best is the largest that keeps the limits or lies just
below such a dip. A coarse grid brackets it for all candidates at once; whatever
cannot beat the best so far even at the upper end of its bracket is excluded by that bound, the rest is bisected to the request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.engine.pricer import Pricer
from planner.ledger import Array
from planner.serving.aggregated import Steady, steady
from planner.serving.candidates import Account, Candidates, candidates, iterations_of
from planner.serving.front import Curve
from planner.serving.launcher import seated
from planner.serving.limits import limits_kept
from planner.serving.percentiles import Latencies
from planner.serving.slots import MOST_LOAD, Arrivals
from planner.serving.space import ServeSpace, mesh_of, size_of
from planner.specs.serve_problem import ServeProblem

__all__ = ["Found", "search_aggregated"]

_GRID = 10  # points of the bracketing grid
_MORE = 1.0 + 1e-9  # steps that two loads differ by at least, where one may lie between them
_QUARTERS = np.array([0.25, 0.5, 0.75])
_DIP = 0.01  # part of its rate that a replica may lose where a request more begins another tile of a kernel
_NEARER = 1.0 - np.array(
    [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64]
)  # parts of a load, where it is searched for dips
_WINDOW = 512  # loads below a replica's largest that are tried at most
_FEW = 16.0  # slots below which a load is no whole number of requests


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """One candidate at its load."""

    recipe: Mapping[str, str]
    row: NDArray[Any]
    chunk: float
    replicas: int
    in_flight: int
    most: float
    state: Steady
    memory: Mapping[str, float]
    binding: str
    tokens_per_s: float  # output of all replicas
    most_per_s: float  # requests that a replica answers at the highest load of which there is a steady state
    latencies: Latencies | None = None  # of arrivals of their own, where they were asked for

    @property
    def tpot_s(self) -> float:
        """Mean time between tokens."""
        return float(self.state.tpot_s[0]) if self.latencies is None else self.latencies.tpot_s["mean"]

    @property
    def devices(self) -> int:
        """Devices of all replicas."""
        return int(self.replicas * size_of(self.row))


def search_aggregated(
    problem: ServeProblem, space: ServeSpace, pricer: Pricer, top: int, account: Account
) -> list[Found]:
    """The best candidates of one pool, best first."""
    pools = [
        c
        for recipe in space.recipes()
        if (c := candidates(problem, space, recipe, pricer, account)) is not None
    ]
    brackets = [(c, _bracket(problem, c, pricer, account)) for c in pools]
    lower = np.concatenate([b.low_value for _, b in brackets]) if brackets else np.zeros(0)
    if not np.any(lower > 0.0):
        return []
    bar = np.sort(lower[lower > 0.0])[::-1][: top * 3][-1]
    found: list[Found] = []
    for c, b in brackets:
        alive = (b.low > 0) & ((1.0 + _DIP) * b.high_value >= bar)
        account.excluded["throughput"] += int(((b.low > 0) & ~alive).sum())
        if alive.any():
            found += _refine(problem, c, b, np.flatnonzero(alive), pricer, account)
    return sorted(
        found, key=lambda f: (-f.tokens_per_s / _cost(problem, f), float(f.state.tpot_s[0]), f.devices)
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Bracket:
    """Per row: the largest load of the grid that keeps the limits (0: none), the smallest that does not, and both values.

    ``step`` is what loads are multiples of: a request, or part of one in a replica that holds but a few.
    """

    low: Array
    high: Array
    low_value: Array
    high_value: Array
    step: Array
    arrivals: Arrivals


def _replicas(problem: ServeProblem, size: Array, fixed: int | None) -> Array:
    """Replicas that the machines hold, or that are asked for."""
    room = (
        np.floor(problem.cluster.devices / size)
        if problem.launcher is None
        else seated(problem.cluster, size)
    )
    return np.asarray(room if fixed is None else np.minimum(room, float(fixed)))


def _value(problem: ServeProblem, rate: Array, replicas: Array, size: Array) -> Array:
    """What the ranking maximises: output tokens per second of the machines, or of a device that a plan uses.

    Devices are alike, so that tokens per device are tokens per dollar and joule.
    """
    tokens = rate * problem.traffic.osl
    wanted = problem.traffic.rate_per_s
    if wanted is None:
        return np.asarray(tokens * replicas if problem.objective == "throughput" else tokens / size)
    needed = np.ceil(wanted / np.maximum(rate, 1e-12) - 1e-9)
    enough = needed <= replicas
    return np.asarray(np.where(enough, wanted * problem.traffic.osl / (np.maximum(needed, 1.0) * size), 0.0))


def _cost(problem: ServeProblem, found: Found) -> float:
    return 1.0 if problem.machines_count else float(found.devices)


def _bracket(problem: ServeProblem, c: Candidates, pricer: Pricer, account: Account) -> _Bracket:
    """Limits of all rows on a geometric grid of loads, in one go."""
    rows, traffic = len(c.chunks), problem.traffic
    replicas = _replicas(problem, c.size, problem.fixed.get("replicas"))
    unit = np.ones(rows)
    if traffic.concurrency is not None:
        grid = np.minimum(np.ceil(traffic.concurrency / replicas), c.most)[:, None]
    else:
        unit = np.minimum(1.0, c.most / _FEW)
        steps = np.linspace(0.0, 1.0, _GRID)[None, :]
        grid = unit[:, None] * np.round((c.most / unit)[:, None] ** steps)
    points = grid.shape[1]
    iterations = iterations_of(problem, c.recipe, mesh_of(np.repeat(c.rows, points, axis=0)), pricer)
    state = steady(iterations, traffic, grid.reshape(-1), np.repeat(c.chunks, points))
    first, last_point = np.arange(rows) * points, np.arange(rows) * points + points - 1
    clients = np.inf if traffic.concurrency is None else np.ceil(traffic.concurrency / replicas)
    arrivals = Arrivals(
        traffic, c.most, state.take(last_point), state.decode_s[first], clients + 0.0 * c.most
    )
    state = arrivals.take(np.repeat(np.arange(rows), points)).meet(state)
    kept, worst, ratio = (x.reshape(rows, points) for x in limits_kept(problem, state))
    rate = state.requests_per_s.reshape(rows, points)
    value = _value(problem, rate, replicas[:, None], c.size[:, None])
    account.curves.append(_curve(problem, c, state, np.repeat(replicas, points)))
    last = np.where(kept, np.arange(points)[None, :], -1).max(axis=1)
    if traffic.rate_per_s is not None:  # the value of a rate steps up where a replica becomes superfluous
        kept_value = np.where(kept, value, 0.0).max(axis=1)
        slow = (last >= 0) & (kept_value <= 0.0)
        high = np.minimum(last + 1, points - 1)
        short = slow & (value[np.arange(rows), high] <= 0.0)
        account.rejected["rate"] += int(short.sum())
        best = (rate * kept * replicas[:, None]).max(axis=1)
        for index in np.flatnonzero(short)[:200]:
            account.miss("rate", float(traffic.rate_per_s / max(best[index], 1e-12)), _named(c, int(index)))
        last = np.where(short, -1, last)
        refused = (last < 0) & ~short
    else:
        refused = last < 0
    for index in np.flatnonzero(refused):
        limit = str(worst[index, 0])
        account.rejected[f"{limit} limit"] += 1
        account.miss(limit, float(ratio[index, 0]), _named(c, int(index)))
    best_point = np.clip(last, 0, None)
    nxt = np.minimum(best_point + 1, points - 1)
    at = np.arange(rows)
    low = np.where(last >= 0, grid[at, best_point], 0.0)
    low_value = np.where(last >= 0, value[at, best_point], 0.0)
    if traffic.rate_per_s is not None:
        low_value = np.where(last >= 0, np.maximum(low_value, 1e-300), 0.0)
    high_value = np.where(last >= 0, value[at, nxt], 0.0)
    return _Bracket(low, grid[at, nxt], low_value, high_value, unit, arrivals)


def _curve(problem: ServeProblem, c: Candidates, state: Steady, replicas: Array) -> Curve:
    """What every row has at every load of its grid, as long as the first token comes in time."""
    traffic, points = problem.traffic, len(replicas) // len(c.chunks)
    ttft = state.ttft_s if traffic.percentile is None else state.ttft_at(traffic.percentile / 100.0)
    in_time = ttft <= (np.inf if traffic.ttft_s is None else traffic.ttft_s)
    per_device = state.requests_per_s * traffic.osl / np.repeat(c.size, points)
    token_s = state.tpot_s if traffic.osl > 1 else state.ttft_s
    return Curve(
        "aggregated", 1.0 / np.maximum(token_s, 1e-12), np.where(in_time, per_device, 0.0), replicas[:, None],
        np.repeat(c.rows, points, axis=0)[:, None, :], ("aggregated",),
    )  # fmt: skip


def _named(c: Candidates, index: int) -> str:
    tp, pp, dp, ep = (int(x) for x in c.rows[index][:4])
    shape = (
        f"tp={tp}"
        + (f" pp={pp}" if pp > 1 else "")
        + (f" dp={dp}" if dp > 1 else "")
        + (f" ep={ep}" if ep > 1 else "")
    )
    return f"{shape}, {c.recipe['weights']}"


def _refine(
    problem: ServeProblem, c: Candidates, b: _Bracket, index: NDArray[Any], pricer: Pricer, account: Account
) -> list[Found]:
    """Bisects the load of some rows to the request, and prices them there."""
    rows, chunks, traffic = c.rows[index], c.chunks[index], problem.traffic
    size = c.size[index]
    replicas = _replicas(problem, size, problem.fixed.get("replicas"))
    iterations = iterations_of(problem, c.recipe, mesh_of(rows), pricer)
    low, high, step = b.low[index].copy(), b.high[index].copy(), b.step[index]
    arrivals = b.arrivals.take(index)

    def at(load: Array) -> Steady:
        return arrivals.meet(steady(iterations, traffic, load, chunks))

    binding = np.full(len(index), "memory", dtype=object)
    account.scored += len(index)
    if traffic.concurrency is not None:
        binding[:] = np.where(arrivals.clients > arrivals.slots, "memory", "concurrency")
    else:
        top = high > low
        low, high, binding = _sections(problem, c, rows, chunks, arrivals, (low, high, step), binding, pricer)
        # The upper end was never tried where all of the grid kept the limits.
        untried = top & (high > low)
        if untried.any():
            kept, worst, _ = limits_kept(problem, at(high))
            binding = np.where(untried & ~kept, worst, binding)
            low = np.where(untried & kept, high, low)
    cap = float(iterations.software.max_sequences) * iterations.ctx.mesh.pp * iterations.ctx.mesh.dp
    binding = np.where((binding == "memory") & (c.most[index] >= cap), "sequences", binding)
    if traffic.rate_per_s is not None:
        low, replicas, binding = _at_rate(problem, at, low, step, binding)
    elif traffic.concurrency is None:
        low = _crest(problem, c, rows, chunks, arrivals, (low, step, replicas), pricer)
    state = at(low)
    rate = (
        state.requests_per_s if traffic.rate_per_s is None else traffic.rate_per_s / np.maximum(replicas, 1.0)
    )
    account.repriced += len(index)
    usable = replicas <= _replicas(problem, size, None)
    short = int((~usable).sum())
    account.scored -= short
    account.rejected["rate"] += short
    return [
        Found(
            c.recipe, rows[i], float(chunks[i]), int(replicas[i]), int(np.ceil(low[i])), float(c.most[index[i]]),
            state.take(np.array([i])), _memory(c, int(index[i]), float(low[i])), str(binding[i]),
            float(rate[i] * replicas[i] * traffic.osl), MOST_LOAD * float(arrivals.full.requests_per_s[i]),
        )
        for i in range(len(index))
        if usable[i]
    ]  # fmt: skip


def _sections(
    problem: ServeProblem, c: Candidates, rows: NDArray[Any], chunks: Array, arrivals: Arrivals,
    bracket: tuple[Array, Array, Array], binding: NDArray[Any], pricer: Pricer,
) -> tuple[Array, Array, NDArray[Any]]:  # fmt: skip
    """Narrows every row's bracket to a step, by three loads at a time: a call costs more than its rows do."""
    low, high, step = bracket
    count = len(_QUARTERS)
    index = np.tile(np.arange(len(rows)), count)
    iterations = iterations_of(problem, c.recipe, mesh_of(rows[index]), pricer)
    many = arrivals.take(index)
    while np.any(high - low > step * _MORE):
        loads = np.floor((low + (high - low) * _QUARTERS[:, None]) / step) * step
        loads = np.maximum(loads, low)
        state = many.meet(steady(iterations, problem.traffic, loads.reshape(-1), chunks[index]))
        kept, worst, _ = (x.reshape(count, -1) for x in limits_kept(problem, state))
        passed = np.logical_and.accumulate(kept | (loads <= low), axis=0).sum(axis=0)
        ends = np.concatenate([low[None], loads, high[None]])
        at = np.arange(len(low))
        binding = np.where(passed < count, worst[np.minimum(passed, count - 1), at], binding)
        low, high = ends[passed, at], ends[passed + 1, at]
    return low, high, binding


def _crest(
    problem: ServeProblem, c: Candidates, rows: NDArray[Any], chunks: Array, arrivals: Arrivals,
    loads: tuple[Array, Array, Array], pricer: Pricer,
) -> Array:  # fmt: skip
    """The load, up to the largest that keeps the limits, at which a replica serves most.

    A tile that one request more begins may cost more than the request brings. Rows that are further than such a dip
    from the best of the recipe keep their load, and loads below which no dip can make up for the rest are not tried.
    """
    most, step, replicas = loads

    def rates(load: Array, index: NDArray[Any]) -> Array:
        iterations = iterations_of(problem, c.recipe, mesh_of(rows[index]), pricer)
        state = arrivals.take(index).meet(steady(iterations, problem.traffic, load, chunks[index]))
        return np.asarray(np.where(limits_kept(problem, state)[0], state.requests_per_s, 0.0))

    every = np.arange(len(most))
    rate = rates(most, every)
    value = _value(problem, rate, replicas, np.prod(rows[:, :3], axis=1))
    near = np.flatnonzero((1.0 + _DIP) * value >= value.max())
    marks = np.floor(most[near, None] * _NEARER / step[near, None]) * step[near, None]
    marks = np.maximum(marks, step[near, None])
    reached = rates(marks.reshape(-1), np.repeat(near, len(_NEARER))).reshape(marks.shape)
    below = (1.0 + _DIP) * reached < rate[near, None]
    start = np.where(below, marks, 0.0).max(axis=1)
    tried = [
        np.arange(most[row], first, -step[row])[:_WINDOW] for row, first in zip(near, start, strict=True)
    ]
    served = rates(np.concatenate(tried), np.repeat(near, [len(x) for x in tried]))
    best, parts = most.copy(), np.cumsum([len(x) for x in tried])[:-1]
    for row, load, found in zip(near, tried, np.split(served, parts), strict=True):
        best[row] = load[found.argmax()]
    return best


def _at_rate(
    problem: ServeProblem, at: Callable[[Array], Steady], most: Array, step: Array, binding: Array
) -> tuple[Array, Array, Array]:
    """Requests in flight that a given rate keeps in each of the replicas that it needs, and the replicas."""
    traffic = problem.traffic
    assert traffic.rate_per_s is not None
    replicas = np.ceil(traffic.rate_per_s / at(most).requests_per_s - 1e-9)
    each = traffic.rate_per_s / replicas
    low, high = np.zeros_like(most), most.copy()
    while np.any(high - low > step * _MORE):
        middle = np.floor((low + high) / 2.0 / step) * step
        enough = at(np.maximum(middle, step)).requests_per_s >= each
        moving = high - low > step * _MORE
        low, high = np.where(moving & ~enough, middle, low), np.where(moving & enough, middle, high)
    return high, replicas, np.where(replicas > 1.0, binding, "rate")


def _memory(c: Candidates, index: int, in_flight: float) -> dict[str, float]:
    held = c.capacity
    weights, activations = float(held.weights_bytes[index]), float(held.activation_bytes[index])
    cache = float(held.cache_bytes[index]) * min(1.0, in_flight / max(c.most[index], 1.0))
    parts = {
        "weights": weights,
        "kv_cache": cache,
        "activations": activations,
        "reserved": held.reserved_bytes,
    }
    return {"peak": sum(parts.values()), **parts}
