"""Which tensors of a graph to keep and which to compute again: Checkmate's problem, by search or by its program.

Nodes are computed for the first time in their order; stage t begins with some tensors kept (S), computes some nodes
again, each at most once, and ends with node t (R). Memory grows by what is computed and shrinks by what nobody reads any
more before it is kept for the next stage. Freed memory is a product of such conditions, linear with one variable per
reader; as less memory is never worse, its upper limits suffice, and every condition is a row of its own, which is tighter
than the paper's sum over all of them. The same schedules are found by :mod:`planner.solve.combinatorial.pebbling`, which
is what answers unless the program is asked for.

Source: P. Jain et al. 2020 (Checkmate, arXiv:1910.02653) §4: equations 1 to 8, and §4.8 for stages that end with one node
each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.errors import Infeasible, Problem, SolverError
from planner.solve.combinatorial.certificate import Certificate, Clock, certify
from planner.solve.combinatorial.milp import Program, solve
from planner.solve.combinatorial.pebbling import shortest_path
from planner.units import format_bytes

__all__ = ["SOLVERS", "ComputeGraph", "Schedule", "cheapest_schedule", "front", "keep_all"]

Flags: TypeAlias = NDArray[np.bool_]

SOLVERS = ("search", "ilp")
_GREED = 4.0  # of the search for some schedule, where time has run out
_GREEDY_S = 1.0

_EXACT = 1e-9  # relative: memory beyond a limit by less is rounding
_NARROWING = 1e-5  # of a limit that an answer has stretched: ten times the solvers' tolerance


@dataclass(frozen=True, slots=True, eq=False)
class ComputeGraph:
    """Nodes in an order in which they can be computed.

    Attributes:
        names: of the nodes.
        time_s: of computing each.
        memory_bytes: of what each leaves.
        reads: per node, earlier nodes whose results it needs.
        in_place: nodes that may write over what they read last.
        boundary: the first node behind the point where another part of a model runs in between (backward begins);
            what is kept there is a schedule's ``kept_bytes``. 0: there is none.
        constant_bytes: held throughout.
    """

    names: Sequence[str]
    time_s: Sequence[float]
    memory_bytes: Sequence[float]
    reads: Sequence[tuple[int, ...]]
    in_place: frozenset[int] = frozenset()
    boundary: int = 0
    constant_bytes: float = 0.0

    def __len__(self) -> int:
        return len(self.names)

    @property
    def once_s(self) -> float:
        """Seconds of computing every node once."""
        return float(sum(self.time_s))


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """What is computed in every stage and kept at its beginning: squares of (stage, node).

    Attributes:
        computed: nodes that a stage computes, its own included.
        kept: nodes whose results it finds.
        time_s: of all computing; ``recompute_s`` of what is computed again.
        peak_bytes: the most that is held at once.
        kept_bytes: at the boundary.
        again: how often each node is computed again, by name.
        certificate: what is proved of ``time_s``.
    """

    computed: Flags
    kept: Flags
    time_s: float
    recompute_s: float
    peak_bytes: float
    kept_bytes: float
    again: dict[str, int]
    certificate: Certificate | None = field(default=None)


def keep_all(graph: ComputeGraph) -> Schedule:
    """The schedule that computes nothing twice and keeps every result as long as it is read."""
    n = len(graph)
    last = [max((j for j in range(n) if i in graph.reads[j]), default=i) for i in range(n)]
    kept = np.array([[i < t <= last[i] for i in range(n)] for t in range(n)])
    return _evaluated(graph, np.eye(n, dtype=bool), kept)


def cheapest_schedule(
    graph: ComputeGraph, *, budget_bytes: float = np.inf, kept_limit_bytes: float = np.inf, solver: str = "search",
    backend: str = "scipy", time_limit_s: float | None = None,
) -> Schedule:  # fmt: skip
    """The schedule of least time within both limits.

    Args:
        graph: what is to be computed.
        budget_bytes: held at once at most.
        kept_limit_bytes: kept at the boundary at most.
        solver: one of :data:`SOLVERS`; both give the same answer.
        backend: of the integer program.
        time_limit_s: after which the best schedule so far is returned with its gap.

    Raises:
        Infeasible: no schedule keeps the limits.
        SolverError: the solver fails, or finds nothing in time.
    """
    if solver not in SOLVERS:
        raise SolverError(Problem("solver", repr(solver), f"one of {', '.join(SOLVERS)}"))
    clock = Clock(time_limit_s)
    plain = keep_all(graph)
    if _within(plain, budget_bytes, kept_limit_bytes):
        return replace(plain, certificate=certify(plain.time_s, graph.once_s, "every node once", clock))
    if solver == "ilp":
        return _by_program(graph, budget_bytes, kept_limit_bytes, backend, clock)
    return _by_search(graph, budget_bytes, kept_limit_bytes, clock)


def _by_search(graph: ComputeGraph, budget_bytes: float, kept_limit_bytes: float, clock: Clock) -> Schedule:
    """Best-first; where time runs out, some schedule of a greedy search with the bound of the exact one."""
    problem = (
        graph.time_s, graph.memory_bytes, graph.reads, graph.in_place, graph.boundary, budget_bytes - graph.constant_bytes,
        kept_limit_bytes,
    )  # fmt: skip
    found = shortest_path(*problem, clock)
    bound_s = found.bound_s
    notes = {"states": found.states}
    if found.stages is None and not found.complete:
        found = shortest_path(*problem, Clock(_GREEDY_S), greed=_GREED)
        if found.stages is None and found.bound_s < np.inf:
            raise SolverError(
                Problem("solver", "no schedule was found in time", try_="Allow more time or memory.")
            )
    if found.stages is None:
        raise _infeasible(graph, keep_all(graph), budget_bytes, kept_limit_bytes)
    n = len(graph)
    computed, kept = np.zeros((n, n), dtype=bool), np.zeros((n, n), dtype=bool)
    for t, (nodes, held) in enumerate(found.stages):
        computed[t, list(nodes)], kept[t, list(held)] = True, True
    schedule = _evaluated(graph, computed, _needed(graph, computed, kept))
    bound = min(graph.once_s + bound_s, schedule.time_s)
    return replace(schedule, certificate=certify(schedule.time_s, bound, "best-first search", clock, notes))


def _needed(graph: ComputeGraph, computed: Flags, kept: Flags) -> Flags:
    """What of the results that a search held was read before it was computed again: the others are dropped."""
    needed = np.zeros_like(kept)
    wanted: set[int] = set()  # results that the stages from here on read before they compute them
    for t in reversed(range(len(graph))):
        read = {i for k in np.flatnonzero(computed[t]).tolist() for i in graph.reads[k]}
        wanted = (wanted | read) - set(np.flatnonzero(computed[t]).tolist())
        needed[t, list(wanted)] = True
    assert not (needed & ~kept).any(), "a schedule reads what it does not hold"
    return needed


def _by_program(
    graph: ComputeGraph, budget_bytes: float, kept_limit_bytes: float, backend: str, clock: Clock
) -> Schedule:  # fmt: skip
    """The integer program; a second time with limits narrowed by the solver's tolerance where an answer has stretched them."""
    bound, narrowed = graph.once_s, 1.0
    for _ in range(2):
        model = _Model(graph, narrowed * budget_bytes, narrowed * kept_limit_bytes)
        answer = solve(model.program, backend=backend, time_limit_s=clock.left_s)
        if narrowed == 1.0:
            bound = max(bound, answer.bound)
        if answer.status == "infeasible":
            raise _infeasible(graph, keep_all(graph), budget_bytes, kept_limit_bytes)
        if not answer.found:
            raise SolverError(
                Problem("solver", f"{answer.solver} found no schedule in time", try_="Allow more time.")
            )
        found = _evaluated(graph, *model.schedule(answer.values))
        if _within(found, budget_bytes, kept_limit_bytes):
            notes = {"variables": model.program.n_variables, "rows": model.program.n_rows}
            value = found.time_s
            return replace(found, certificate=certify(value, min(bound, value), answer.solver, clock, notes))
        narrowed = 1.0 - _NARROWING
    raise SolverError(Problem("solver", "a schedule outside its memory, twice"))


