"""The same inner problem by other means: dynamic programming, integer programming and enumeration.

They answer what :func:`planner.solve.layerwise.counts.solve` answers, to 1e-9; tests hold them against each other, and
``--solver`` chooses among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from planner.errors import Problem, SolverError
from planner.ledger import Array
from planner.solve.layerwise.counts import SLACK, CountProblem, Counts, Group, OutOfNodesError, solve

__all__ = [
    "SOLVERS",
    "Solver",
    "automatic",
    "by_brute_force",
    "by_dynamic_programming",
    "by_highs",
    "proved",
]

Answer = tuple[float, Counts] | None
Solver = Callable[[CountProblem], Answer]

_MOST_COUNTS = 5_000_000  # that enumeration is willing to look at
_MARGINS = (
    0.0,
    2e-6,
    2e-5,
)  # by which budgets are lowered, where the solver takes their violation for rounding
_FEW_NODES = 10  # of the integer program
_PROOF_NODES = 100  # of the same, for a bound alone
_MOST_STATES = 20_000  # that the dynamic program is willing to hold


def automatic(problem: CountProblem, tolerance: float = 0.0) -> Answer:
    """Branch and bound; the integer program where that grows too large.

    With a ``tolerance``, for a search that states its gap anyway: what the tree has found until then, or else what a few nodes of
    the integer program find. Nodes are counted and not seconds, so that the answer is the same every time.
    """
    try:
        return solve(problem, tolerance=tolerance)
    except OutOfNodesError as stop:
        if not tolerance:
            return by_highs(problem)
        if stop.best is not None:
            return stop.best
        found, fits = _by_highs(problem, tolerance, _MARGINS[1], _FEW_NODES)
        return found if fits else None


def proved(problem: CountProblem, under: float, tolerance: float) -> float:
    """What no counts undercut, to a tolerance; or that they are not below ``under``. Where the tree grows too large, what the
    integer program has proved after some nodes."""
    try:
        found = solve(problem, under / (1.0 - tolerance), tolerance)
    except OutOfNodesError as stop:
        return max(stop.bound, _Program.of(problem, 0.0).bound(_PROOF_NODES))
    return under if found is None else found[0] * (1.0 - tolerance)


def by_brute_force(problem: CountProblem) -> Answer:
    """Every count of every group.

    Raises:
        SolverError: there are more than five million.
    """
    from math import comb, prod

    many = prod(comb(g.size + g.cost.shape[1] - 1, g.size) for g in problem.groups)
    if many > _MOST_COUNTS:
        raise SolverError(
            Problem("--solver brute", f"{many:,} counts", f"at most {_MOST_COUNTS:,}", "Use --solver auto.")
        )
    best: Answer = None
    for counts in _all_counts(problem.groups):
        if problem.fits(counts):
            value = problem.value(counts)
            if best is None or value < best[0]:
                best = (value, counts)
    return best


def by_dynamic_programming(problem: CountProblem) -> Answer:
    """Pareto-optimal (costs, bytes, classes in use) of more and more layers, with nothing rounded.

    A state is dominated by one with the same classes and no more of any cost or byte. Strategies of a group are added in turn,
    so that counts, and not sequences, are enumerated.

    Raises:
        SolverError: more than twenty thousand states are open at once.
    """
    functions = len(problem.offset)
    room = problem.budget + SLACK * np.abs(problem.budget)
    states: _States = {
        frozenset(): [(np.concatenate([problem.offset, np.zeros(len(room))]), ())],
    }
    for group in problem.groups:
        columns = np.concatenate([group.cost, group.held]).T
        partial: dict[int, _States] = {group.size: states}
        for s in range(len(columns)):
            following: dict[int, _States] = {}
            for left, reached in partial.items():
                counts = range(left + 1) if s < len(columns) - 1 else range(left, left + 1)
                for n in counts:
                    for classes, vectors in reached.items():
                        used = classes | {group.classes[s]} if n and group.classes else classes
                        into = following.setdefault(left - n, {}).setdefault(used, [])
                        for vector, taken in vectors:
                            total = vector + n * columns[s]
                            if np.all(total[functions:] <= room):
                                into.append((total, (*taken, n)))
            many = sum(len(vectors) for reached in following.values() for vectors in reached.values())
            if many > _MOST_STATES:
                found = f"{many:,} states"
                raise SolverError(
                    Problem("--solver dp", found, f"at most {_MOST_STATES:,}", "Use --solver auto.")
                )
            partial = {left: _undominated(reached) for left, reached in following.items()}
        states = partial.get(0, {})
    best: Answer = None
    for vectors in states.values():
        for _, taken in vectors:
            counts_ = _split(problem.groups, taken)
            value = problem.value(counts_)
            if best is None or value < best[0]:
                best = (value, counts_)
    return best


def by_highs(problem: CountProblem, tolerance: float = 0.0) -> Answer:
    """The integer program, through ``scipy.optimize.milp`` (HiGHS).

    HiGHS stops at the tolerance as relative gap (its default is 1e-4), and accepts violations of 1e-6 of a row, so that rows are
    scaled to 1 and the answer is checked. Where its counts exceed a budget by less than that, budgets lower by as much keep
    the next answer within.

    Raises:
        SolverError: HiGHS gives up, or no answer of its fits.
    """
    for margin in _MARGINS:
        answer, fits = _by_highs(problem, tolerance, margin)
        if fits:
            return answer
    raise SolverError(
        Problem(
            "--solver ilp", "the solver's answer exceeds a budget", "counts that fit", "Use --solver auto."
        )
    )


def _by_highs(
    problem: CountProblem, tolerance: float, margin: float, nodes: int | None = None
) -> tuple[Answer, bool]:
    """HiGHS's answer under budgets lower by a margin, and whether it keeps them; with a limit on its nodes, perhaps none."""
    done = _Program.of(problem, margin).solve(tolerance, nodes)
    if done.status == 2:
        return None, True
    if done.x is None and nodes is not None:
        return None, True
    if done.x is None:
        raise SolverError(
            Problem("--solver ilp", f"HiGHS: {done.message}", "a solution", "Use --solver auto.")
        )
    counts = _split(problem.groups, tuple(round(float(v)) for v in done.x))
    return (problem.value(counts), counts), problem.fits(counts)


