"""Counts of layers per strategy: four solvers, one answer; and the published formulations that they replace."""

from dataclasses import replace

import numpy as np
import pytest

from planner.errors import SolverError
from planner.solve.layerwise.alpa import descended, enumerated
from planner.solve.layerwise.counts import CountProblem, Group, bound, solve
from planner.solve.layerwise.duals import Cells, dual_s
from planner.solve.layerwise.galvatron import galvatron
from planner.solve.layerwise.linear import relaxed
from planner.solve.layerwise.planes import Planes, Ranges
from planner.solve.layerwise.solvers import SOLVERS, by_brute_force, by_dynamic_programming, proved
from planner.solve.layerwise.stages import Line, cut, line_cost, smallest_limit

INSTANCES = 1000
AGREE = 1e-9


def random_problem(draw: np.random.Generator) -> CountProblem:
    """A few groups under a few budgets: costs that fall as bytes grow, whole numbers (ties) in a third of the cases."""
    functions, budgets = (int(n) for n in draw.integers(1, 4, 2))
    switch = float(draw.uniform(0.0, 3.0)) if draw.random() < 0.4 else 0.0
    groups = []
    for _ in range(draw.integers(1, 3)):
        strategies, size = int(draw.integers(1, 6)), int(draw.integers(1, 7))
        held = draw.uniform(1.0, 10.0, (budgets, strategies))
        cost = 0.3 * draw.uniform(1.0, 10.0, (functions, strategies)) + 10.0 / held[:1]
        if draw.random() < 0.3:
            held, cost = np.round(held), np.round(cost)
        classes = tuple(draw.integers(0, 3, strategies).tolist()) if switch else ()
        groups.append(Group(size, cost, held, classes))
    layers = sum(group.size for group in groups)
    budget = draw.uniform(4.0, 9.0, budgets) * layers
    return CountProblem(tuple(groups), budget, draw.uniform(0.0, 5.0, functions), switch)


@pytest.mark.slow
def test_all_solvers_agree_on_random_problems():
    draw = np.random.default_rng(20260)
    infeasible = 0
    for _ in range(INSTANCES):
        problem = random_problem(draw)
        answers = {name: solver(problem) for name, solver in SOLVERS.items()}
        found = [answer for answer in answers.values() if answer is not None]
        assert len(found) in (0, len(answers)), answers
        infeasible += not found
        for value, counts in found:
            assert problem.fits(counts)
            assert problem.value(counts) == pytest.approx(value, abs=AGREE)
            assert value == pytest.approx(found[0][0], abs=AGREE), answers
            assert bound(problem) <= value + AGREE
    assert 0 < infeasible < INSTANCES / 2


def test_a_tolerance_is_kept():
    draw = np.random.default_rng(3)
    for _ in range(50):
        problem = random_problem(draw)
        exact, near = solve(problem), solve(problem, tolerance=0.05)
        assert (exact is None) == (near is None)
        if exact is not None:
            assert exact[0] - AGREE <= near[0] <= exact[0] * 1.05 / 0.95 + AGREE


def test_large_problems_are_refused_by_what_cannot_solve_them():
    many = Group(80, np.ones((1, 24)), np.ones((1, 24)))
    with pytest.raises(SolverError, match="counts"):
        by_brute_force(CountProblem((many,), np.array([100.0]), np.zeros(1)))


def test_counts_are_never_worse_than_galvatrons_chain():
    """In its own units both find the same; between units its rounding loses, by hand: 10 layers of 1.4 units in a budget of 14.

    Rounded up, a layer holds 2 units, so that only 4 of the 10 may be fast beside 6 that hold 1; in truth all 10 fit.
    """
    draw = np.random.default_rng(11)
    for _ in range(20):
        strategies, layers = int(draw.integers(2, 6)), int(draw.integers(2, 12))
        held = draw.integers(1, 12, strategies).astype(float)
        cost = draw.uniform(1.0, 3.0, strategies) + 5.0 / held
        classes = draw.integers(0, 2, strategies)
        switch = 0.7 * (classes[:, None] != classes[None, :])
        budget = float(draw.integers(3, 10) * layers)
        group = Group(layers, cost[None], held[None], tuple(classes.tolist()))
        ours = solve(CountProblem((group,), np.array([budget]), np.zeros(1), 0.7))
        theirs = galvatron(cost, held, switch, layers, budget, 1.0)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours[0] == pytest.approx(theirs[0], abs=AGREE)
    cost, held = np.array([1.0, 2.0]), np.array([1.4, 1.0])
    assert galvatron(cost, held, np.zeros((2, 2)), 10, 14.0, 1.0)[0] == pytest.approx(4 * 1.0 + 6 * 2.0)
    exact = solve(CountProblem((Group(10, cost[None], held[None]),), np.array([14.0]), np.zeros(1)))
    assert exact[0] == pytest.approx(10.0)


