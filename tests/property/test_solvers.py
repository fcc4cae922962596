"""Do the solvers find what enumeration finds, on random problems small enough to enumerate?"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from planner.errors import Infeasible
from planner.solve.combinatorial.certificate import Clock
from planner.solve.combinatorial.choices import ChoiceGraph, minimise
from planner.solve.combinatorial.elimination import eliminate
from planner.solve.combinatorial.experts import align, balance, moved
from planner.solve.combinatorial.migrations import migrate, migrate_all
from planner.solve.combinatorial.milp import BACKENDS, Program, solve
from planner.solve.combinatorial.rank_limits import Limits
from planner.solve.combinatorial.ranks import Group, RankProblem, map_ranks, pipeline_phases
from planner.solve.combinatorial.recompute import SOLVERS, ComputeGraph, cheapest_schedule, keep_all
from planner.solve.combinatorial.sequences import SequenceProblem, assign_sequences, micro_batches
from planner.solve.combinatorial.tiering import MOVES, Kernel, Tensor, Tier, TieringProblem, place

CLOSE = 1e-9


def close(found, best):
    return found == best or (math.isfinite(best) and abs(found - best) <= CLOSE * max(abs(best), 1.0))


# -- integer programs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_knapsacks_in_seconds_and_bytes_agree_with_enumeration(backend):
    """Costs of milliseconds and sizes of gigabytes, where absolute tolerances of 1e-6 would decide."""
    rng = np.random.default_rng(0)
    for _ in range(25):
        cost, size = -rng.random(8) * 1e-3, rng.integers(1, 9, 8) * 1e9
        budget = size.sum() * rng.uniform(0.2, 0.8)
        program = Program()
        x = program.variables(cost, integer=True)
        program.constrain([x], [size], high=budget)
        found = solve(program, backend=backend)
        best = min(cost @ y for y in map(np.array, itertools.product((0, 1), repeat=8)) if size @ y <= budget)
        assert abs(found.objective - best) <= CLOSE * abs(best)
        assert found.bound == found.objective
        assert size @ found.values <= budget


def test_answer_on_the_tolerance_of_a_row_is_not_accepted():
    """Two items fill the budget but for a millionth of a byte that they are over: HiGHS alone would take both."""
    program = Program()
    x = program.variables([-1.0, -1.0], integer=True)
    program.constrain([x], [[1.0, 1.0]], high=2.0 - 1e-7)
    found = solve(program)
    assert found.objective == -1.0
    assert found.bound <= found.objective


# -- one choice per node ---------------------------------------------------------------------------------------------------


def choice_problem(rng, nodes, density):
    choices = rng.integers(1, 5, nodes)
    edges = {
        (i, j): rng.random((choices[i], choices[j])) * 1e-3
        for i, j in itertools.combinations(range(nodes), 2)
        if rng.random() < density
    }
    seconds = [rng.random(n) * 1e-3 for n in choices]
    held = [rng.integers(1, 20, n) * 1e8 for n in choices]
    return choices, seconds, held, edges


def test_elimination_and_its_marginals_agree_with_enumeration():
    rng = np.random.default_rng(1)
    for _ in range(150):
        choices, seconds, _, edges = choice_problem(rng, int(rng.integers(1, 6)), 0.5)
        found = eliminate(seconds, edges)
        graph = ChoiceGraph([""] * len(choices), seconds, [np.zeros(n) for n in choices], edges)
        every = {x: graph.seconds(x) for x in itertools.product(*map(range, choices))}
        assert close(found.value, min(every.values()))
        assert close(graph.seconds(found.choice), found.value)
        for variable, marginal in enumerate(found.marginals()):
            for value, least in enumerate(marginal):
                assert close(least, min(s for x, s in every.items() if x[variable] == value))


def test_choices_within_a_budget_agree_with_enumeration():
    rng = np.random.default_rng(2)
    solvers = set()
    for case in range(200):
        choices, seconds, held, edges = choice_problem(rng, int(rng.integers(1, 6)), 0.6)
        low, high = (sum(f(h) for h in held) for f in (min, max))
        budget = low + (high - low) * rng.random() if case % 4 else math.inf
        graph = ChoiceGraph([""] * len(choices), seconds, held, edges, budget)
        best = min(
            graph.seconds(x) for x in itertools.product(*map(range, choices)) if graph.held_bytes(x) <= budget
        )
        for elimination in (True, False) if case % 5 == 0 else (True,):
            found = minimise(graph, elimination=elimination)
            solvers.add(found.certificate.solver)
            assert found.certificate.status == "exact"
            assert abs(found.time_s - best) <= CLOSE * best
            assert found.memory_bytes <= budget
    assert solvers == {"variable elimination", "variable elimination with fronts", "HiGHS (scipy)"}


# -- recomputation ---------------------------------------------------------------------------------------------------------


def training_graph(rng, forward):
    """A chain with skips, and its backward nodes, which read gradients, inputs and sometimes outputs."""
    reads = [
        tuple(sorted({j - 1} | {i for i in range(j - 1) if rng.random() < 0.25})) if j else ()
        for j in range(forward)
    ]
    for j in reversed(range(forward)):
        inputs = {i for i in reads[j] if rng.random() < 0.8} | ({j} if rng.random() < 0.3 else set())
        reads.append(tuple(sorted(inputs | ({len(reads) - 1} if len(reads) > forward else set()))))
    n = 2 * forward
    time_s, size = (rng.integers(1, 9, n).astype(float).tolist() for _ in range(2))
    in_place = frozenset(i for i in range(n) if rng.random() < 0.2)
    return ComputeGraph([str(i) for i in range(n)], time_s, size, reads, in_place, boundary=forward)


def enumerated_s(graph, budget):
    """Least time over all sets computed in every stage and all sets kept between stages."""
    n = len(graph)
    best = {frozenset(): 0.0}
    for stage in range(n):
        after_of = {}
        for kept, cost in best.items():
            for chosen in itertools.product((False, True), repeat=stage):
                computed = {i for i in range(stage) if chosen[i]} | {stage}
                spent = cost + sum(graph.time_s[i] for i in computed)
                pool = sorted(kept | computed)
                for keep in itertools.product((False, True), repeat=len(pool) if stage < n - 1 else 0):
                    after = frozenset(i for i, k in zip(pool, keep, strict=False) if k)
                    if spent < after_of.get(after, math.inf) and possible(
                        graph, kept, computed, after, budget
                    ):
                        after_of[after] = spent
        best = after_of
    return best.get(frozenset(), math.inf)


def possible(graph, kept, computed, after, budget):
    """Whether a stage finds what it reads, and stays within the budget."""
    size, live = graph.memory_bytes, set(kept)
    todo = sorted(computed)
    for position, k in enumerate(todo):
        if not live.issuperset(graph.reads[k]):
            return False
        later = {i for j in todo[position + 1 :] for i in graph.reads[j]}
        released = {i for i in {*graph.reads[k], k} if i not in later and i not in after}
        holding = (live | {k}) - ((released - {k}) if k in graph.in_place else set())
        if sum(size[i] for i in live) > budget + CLOSE or sum(size[i] for i in holding) > budget + CLOSE:
            return False
        live = (live | {k}) - released
    return after <= live


def test_schedules_agree_with_enumeration():
    rng = np.random.default_rng(3)
    recomputed = 0
    for _ in range(60):
        graph = training_graph(rng, int(rng.integers(2, 4)))
        budget = keep_all(graph).peak_bytes * rng.uniform(0.75, 1.0)
        best = enumerated_s(graph, budget)
        for solver in SOLVERS:
            try:
                found = cheapest_schedule(graph, budget_bytes=budget, solver=solver)
            except Infeasible:
                assert best == math.inf
                continue
            assert close(found.time_s, best), solver
            assert found.certificate.status == "exact"
            assert found.peak_bytes <= budget * (1.0 + CLOSE)
            recomputed += found.recompute_s > 0.0
    assert recomputed >= 8


def test_search_and_program_agree_on_what_is_kept():
    rng = np.random.default_rng(4)
    for _ in range(60):
        graph = training_graph(rng, int(rng.integers(3, 6)))
        plain = keep_all(graph)
        limits = {
            "budget_bytes": plain.peak_bytes * rng.uniform(0.8, 1.05),
            "kept_limit_bytes": plain.kept_bytes * rng.random(),
        }
        answers = []
        for solver in SOLVERS:
            try:
                found = cheapest_schedule(graph, solver=solver, **limits)
                assert found.kept_bytes <= limits["kept_limit_bytes"] * (1.0 + CLOSE)
                answers.append(found.time_s)
            except Infeasible:
                answers.append(math.inf)
        assert close(*answers)


# -- tiers -------------------------------------------------------------------------------------------------------------------


def test_placements_agree_with_enumeration():
    rng = np.random.default_rng(5)
    for case in range(80):
        kernels, tensors = int(rng.integers(2, 6)), int(rng.integers(1, 4))
        uses = [tuple(i for i in range(tensors) if rng.random() < 0.5) for _ in range(kernels)]
        problem = TieringProblem(
            tuple(Kernel(str(k), float(rng.random()), uses[k]) for k in range(kernels)),
            tuple(
                Tensor(str(i), float(rng.integers(1, 6)), bool(rng.random() < 0.5), bool(rng.random() < 0.3))
                for i in range(tensors)
            ),
            (Tier("a", float(rng.integers(5, 12))), Tier("b", float(rng.integers(2, 9)), 2.0, 3.0), Tier("c", 100.0, 0.5, 0.7)),
            MOVES[case % 2],
        )  # fmt: skip
        best = placed_s(problem)
        try:
            found = place(problem)
        except Infeasible:
            assert best == math.inf
            continue
        assert found.certificate.status == "exact"
        assert close(found.time_s, best)
        assert all(found.peak_bytes[tier.name] <= tier.capacity_bytes + CLOSE for tier in problem.tiers)


def test_moves_on_a_clock_lie_between_those_that_are_free_of_it_and_those_that_stop_the_kernels():
    rng = np.random.default_rng(11)
    waited = 0
    for _ in range(60):
        kernels, tensors = int(rng.integers(2, 7)), int(rng.integers(1, 4))
        uses = [tuple(i for i in range(tensors) if rng.random() < 0.5) for _ in range(kernels)]
        problem = TieringProblem(
            tuple(Kernel(str(k), float(rng.random()), uses[k]) for k in range(kernels)),
            tuple(
                Tensor(str(i), float(rng.integers(1, 6)), bool(rng.random() < 0.5)) for i in range(tensors)
            ),
            (Tier("a", float(rng.integers(5, 12))), Tier("b", 100.0, 2.0, 3.0)),
        )
        try:
            serial_s = place(problem).time_s
        except Infeasible:
            continue
        found = migrate(problem)
        beside_s = place(replace(problem, moves="overlapped")).time_s
        assert beside_s <= found.time_s * (1.0 + CLOSE)
        assert found.time_s <= serial_s * (1.0 + CLOSE)
        assert found.time_s <= migrate_all(problem).time_s * (1.0 + CLOSE)
        assert all(found.peak_bytes[tier.name] <= tier.capacity_bytes + CLOSE for tier in problem.tiers)
        waited += beside_s < found.time_s < serial_s
    assert waited


def placed_s(problem):
    """Least seconds over all tiers of all rests, counted here again."""
    n = len(problem.kernels)
    rests = []
    for number, tensor in enumerate(problem.tensors):
        used = [k for k, kernel in enumerate(problem.kernels) if number in kernel.uses]
        pairs = list(itertools.pairwise(used)) + (
            [(used[-1], used[0] + n)] if tensor.persists and used else []
        )
        spans = [tuple(k % n for k in range(a + 1, b)) for a, b in pairs]
        if tensor.persists and not used:
            spans = [tuple(range(n))]
        rests += [(number, span, bool(used)) for span in spans if span]
    pinned = [sum(problem.tensors[i].size_bytes for i in kernel.uses) for kernel in problem.kernels]
    kernels_s = sum(kernel.time_s for kernel in problem.kernels)
    best = math.inf
    for tiers in itertools.product(range(len(problem.tiers)), repeat=len(rests)):
        held = [[0.0] * n for _ in problem.tiers]
        held[0] = list(pinned)
        links = [[0.0, 0.0] for _ in problem.tiers]
        for (number, span, used), tier in zip(rests, tiers, strict=True):
            tensor, memory = problem.tensors[number], problem.tiers[tier]
            for k in span:
                held[tier][k] += tensor.size_bytes
            if tier and used:
                links[tier][0] += 0.0 if tensor.constant else tensor.size_bytes / memory.write_bytes_per_s
                links[tier][1] += tensor.size_bytes / memory.read_bytes_per_s
        if all(max(line) <= t.capacity_bytes + CLOSE for line, t in zip(held, problem.tiers, strict=True)):
            moves = [seconds for link in links for seconds in link]
            best = min(
                best, kernels_s + sum(moves) if problem.moves == "serial" else max([kernels_s, *moves])
            )
    return best


# -- experts, sequences, ranks ---------------------------------------------------------------------------------------------


def test_balanced_loads_agree_with_enumeration():
    rng = np.random.default_rng(6)
    for _ in range(80):
        experts, devices = int(rng.integers(2, 8)), int(rng.integers(1, 4))
        load, slots = rng.random(experts), -(-experts // devices) + int(rng.integers(0, 2))
        best = min(
            np.bincount(x, weights=load, minlength=devices).max()
            for x in itertools.product(range(devices), repeat=experts)
            if np.bincount(x, minlength=devices).max() <= slots
        )
        found = balance(load, devices, slots=slots)
        assert found.certificate.status == "exact"
        assert close(max(found.loads), best)
        assert max(np.bincount(found.device)) <= slots


@pytest.mark.parametrize(("experts", "devices"), [(4, 2), (4, 4), (6, 2)])
def test_aligned_experts_agree_with_enumeration(experts, devices):
    rng = np.random.default_rng(7)
    deals = [
        x
        for x in itertools.product(range(devices), repeat=experts)
        if np.ptp(np.bincount(x, minlength=devices)) == 0
    ]
    for _ in range(5):
        tables = [rng.random((experts, experts)) for _ in range(2)]
        first = deals[:1] if experts == devices else deals  # with one expert each, devices can be renamed
        best = min(moved(tables, np.array(x)) for x in itertools.product(first, deals, deals))
        found = align(tables, devices)
        assert close(found.moved, best)
        assert close(moved(tables, np.array(found.device)), best)


def test_bound_of_experts_that_cannot_be_listed_is_below_the_answer(monkeypatch):
    rng = np.random.default_rng(8)
    for _ in range(10):
        tables = [rng.random((6, 6)) ** 4 for _ in range(3)]
        exact = align(tables, 3)
        with monkeypatch.context() as patched:
            patched.setattr("planner.solve.combinatorial.experts._MOST_PLACEMENTS", 0)
            found = align(tables, 3)
        assert found.certificate.bound <= exact.moved + CLOSE
        assert found.moved >= exact.moved - CLOSE


def test_sequence_groups_agree_with_enumeration():
    rng = np.random.default_rng(9)
    degrees = (1, 2, 4)
    for case in range(40):
        lengths = sorted(int(x) for x in rng.integers(1, 9, int(rng.integers(1, 4))))
        counts = tuple(int(x) for x in rng.integers(1, 3, len(lengths)))
        seconds = np.array([[(n * n * 0.1 + n) / d + 0.2 * np.log2(d) for d in degrees] for n in lengths])
        held = np.array([[n / d for d in degrees] for n in lengths])
        budget = float(rng.uniform(2, 9)) if case % 2 else math.inf
        problem = SequenceProblem(
            tuple(lengths),
            counts,
            degrees,
            seconds,
            held,
            4,
            budget,
            (0.0, 0.1, 0.2) if case % 3 else (),
            case % 4 < 2,
        )
        best = grouped_s(problem)
        try:
            found = assign_sequences(problem)
        except Infeasible:
            assert best == math.inf
            continue
        assert found.certificate.status == "exact"
        assert close(found.time_s, best)
        assert found.counts.sum(axis=0).tolist() == list(counts)
        assert sum(found.degrees) <= problem.devices


def grouped_s(problem):
    """Least makespan over all multisets of groups and all assignments of single sequences."""
    sequences = [b for b, count in enumerate(problem.counts) for _ in range(count)]
    extra = problem.group_s or (0.0,) * len(problem.degrees)
    best = math.inf
    most = [range(problem.devices // degree + 1) for degree in problem.degrees]
    for numbers in itertools.product(*most):
        groups = [d for d, number in enumerate(numbers) for _ in range(number)]
        if not groups or sum(problem.degrees[d] for d in groups) > problem.devices:
            continue
        for dealt in itertools.product(range(len(groups)), repeat=len(sequences)):
            busy, held = [0.0] * len(groups), [0.0] * len(groups)
            for b, g in zip(sequences, dealt, strict=True):
                busy[g] += problem.time_s[b, groups[g]]
                one = problem.memory_bytes[b, groups[g]]
                held[g] = held[g] + one if problem.packed else max(held[g], one)
            if max(held) <= problem.budget_bytes:
                best = min(best, max(t + extra[groups[g]] for g, t in enumerate(busy) if g in dealt))
    return best


def test_micro_batches_agree_with_enumeration():
    rng = np.random.default_rng(10)

    def seconds(count, length):
        return 0.3 + count * length + 0.01 * count * length * length

    def fits(count, length):
        return count * length <= 40

    for _ in range(60):
        lengths = sorted(int(x) for x in rng.integers(1, 20, int(rng.integers(1, 8))))
        stages, n, best = int(rng.integers(1, 6)), len(lengths), math.inf
        for cuts in itertools.product((False, True), repeat=n - 1):
            ends = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), n]
            pieces = [(b - a, lengths[b - 1]) for a, b in itertools.pairwise(ends)]
            if all(fits(*piece) for piece in pieces):
                each = [seconds(*piece) for piece in pieces]
                best = min(best, sum(each) + (stages - 1) * max(each))
        assert close(micro_batches(lengths, seconds, fits, stages).time_s, best)


@pytest.mark.parametrize(("stages", "replicas"), [(2, 2), (3, 2), (2, 3), (3, 1), (1, 3)])
def test_rank_maps_agree_with_enumeration(stages, replicas):
    rng = np.random.default_rng(11)
    ranks = stages * replicas
    for nodes in (ranks, ranks + 1) if ranks < 6 else (ranks,):
        problem = RankProblem(
            rng.uniform(1, 10, (nodes, nodes)), pipeline_phases(stages, replicas, 1.0, 5.0, 4), 0.01
        )
        found = map_ranks(problem)
        best = min(problem.seconds(order) for order in itertools.permutations(range(nodes), ranks))
        assert found.certificate.status == "exact"
        assert close(found.time_s, best)
        assert close(problem.seconds(found.node), best)


@pytest.mark.parametrize(("stages", "replicas"), [(2, 4), (4, 2), (3, 3)])
def test_limits_bound_every_map_and_find_good_ones(stages, replicas):
    """Without branch and bound over single ranks: maps of a few per cent from the optimum, and bounds below it."""
    rng = np.random.default_rng(stages)
    ranks = stages * replicas
    rates = rng.uniform(5.0, 25.0, (ranks, ranks))
    problem = RankProblem((rates + rates.T) / 2, pipeline_phases(stages, replicas, 0.1, 4.0, 32), 1e-3)
    best = map_ranks(problem).time_s
    _, value, bound = Limits(problem, ranks, Clock()).search(range(ranks), problem.seconds(range(ranks)))
    assert bound <= best * (1.0 + 1e-12)
    assert best * (1.0 - 1e-12) <= value <= 1.1 * best
    assert bound >= 0.9 * best


def test_bound_of_many_ranks_is_below_every_map():
    rng = np.random.default_rng(12)
    rates = rng.uniform(5.0, 25.0, (12, 12))
    problem = RankProblem(rates, (*pipeline_phases(4, 3, 1.0, 9.0), (Group((0, 5, 7), 3.0),)))
    found = map_ranks(problem)
    assert found.certificate.status == "gap"
    assert all(problem.seconds(rng.permutation(12)) >= found.time_s for _ in range(200))
    assert 0.0 < found.certificate.bound <= found.time_s