SOLVERS: Mapping[str, Solver] = {
    "auto": automatic,
    "dp": by_dynamic_programming,
    "ilp": by_highs,
    "brute": by_brute_force,
}
"""What ``--solver`` takes."""


# -- details ---------------------------------------------------------------------------------------------------------

_States = dict[frozenset[int], list[tuple[Array, tuple[int, ...]]]]


def _all_counts(groups: tuple[Group, ...]) -> Iterator[Counts]:
    if not groups:
        yield ()
        return
    strategies = groups[0].cost.shape[1]
    for bars in combinations(range(groups[0].size + strategies - 1), strategies - 1):
        ends = (-1, *bars, groups[0].size + strategies - 1)
        mine = tuple(b - a - 1 for a, b in pairwise(ends))
        for rest in _all_counts(groups[1:]):
            yield (mine, *rest)


def _undominated(reached: _States) -> _States:
    return {classes: _front(vectors) for classes, vectors in reached.items() if vectors}


def _front(vectors: list[tuple[Array, tuple[int, ...]]]) -> list[tuple[Array, tuple[int, ...]]]:
    values = np.array([vector for vector, _ in vectors])
    kept: list[int] = []
    for i in np.lexsort(values.T[::-1]).tolist():
        if not kept or not np.any(np.all(values[kept] <= values[i], axis=1)):
            kept.append(i)
    return [vectors[i] for i in kept]