def stage_costs(draw: np.random.Generator, layers: int, meshes: list[int]) -> np.ndarray:
    sums = np.concatenate([[0.0], np.cumsum(draw.uniform(0.9, 1.1, layers))])
    cost = np.full((layers, layers, len(meshes)), np.inf)
    for i in range(layers):
        for j in range(i, layers):
            cost[i, j] = (
                (sums[j + 1] - sums[i]) / np.array(meshes) ** 0.9 * draw.uniform(1.0, 1.1, len(meshes))
            )
    return cost


def test_descending_limits_find_alpas_optimum():
    draw = np.random.default_rng(5)
    for layers, total in ((4, 4), (6, 8), (8, 8)):
        meshes = [n for n in (1, 2, 4, 8) if n <= total]
        for micro_batches in (1, 4, 64):
            cost = stage_costs(draw, layers, meshes)
            ours, theirs = (f(cost, meshes, total, micro_batches) for f in (descended, enumerated))
            assert ours.seconds == pytest.approx(theirs.seconds, rel=1e-12)
            assert sum(meshes[n] for _, _, n in ours.stages) == total
            assert [a for a, _, _ in ours.stages[1:]] == [b for _, b, _ in ours.stages[:-1]]


def test_the_dual_is_the_linear_relaxation():
    """Tangents find what walking down the hulls does, group by group; devices side by side as each alone."""
    draw = np.random.default_rng(5)
    for _ in range(100):
        strategies, kinds = int(draw.integers(1, 12)), int(draw.integers(1, 4))
        cost, held = draw.uniform(1.0, 5.0, (strategies, kinds)), draw.uniform(1.0, 9.0, (strategies, kinds))
        size = draw.integers(1, 9, kinds)
        rooms = draw.uniform(1.0, 9.0, 3) * size.sum()
        groups = tuple(Group(int(n), cost[None, :, k], held[None, :, k]) for k, n in enumerate(size))
        expected = [bound(CountProblem(groups, np.array([room]), np.zeros(1))) for room in rooms]
        once = np.ones(3 * kinds)
        cells = Cells(
            np.repeat(np.arange(3), kinds), np.tile(np.arange(kinds), 3), np.tile(size, 3), once, once, once
        )
        found, _ = dual_s(np.tile(cost, 3), np.tile(held, 3), cells, rooms)
        assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_the_relaxation_is_that_of_linear_programming():
    """HiGHS's simplex method solves the same program; where it finds none, neither do we."""
    from scipy.optimize import linprog

    draw = np.random.default_rng(7)
    infeasible = 0
    for _ in range(200):
        problem = random_problem(draw)
        groups, functions = problem.groups, len(problem.offset)
        cost, held = ([getattr(group, name) for group in groups] for name in ("cost", "held"))
        sizes = [group.size for group in groups]
        found = relaxed(sizes, cost, held, problem.offset, problem.budget)
        width = sum(c.shape[1] for c in cost)
        above = np.hstack([np.concatenate(cost, axis=1), -np.ones((functions, 1))])
        within = np.hstack([np.concatenate(held, axis=1), np.zeros((len(problem.budget), 1))])
        of_group = (
            np.repeat(np.arange(len(groups)), [c.shape[1] for c in cost]) == np.arange(len(groups))[:, None]
        )
        expected = linprog(
            np.eye(width + 1)[-1], np.vstack([above, within]), np.concatenate([-problem.offset, problem.budget]),
            np.hstack([of_group, np.zeros((len(groups), 1))]), sizes, [(0, None)] * width + [(None, None)],
        )  # fmt: skip
        infeasible += expected.status == 2
        assert found.bound == (pytest.approx(expected.fun, rel=1e-9) if expected.status == 0 else np.inf)
    assert 0 < infeasible < 100


