"""One choice per node of a graph, at the least time within a memory budget: Alpa's intra-operator problem.

``min Σ time[i][x_i] + Σ edge[i, j][x_i, x_j]  subject to  Σ memory[i][x_i] <= budget``. Solved in this order, each step
exact:

1. choices that another one beats whatever their neighbours choose are dropped (Goldstein's dead-end elimination);
2. all variables are eliminated with memory priced at λ seconds per byte; λ = 0 answers where memory does not bind, and
   the best λ gives the Lagrangian bound and an answer within the budget;
3. where a gap is left between the two, variables are eliminated once more, with fronts of time and memory for entries;
4. should those be too many, the integer program gets the choices whose min-marginal at λ is not above that answer.

Elimination needs tables over a node and its neighbours at the time; where the graph is so dense that one of them would be
too large, the integer program follows on the first step. Graphs of transformers leave tables of three nodes.

Sources: L. Zheng et al. 2022 (Alpa, arXiv:2201.12023) §4.2 for the program and its one-hot edges; R. F. Goldstein,
Biophysical Journal 66, 1994; A. M. Geoffrion, Mathematical Programming Study 2, 1974, for the Lagrangian bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.errors import Infeasible, Problem, SolverError
from planner.solve.combinatorial.certificate import Certificate, Clock, certify
from planner.solve.combinatorial.elimination import MOST_ENTRIES, Elimination, eliminate, order
from planner.solve.combinatorial.labels import TooMany, within_budget
from planner.solve.combinatorial.milp import Program, solve
from planner.units import format_bytes

__all__ = ["Assignment", "ChoiceGraph", "cheapest_alone", "minimise"]

Floats: TypeAlias = NDArray[np.float64]
Edges: TypeAlias = Mapping[tuple[int, int], Floats]

_ELIMINATION = "variable elimination"
_FIRST_WINDOW = 1.0 / 64.0  # of the gap between the bound and the first answer
_SLACK = 1e-9  # relative: sums in another order differ by rounding


@dataclass(frozen=True, slots=True, eq=False)
class ChoiceGraph:
    """Nodes with priced choices, and edges with priced pairs of choices.

    Attributes:
        names: of the nodes.
        time_s: per node, of each of its choices.
        memory_bytes: per node, of each of its choices.
        edges: seconds of every pair of choices of two nodes; the first is the lower number.
        budget_bytes: what all nodes together may hold.
    """

    names: Sequence[str]
    time_s: Sequence[Floats]
    memory_bytes: Sequence[Floats]
    edges: Edges
    budget_bytes: float = np.inf

    def seconds(self, choice: Sequence[int]) -> float:
        """What an assignment takes."""
        nodes = sum(float(cost[x]) for cost, x in zip(self.time_s, choice, strict=True))
        return nodes + sum(float(table[choice[i], choice[j]]) for (i, j), table in self.edges.items())

    def held_bytes(self, choice: Sequence[int]) -> float:
        """What an assignment holds."""
        return sum(float(held[x]) for held, x in zip(self.memory_bytes, choice, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """The choice of every node, what it takes and holds, and what is proved of it."""

    choice: tuple[int, ...]
    time_s: float
    memory_bytes: float
    certificate: Certificate


def minimise(
    graph: ChoiceGraph, *, elimination: bool = True, backend: str = "scipy", time_limit_s: float | None = None
) -> Assignment:
    """The fastest assignment within the budget.

    Args:
        graph: the priced problem.
        elimination: whether variables are eliminated; False gives the whole problem to the integer program.
        backend: of the integer program.
        time_limit_s: after which the best answer so far is returned with its gap.

    Raises:
        Infeasible: every assignment holds more than the budget.
        SolverError: the integer program fails, or finds nothing in time.
    """
    clock = Clock(time_limit_s)
    least = sum(float(held.min()) for held in graph.memory_bytes)
    if least > graph.budget_bytes:
        raise Infeasible(
            Problem(
                "memory", f"the smallest assignment holds {format_bytes(least)}",
                f"at most {format_bytes(graph.budget_bytes)}", "Use more devices, or a larger budget.",
            )
        )  # fmt: skip
    if not elimination:
        kept = [np.arange(len(cost)) for cost in graph.time_s]
        return _by_program(graph, graph, kept, None, -np.inf, clock, backend, {})
    kept, dropped = _undominated(graph)
    few = _restricted(graph, kept)
    notes = {"choices": sum(map(len, graph.time_s)), "choices dominated": dropped}
    _, entries = order([len(cost) for cost in few.time_s], few.edges)
    if entries > MOST_ENTRIES:
        return _by_program(graph, few, kept, None, -np.inf, clock, backend, notes)
    return _by_elimination(graph, few, kept, clock, backend, notes)


def cheapest_alone(graph: ChoiceGraph) -> tuple[int, ...]:
    """The fastest choice of every node by itself, blind to edges and memory: what a planner without a solver would take."""
    return tuple(int(np.argmin(cost)) for cost in graph.time_s)


# -- elimination and the Lagrangian bound --------------------------------------------------------------------------------


def _by_elimination(
    graph: ChoiceGraph,
    few: ChoiceGraph,
    kept: list[NDArray[np.intp]],
    clock: Clock,
    backend: str,
    notes: dict[str, int],
) -> Assignment:
    """Elimination at the best price of memory; then the integer program, if a gap is left."""
    free = _priced(few, 0.0)
    if few.held_bytes(free.choice) <= graph.budget_bytes:
        return _answer(graph, kept, free.choice, free.value, _ELIMINATION, clock, notes)
    # The end with the least memory, the fastest of its kind: within the budget, as has been checked.
    small: Sequence[int] = eliminate([held.astype(float) for held in few.memory_bytes], {}).choice
    inside, outside = small, free.choice
    relaxed = free
    bound, rate = free.value, 0.0
    while not clock.over:
        rate_next = _slope(few, inside, outside)
        found = _priced(few, rate_next)
        value = found.value - rate_next * graph.budget_bytes
        if value > bound:
            bound, rate, relaxed = value, rate_next, found
        on_line = few.seconds(inside) + rate_next * few.held_bytes(inside)
        if found.value >= on_line - _SLACK * abs(on_line):
            break
        if few.held_bytes(found.choice) <= graph.budget_bytes:
            inside = found.choice
        else:
            outside = found.choice
    value = few.seconds(inside)
    if value - bound <= _SLACK * abs(value) or clock.over:
        return _answer(graph, kept, inside, bound, f"{_ELIMINATION}, Lagrangian bound", clock, notes)
    inside, proved = _widening(few, relaxed, rate, inside, clock)
    if proved:
        return _answer(graph, kept, inside, few.seconds(inside), f"{_ELIMINATION} with fronts", clock, notes)
    if clock.over:
        return _answer(graph, kept, inside, bound, f"{_ELIMINATION}, Lagrangian bound", clock, notes)
    return _pruned_program(graph, few, kept, inside, relaxed, rate, bound, clock, backend, notes)


def _widening(
    graph: ChoiceGraph, relaxed: Elimination, rate: float, known: Sequence[int], clock: Clock
) -> tuple[Sequence[int], bool]:
    """The best answer within the budget, and whether it is proved to be; sought in ever wider windows above the bound.

    A window keeps the answers whose time plus priced memory lie in it. The best answer lies in one as wide as any known answer's
    time is above the bound, so the last window is that of the best answer found in those before it, and few labels are in it.
    """
    lift = rate * graph.budget_bytes
    width = (graph.seconds(known) + lift - relaxed.value) * _FIRST_WINDOW
    while not clock.over:
        limit = min(relaxed.value + width, graph.seconds(known) + lift)
        try:
            found = within_budget(
                relaxed, rate, limit, graph.time_s, graph.memory_bytes, graph.edges, graph.budget_bytes, clock
            )
        except TooMany:
            break
        if found is not None and graph.seconds(found) < graph.seconds(known):
            known = found
        if limit >= graph.seconds(known) + lift:
            return known, True
        width *= 2.0
        if found is not None:
            width = max(width, graph.seconds(known) + lift - relaxed.value)
    return known, False


def _pruned_program(
    graph: ChoiceGraph, few: ChoiceGraph, kept: list[NDArray[np.intp]], inside: Sequence[int], relaxed: Elimination,
    rate: float, bound: float, clock: Clock, backend: str, notes: dict[str, int],
) -> Assignment:  # fmt: skip
    """The integer program without the choices that no answer as good as the known one can use."""
    limit = graph.budget_bytes * rate + few.seconds(inside)
    within = [np.flatnonzero(m <= limit + _SLACK * abs(limit)) for m in relaxed.marginals()]
    notes = notes | {
        "choices above the bound": sum(len(c) - len(w) for c, w in zip(few.time_s, within, strict=True))
    }
    rest = [at[choices] for at, choices in zip(kept, within, strict=True)]
    known = [int(np.searchsorted(w, x)) for w, x in zip(within, inside, strict=True)]
    return _by_program(graph, _restricted(few, within), rest, known, bound, clock, backend, notes)


def _priced(graph: ChoiceGraph, s_per_byte: float) -> Elimination:
    """The best assignment where every byte costs so many seconds."""
    costs = [cost + s_per_byte * held for cost, held in zip(graph.time_s, graph.memory_bytes, strict=True)]
    return eliminate(costs, graph.edges)


def _slope(graph: ChoiceGraph, inside: Sequence[int], outside: Sequence[int]) -> float:
    """Seconds per byte at which both assignments cost the same."""
    saved_s = graph.seconds(inside) - graph.seconds(outside)
    return saved_s / (graph.held_bytes(outside) - graph.held_bytes(inside))


def _undominated(graph: ChoiceGraph) -> tuple[list[NDArray[np.intp]], int]:
    """Choices that no other one of their node beats for every choice of the neighbours, holding no more; and how many went.

    Of choices that are equal in everything the first is kept.
    """
    around: list[list[Floats]] = [[] for _ in graph.names]
    for (i, j), table in graph.edges.items():
        around[i].append(table)
        around[j].append(table.T)
    kept, dropped = [], 0
    for cost, held, tables in zip(graph.time_s, graph.memory_bytes, around, strict=True):
        # worst[a, b]: by how much a can at most be better than b.
        worst = cost[None, :] - cost[:, None]
        for table in tables:
            worst = worst + (table[None, :, :] - table[:, None, :]).max(axis=2)
        beats = (worst <= 0.0).T & (
            held[:, None] <= held[None, :]
        )  # [b, a]: b is never slower nor larger than a
        np.fill_diagonal(beats, False)
        equal = beats & beats.T
        loses = (beats & ~(equal & (np.arange(len(cost))[:, None] > np.arange(len(cost))[None, :]))).any(
            axis=0
        )
        kept.append(np.flatnonzero(~loses))
        dropped += int(loses.sum())
    return kept, dropped


def _restricted(graph: ChoiceGraph, kept: Sequence[NDArray[np.intp]]) -> ChoiceGraph:
    """The graph with some of its choices."""
    return ChoiceGraph(
        graph.names,
        [cost[at] for cost, at in zip(graph.time_s, kept, strict=True)],
        [held[at] for held, at in zip(graph.memory_bytes, kept, strict=True)],
        {(i, j): table[np.ix_(kept[i], kept[j])] for (i, j), table in graph.edges.items()},
        graph.budget_bytes,
    )


# -- the integer program -------------------------------------------------------------------------------------------------


def _by_program(
    graph: ChoiceGraph, few: ChoiceGraph, kept: Sequence[NDArray[np.intp]], known: Sequence[int] | None, bound: float,
    clock: Clock, backend: str, notes: dict[str, int],
) -> Assignment:  # fmt: skip
    """The integer program on what is left of the choices; ``known`` is an answer, ``bound`` what no answer is faster than."""
    program = Program()
    nodes = [program.variables(cost, integer=True) for cost in few.time_s]
    for columns in nodes:
        program.constrain(columns, 1.0, low=1.0, high=1.0)
    for (i, j), table in few.edges.items():
        pairs = program.variables(table)
        for lines, ends in ((pairs, nodes[i]), (pairs.T, nodes[j])):
            coefficients = np.concatenate([np.ones(lines.shape[1]), [-1.0]])
            program.constrain(np.column_stack([lines, ends]), coefficients, low=0.0, high=0.0)
    if np.isfinite(graph.budget_bytes):
        program.constrain(np.concatenate(nodes), np.concatenate(few.memory_bytes), high=graph.budget_bytes)
    found = solve(program, backend=backend, time_limit_s=clock.left_s)
    notes = notes | {"integer variables": sum(map(len, nodes)), "rows": program.n_rows}
    best = known
    if found.found:
        choice = [int(np.argmax(found.values[columns])) for columns in nodes]
        if known is None or few.seconds(choice) < few.seconds(known):
            best = choice
    if best is None:
        limit = "in time" if found.status == "unknown" else f"({found.status})"
        raise SolverError(
            Problem("solver", f"{found.solver} found no assignment {limit}", try_="Allow more time.")
        )
    return _answer(graph, kept, best, max(bound, found.bound), found.solver, clock, notes)


def _answer(
    graph: ChoiceGraph, kept: Sequence[NDArray[np.intp]], choice: Sequence[int], bound: float, solver: str, clock: Clock,
    notes: dict[str, int],
) -> Assignment:  # fmt: skip
    """An assignment of the whole graph, evaluated in it."""
    whole = tuple(int(at[x]) for at, x in zip(kept, choice, strict=True))
    value = graph.seconds(whole)
    return Assignment(
        whole, value, graph.held_bytes(whole), certify(value, min(bound, value), solver, clock, notes)
    )