def _split(groups: tuple[Group, ...], taken: tuple[int, ...]) -> Counts:
    counts, start = [], 0
    for group in groups:
        width = group.cost.shape[1]
        counts.append(taken[start : start + width])
        start += width
    return tuple(counts)


class _Program:
    """``min z + switch·(Σ used − 1)`` with a column per (group, strategy), per class, and z; rows scaled to about 1."""

    def __init__(
        self,
        matrix: Array,
        low: Array,
        high: Array,
        ceiling: Array,
        classes: int,
        switch: float,
        scale: float,
    ) -> None:
        self.scale = scale
        self.matrix, self.low, self.high, self.ceiling = matrix, low, high, ceiling
        width = matrix.shape[1]
        self.objective = np.zeros(width)
        self.objective[width - 1 - classes : width - 1] = switch
        self.objective[-1] = 1.0
        self.floor = np.zeros(width)
        self.floor[-1] = -np.inf

    def solve(self, tolerance: float, nodes: int | None) -> Any:
        """What HiGHS makes of it; stopped after some nodes, if there is a limit."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]

        rows = [LinearConstraint(self.matrix, self.low, self.high)] if len(self.matrix) else []
        integrality = np.ones(len(self.objective))
        integrality[-1] = 0
        return milp(
            self.objective,
            constraints=rows,
            integrality=integrality,
            bounds=Bounds(self.floor, self.ceiling),
            options={"mip_rel_gap": tolerance} | ({} if nodes is None else {"node_limit": nodes}),
        )

    def bound(self, nodes: int) -> float:
        """What HiGHS proves within some nodes, in the problem's unit; infinite where nothing fits."""
        done = self.solve(0.0, nodes)
        if done.status == 2:
            return np.inf
        return -np.inf if done.mip_dual_bound is None else float(done.mip_dual_bound) * self.scale

    @staticmethod
    def of(problem: CountProblem, margin: float) -> _Program:
        """The integer program of a problem, costs in units of the largest one, budgets lower by a relative margin."""
        groups = problem.groups
        width = sum(g.cost.shape[1] for g in groups)
        scale = _scale(problem)
        names = sorted({c for g in groups for c in g.classes}) if problem.switch else []
        cost = np.concatenate([g.cost for g in groups], axis=1) / scale
        held = np.concatenate([g.held for g in groups], axis=1)
        rows, low, high = [], [], []
        for f, line in enumerate(cost):
            rows.append([*line, *(0.0 for _ in names), -1.0])
            low.append(-np.inf)
            high.append(-float(problem.offset[f]) / scale)
        for d, line in enumerate(held):
            unit = max(float(np.abs(line).max()), abs(float(problem.budget[d])), 1e-300)
            rows.append([*(line / unit), *(0.0 for _ in names), 0.0])
            low.append(-np.inf)
            high.append(float(problem.budget[d] + (SLACK - margin) * abs(problem.budget[d])) / unit)
        start, ceiling = 0, []
        for group in groups:
            strategies = group.cost.shape[1]
            row = np.zeros(width + len(names) + 1)
            row[start : start + strategies] = 1.0
            rows.append(row.tolist())
            low.append(float(group.size))
            high.append(float(group.size))
            ceiling += [float(group.size)] * strategies
            for s in range(strategies) if names else ():
                row = np.zeros(width + len(names) + 1)
                row[start + s], row[width + names.index(group.classes[s])] = 1.0, -float(group.size)
                rows.append(row.tolist())
                low.append(-np.inf)
                high.append(0.0)
            start += strategies
        ceilings = np.array([*ceiling, *(1.0 for _ in names), np.inf])
        return _Program(
            np.array(rows), np.array(low), np.array(high), ceilings, len(names), problem.switch / scale, scale
        )


def _scale(problem: CountProblem) -> float:
    largest = max(float(np.abs(g.cost).max()) for g in problem.groups)
    return max(largest, 1e-300)