def test_planes_bound_blocks_under_every_range_of_transients():
    """Against the relaxation of each range by itself: equal for the numbers that were asked for, no larger for others."""
    draw = np.random.default_rng(12)
    for _ in range(60):
        functions, budgets, strategies, kinds, many = (
            int(n) for n in draw.integers((1, 1, 3, 1, 1), (4, 4, 10, 4, 5))
        )
        cost = draw.uniform(1.0, 9.0, (functions, strategies, kinds))
        held = draw.uniform(1.0, 9.0, (budgets, strategies, kinds))
        transient = draw.uniform(0.0, 1.0, (strategies, kinds))
        high = np.sort(draw.uniform(0.4, 1.0, many))
        asked, other = draw.integers(1, 9, (2, kinds)).astype(float)
        room = draw.uniform(3.0, 7.0, (budgets, many)) * asked.sum()
        planes = Planes(Ranges(cost, held, transient, high, room), asked[None], steep=True)
        for number in (asked, other):
            expected = np.inf
            for i in range(many):
                open_ = [np.flatnonzero(transient[:, k] <= high[i]) for k in range(kinds)]
                if all(len(some) for some in open_):
                    costs, helds = ([x[:, some, k] for k, some in enumerate(open_)] for x in (cost, held))
                    found = relaxed(
                        number.astype(int).tolist(), costs, helds, np.zeros(functions), room[:, i]
                    )
                    expected = min(expected, found.bound)
            assert planes.bound(number) <= expected * (1 + 1e-9)
            if number is asked and np.isfinite(expected):
                assert planes.bound(number) == pytest.approx(expected, rel=1e-9)


def test_a_range_that_is_closed_to_a_kind_keeps_the_digits_of_the_others():
    """Sums over a chain, whose differences bound its parts: two blocks whose only strategy the range does not allow, then one of
    0.1 s. Its bound is 0.1 s to the digits of 0.1, not to those of what keeps the others out."""
    ranges = Ranges(
        np.array([[[0.3, 0.1]]]), np.zeros((1, 1, 2)), np.array([[2.0, 1.0]]), np.ones(1), np.ones((1, 1))
    )
    planes = Planes(ranges, np.array([[0.0, 1.0]]), steep=True)
    sums = np.cumsum(planes.least[:, 0, [0, 0, 1]], axis=1)
    closed, last = ((sums[:, b] - sums[:, b - 1] - planes.paid[:, 0]).max() for b in (1, 2))
    assert last == pytest.approx(0.1, rel=1e-15)
    assert closed > 1e6


def test_a_relaxation_that_ends_early_bounds_all_the_same(monkeypatch):
    """Against the optimum: wherever the simplex method stops, its bound is no larger, nor infinite where something fits."""
    draw = np.random.default_rng(31)
    below = 0
    for pivots in (0, 1, 2, 5):
        for _ in range(40):
            problem = random_problem(draw)
            given = (
                [group.size for group in problem.groups], [group.cost for group in problem.groups],
                [group.held for group in problem.groups], problem.offset, problem.budget,
            )  # fmt: skip
            optimum = relaxed(*given).bound
            with monkeypatch.context() as early:
                early.setattr("planner.solve.layerwise.linear._MOST_PIVOTS", pivots)
                found = relaxed(*given).bound
            assert found <= optimum * (1 + 1e-12)
            below += found < optimum * (1 - 1e-6)
    assert below > 20  # otherwise none of them ended early


def test_proofs_of_counts_hold():
    draw = np.random.default_rng(21)
    for _ in range(100):
        problem = replace(random_problem(draw), switch=0.0)
        exact = solve(problem)
        least = np.inf if exact is None else exact[0]
        assert proved(problem, np.inf, 0.0) == pytest.approx(least, rel=1e-9)
        assert proved(problem, np.inf, 0.05) <= least
        assert proved(problem, 0.9 * least, 0.05) <= least


def test_the_smallest_limit_is_that_of_enumerated_partitions():
    draw = np.random.default_rng(9)
    for _ in range(20):
        layers, stages = int(draw.integers(3, 8)), int(draw.integers(2, 4))
        lines = [
            Line(
                draw.uniform(0.0, 2.0, (3, 2)),
                np.pad(np.cumsum(draw.uniform(0.5, 2.0, (3, 2, layers)), 2), ((0, 0), (0, 0), (1, 0))),
            )
            for _ in range(stages)
        ]  # fmt: skip
        best = min(
            max(lines[s].cost(a, b) for s, (a, b) in enumerate(parts)) for parts in partitions(layers, stages)
        )
        below, limit = smallest_limit(line_cost(lines), stages, layers, 0.0, 1000.0)
        assert below <= best * (1.0 + AGREE)
        assert limit == pytest.approx(best, rel=1e-6)
        assert sum(cut(line_cost(lines), stages, layers, limit)) == layers


def partitions(layers: int, stages: int, start: int = 0):
    if stages == 1:
        yield ((start, layers),)
        return
    for end in range(start, layers + 1):
        for rest in partitions(layers, stages - 1, end):
            yield ((start, end), *rest)


def test_dynamic_programming_refuses_to_grow_without_end():
    draw = np.random.default_rng(1)
    wide = Group(60, draw.uniform(1.0, 2.0, (4, 12)), draw.uniform(1.0, 2.0, (4, 12)))
    with pytest.raises(SolverError, match="states"):
        by_dynamic_programming(CountProblem((wide,), np.full(4, 1e9), np.zeros(4)))