def front(
    graph: ComputeGraph, *, points: int = 8, solver: str = "search", time_limit_s: float | None = None
) -> list[Schedule]:
    """Schedules of least time under falling limits of what is kept at the boundary, each exact unless time ran out.

    Limits fall from everything to nothing in equal steps; schedules that another one beats in both time and memory are left out.
    """
    clock = Clock(time_limit_s)
    found = [cheapest_schedule(graph)]
    step = found[0].kept_bytes / max(points - 1, 1)
    while len(found) < points and found[-1].kept_bytes > 0.0 and not clock.over:
        limit = min(found[0].kept_bytes - step * len(found), found[-1].kept_bytes * (1.0 - _NARROWING))
        try:
            found.append(
                cheapest_schedule(
                    graph, kept_limit_bytes=max(limit, 0.0), solver=solver, time_limit_s=clock.left_s
                )
            )
        except (Infeasible, SolverError):
            break
    return [s for s in found if not any(_beats(other, s) for other in found)]


def _beats(one: Schedule, other: Schedule) -> bool:
    no_worse = one.time_s <= other.time_s and one.kept_bytes <= other.kept_bytes
    return no_worse and (one.time_s < other.time_s or one.kept_bytes < other.kept_bytes)


# -- the program -----------------------------------------------------------------------------------------------------------


class _Model:
    """The integer program of a graph and its limits; memory is in units of the largest tensor."""

    def __init__(self, graph: ComputeGraph, budget_bytes: float, kept_limit_bytes: float) -> None:
        self.graph, self.program = graph, Program()
        n = len(graph)
        self.unit = max(*graph.memory_bytes, 1e-300)
        self.size = [size / self.unit for size in graph.memory_bytes]
        useful = _useful(graph)
        add = self.program.variables
        self.computed = {
            (t, i): int(add([graph.time_s[i]], integer=True)[0])
            for t in range(n)
            for i in range(t + 1)
            if useful[t][i]
        }
        self.kept = {
            (t, i): int(add([0.0], integer=True)[0]) for t in range(n) for i in range(t) if useful[t][i]
        }
        self._flow()
        self._limit_kept(kept_limit_bytes)
        if np.isfinite(budget_bytes):
            self._limit_peak((budget_bytes - graph.constant_bytes) / self.unit)

    def schedule(self, values: NDArray[np.float64]) -> tuple[Flags, Flags]:
        """R and S of an answer."""
        n = len(self.graph)
        computed, kept = np.zeros((n, n), dtype=bool), np.zeros((n, n), dtype=bool)
        for flags, columns in ((computed, self.computed), (kept, self.kept)):
            for where, column in columns.items():
                flags[where] = values[column] > 0.5
        return computed, kept

    def _flow(self) -> None:
        """Every stage computes its own node; what is read is computed in the stage or kept, what is kept was there before."""
        row = self.program.constrain
        for (t, i), column in self.computed.items():
            if t == i:
                row([column], 1.0, low=1.0, high=1.0)
            for source in self.graph.reads[i]:
                there = [
                    c for c in (self.computed.get((t, source)), self.kept.get((t, source))) if c is not None
                ]
                row([column, *there], [1.0] + [-1.0] * len(there), high=0.0)
        for (t, i), column in self.kept.items():
            before = [c for c in (self.computed.get((t - 1, i)), self.kept.get((t - 1, i))) if c is not None]
            row([column, *before], [1.0] + [-1.0] * len(before), high=0.0)

    def _limit_kept(self, limit_bytes: float) -> None:
        kept = {i: column for (t, i), column in self.kept.items() if t == self.graph.boundary}
        if np.isfinite(limit_bytes) and kept:
            sizes = [self.graph.memory_bytes[i] for i in kept]
            self.program.constrain(list(kept.values()), sizes, high=limit_bytes)

    def _limit_peak(self, budget: float) -> None:
        """What is held after every computation of every stage: the paper's U, and FREE with an upper limit per condition."""
        n, row = len(self.graph), self.program.constrain
        readers = [[j for j in range(n) if i in self.graph.reads[j]] for i in range(n)]
        for t in range(n):
            terms = [(column, self.size[i]) for (stage, i), column in self.kept.items() if stage == t]
            for k in range(t + 1):
                if (t, k) not in self.computed:
                    continue
                held = int(self.program.variables([0.0], upper=np.inf)[0])
                column = self.computed[t, k]
                released: list[tuple[int, float]] = []
                for i in {*self.graph.reads[k], k}:
                    later = [self.computed[t, j] for j in readers[i] if j > k and (t, j) in self.computed]
                    hazards = [*later, *([self.kept[t + 1, i]] if (t + 1, i) in self.kept else [])]
                    free = int(self.program.variables([0.0])[0])
                    row([free, column], [1.0, -1.0], high=0.0)
                    for hazard in hazards:
                        row([free, hazard], 1.0, high=1.0)
                    released.append((free, self.size[i]))
                # held = before + computed; the budget holds before anything is released, unless it is overwritten.
                row(
                    [held, column, *(c for c, _ in terms)],
                    [1.0, -self.size[k], *(-s for _, s in terms)],
                    low=0.0,
                    high=0.0,
                )
                inputs = released if k in self.graph.in_place else []
                overwritten = [
                    (c, s) for (c, s), i in zip(inputs, {*self.graph.reads[k], k}, strict=False) if i != k
                ]
                row([held, *(c for c, _ in overwritten)], [1.0, *(-s for _, s in overwritten)], high=budget)
                terms = [(held, 1.0), *((c, -s) for c, s in released)]
            if terms and (t, t) not in self.computed:
                row([c for c, _ in terms], [s for _, s in terms], high=budget)


def _useful(graph: ComputeGraph) -> list[list[bool]]:
    """Per stage and node, whether the node leads to one that is not computed before the stage."""
    n = len(graph)
    latest = list(range(n))  # the last node that needs this one, directly or not
    for j in reversed(range(n)):
        for i in graph.reads[j]:
            latest[i] = max(latest[i], latest[j])
    return [[latest[i] >= t for i in range(n)] for t in range(n)]


# -- schedules ---------------------------------------------------------------------------------------------------------------


def _evaluated(graph: ComputeGraph, computed: Flags, kept: Flags) -> Schedule:
    """Time and memory of a schedule, by going through it."""
    n, size = len(graph), np.asarray(graph.memory_bytes, dtype=float)
    peak = 0.0
    for t in range(n):
        live = set(np.flatnonzero(kept[t]).tolist())
        after = set(np.flatnonzero(kept[t + 1]).tolist()) if t + 1 < n else set()
        peak = max(peak, float(size[list(live)].sum()))
        todo = np.flatnonzero(computed[t]).tolist()
        for position, k in enumerate(todo):
            read_later = {i for j in todo[position + 1 :] for i in graph.reads[j]}
            released = {i for i in {*graph.reads[k], k} if i not in read_later and i not in after}
            live.add(k)
            holding = live - (released - {k} if k in graph.in_place else set())
            peak = max(peak, float(size[list(holding)].sum()))
            live -= released
    counts = computed.sum(axis=0)
    again = {name: int(count) - 1 for name, count in zip(graph.names, counts, strict=True) if count > 1}
    time_s = float(np.dot(counts, graph.time_s))
    kept_bytes = float(size[kept[graph.boundary]].sum()) if graph.boundary else 0.0
    recompute_s = float(np.dot(counts - 1, graph.time_s))
    return Schedule(computed, kept, time_s, recompute_s, peak + graph.constant_bytes, kept_bytes, again)


def _within(schedule: Schedule, budget_bytes: float, kept_limit_bytes: float) -> bool:
    slack = 1.0 + _EXACT
    return schedule.peak_bytes <= slack * budget_bytes and schedule.kept_bytes <= slack * kept_limit_bytes


def _infeasible(
    graph: ComputeGraph, plain: Schedule, budget_bytes: float, kept_limit_bytes: float
) -> Infeasible:
    single = max(
        graph.memory_bytes[k] + sum(graph.memory_bytes[i] for i in graph.reads[k] if k not in graph.in_place)
        for k in range(len(graph))
    )
    limit = (
        f"{format_bytes(budget_bytes)}"
        if np.isfinite(budget_bytes)
        else f"{format_bytes(kept_limit_bytes)} kept"
    )
    return Infeasible(
        Problem(
            "memory", f"no schedule stays within {limit}",
            f"between {format_bytes(single + graph.constant_bytes)}, which one node needs, and "
            f"{format_bytes(plain.peak_bytes)}, with which nothing is computed twice",
        )
    )  # fmt: skip
