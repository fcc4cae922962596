"""The layer-wise search: never worse than the uniform one, priced by the same engine, and its certificate holds."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

import planner
from planner.errors import ExportError, Interrupted, SpecError
from planner.export import export
from planner.pipeline.composer import memory
from planner.pipeline.layout import layouts
from planner.pipeline.step_time import exact_step_s
from planner.plans.plan import Plan
from planner.schedule.critical import critical_path, interleaved_paths
from planner.schedule.engine import simulate
from planner.schedule.order import make_order
from planner.solve.layerwise.device_bounds import exposed
from planner.solve.layerwise.devices import DeviceCosts
from planner.solve.layerwise.relaxation import path_factor
from planner.solve.layerwise.search import search_layerwise
from planner.solve.layerwise.settle import Settler
from planner.solve.layerwise.solvers import automatic
from planner.solve.layerwise.space import LayerwiseSpace
from planner.solve.layerwise.waits import waiting_s
from planner.solve.layerwise.walks import first_bounds
from planner.solve.replay import replay
from planner.solve.uniform import UniformSearch
from planner.specs.hardware import load_cluster
from planner.specs.model import Attention, Block, Mlp, Model
from planner.specs.problem import Problem
from planner.specs.stack import load_stack
from planner.specs.workload import TrainWorkload
from planner.uncertainty.memory_limit import exceeded_bytes
from tests.property.small_problem import CLOSED, small_problem

_CLOSED = {**CLOSED, "sequence_parallel": "false", "tp": "1"}


def small(layers: int = 6, cluster: str = "rtx-4090:1x4", reserve: float = 0.6, **fixed: str) -> Problem:
    """Four small devices, most of whose memory is taken; strategies of the layers are open."""
    return small_problem(cluster, layers, reserve=reserve, **{**_CLOSED, **fixed})


TIGHT = [
    small(pp="2", activation_offload="none", micro_batch_size="1", reserve=0.75),
    small(layers=5, pp="2", activation_offload="none", zero_stage="1"),
    small(layers=7, pp="4", reserve=0.5, micro_batch_size="1"),
    small(layers=6, pp="1", reserve=0.5),
]


@pytest.mark.parametrize("problem", TIGHT)
def test_a_layerwise_plan_is_never_worse_and_its_bound_holds(problem):
    result = search_layerwise(problem, 3)
    uniform = planner.search(problem, 3)
    best = result.best
    assert best.estimate.step_time_s <= uniform.best.estimate.step_time_s
    assert best.optimality.bound_s <= best.estimate.step_time_s
    assert best.estimate.fits
    assert [plan.estimate.step_time_s for plan in result.plans] == sorted(
        p.estimate.step_time_s for p in result.plans
    )


def test_layers_that_differ_are_found_where_memory_binds():
    """Two stages of three layers, of which the first keeps twice the activations: some of its layers recompute, not all."""
    best = search_layerwise(TIGHT[0], 1).best
    assert best.layerwise is not None
    assert len(best.layerwise["strategies"]) > 1
    assert best.estimate.step_time_s < planner.search(TIGHT[0], 1).best.estimate.step_time_s


@pytest.mark.parametrize("problem", TIGHT)
def test_the_plans_own_ledgers_give_the_price_that_the_search_ranked(problem):
    """Candidates are priced from columns that add up; the plan from a ledger per strategy. Both are the engine's."""
    uniform = UniformSearch(problem, 1, lambda batch: [])
    space = LayerwiseSpace(uniform, 1e9, True)
    seen = 0
    for deal in space.deals(1e9)[:40:5]:
        mesh = space.mesh(deal)
        chunks = 1 if deal.layout is None else deal.layout.virtual_stages
        costs = DeviceCosts(problem, mesh, deal.order, chunks, automatic)
        settler = Settler(deal, mesh, costs, space.order, space.kinds, uniform.branches)
        bound_s = max(settler.bound_s(1e9), deal.bound_s)
        for found in settler.candidates(1e9):
            seen += 1
            bound_s = max(bound_s, settler.path_s(np.inf), settler.path_s(np.inf, found), settler.proved_s())
            assert bound_s <= found.step_s * (1 + 1e-9)
            plan = assembled(problem, uniform, found)
            assert plan.estimate.step_time_s == pytest.approx(found.step_s, rel=1e-9)
            assert plan.estimate.fits
    assert seen


def test_deals_of_a_mesh_are_bounded_together_as_each_alone():
    """Interleaved layouts side by side: no bound is above that of the layout alone, nor above what its plans take."""
    problem = small(layers=9, pp="2", activation_offload="none", micro_batch_size="1", reserve=0.7)
    uniform = UniformSearch(problem, 1, lambda batch: [])
    space = LayerwiseSpace(uniform, 1e9, True)
    several = [deal for deal in space.deals(1e9) if deal.order == "interleaved"]
    seen = 0
    for part, row in sorted({(deal.part, deal.row) for deal in several}):
        mine = [deal for deal in several if (deal.part, deal.row) == (part, row)]
        mesh = space.mesh(mine[0])
        costs = DeviceCosts(problem, mesh, "1f1b", 1, automatic)
        together = first_bounds(costs, mine, 1e9)
        assert len({deal.layout.virtual_stages for deal in mine}) > 1
        for deal in mine:
            own = DeviceCosts(problem, mesh, deal.order, deal.layout.virtual_stages, automatic)
            settler = Settler(deal, mesh, own, space.order, space.kinds, uniform.branches)
            steps = [found.step_s for found in settler.candidates(1e9)]
            assert together[deal] <= min(steps, default=np.inf) * (1 + 1e-9)
            seen += together[deal] > waiting_s(costs, [deal.layout], 1e9)[0]
        paths = [
            interleaved_paths(mesh.pp, deal.layout.virtual_stages, mesh.micro_batches)[1] for deal in mine
        ]
        layouts_ = [deal.layout for deal in mine]
        each = [costs.along_s(layout, path) for layout, path in zip(layouts_, paths, strict=True)]
        assert np.all(np.array(costs.along_each_s(layouts_, paths)) <= np.array(each) * (1 + 1e-9))
        assert costs.along_each_s(layouts_[:1], paths[:1]) == pytest.approx(each[:1], rel=1e-9)
    assert seen


def assembled(problem, uniform, found) -> Plan:
    from planner.plans.assemble import assemble

    recipe = {**found.mesh.recipe, **found.assignment.strategies[0], "schedule": found.deal.schedule}
    knobs = uniform.space.knobs(recipe)
    return assemble(
        problem, recipe, knobs, found.mesh.row, found.layout, None, assignment=found.assignment
    ).plan


def test_no_assignment_of_a_small_problem_is_better_than_the_bound():
    """Every strategy for every layer of every partition, each priced by the schedule engine."""
    problem = small(
        layers=3,
        pp="2",
        reserve=0.5,
        activation_offload="none",
        zero_stage="1",
        micro_batch_size="1",
        schedule="1f1b",
    )
    result = search_layerwise(problem, 1)
    uniform = UniformSearch(problem, 1, lambda batch: [])
    space = LayerwiseSpace(uniform, 1e9, True)
    deal = next(deal for deal in space.deals(1e9) if deal.layout is None)
    mesh = space.mesh(deal)
    strategies = range(len(mesh.branches))
    best_s = np.inf
    for cut, taken in product(range(4), product(strategies, repeat=3)):
        stages = [((s, 1),) for s in taken[:cut]], [((s, 1),) for s in taken[cut:]]
        runs = [tuple(run for part in stage for run in part) for stage in stages]
        for end in strategies:
            assignment = mesh.assignment(runs, end, end, uniform.branches)
            layout = assignment.layout(space.order, 2)
            number = {branch: i for i, branch in enumerate(mesh.branches)}
            own = [
                next(i for b, i in number.items() if uniform.branches.recipe(*b) == s)
                for s in assignment.strategies
            ]
            table = mesh.table([(kind, own[s]) for kind, s in assignment.columns(space.order)])
            batches = np.array([float(mesh.micro_batches)])
            peak, software, slower = memory(table, layout, "1f1b", batches, problem.stack, mesh.communicators)
            inside = all(slower[tier][0] <= room for tier, room in problem.cluster.slower_bytes.items())
            seldom = exceeded_bytes(problem, peak, software)[0] <= float(problem.cluster.device.memory_bytes)
            if peak[0] <= problem.memory_budget_bytes and inside and seldom:
                step_s = exact_step_s([table], layout, "1f1b", mesh.micro_batches, [None])[0]
                best_s = min(best_s, float(step_s))
    assert result.best.optimality.bound_s <= best_s * (1 + 1e-9)
    assert result.best.estimate.step_time_s <= best_s * (1 + 2e-4)


def test_what_bounds_begin_from_is_no_more_than_the_tables_of_rows_say():
    """Every strategy that can be explored, summed for a prefix's rows at once, and from each row's own table: times are no longer
    (without swaps and, for all rows at once, recompute: as long), and the rest is the same."""
    problem = replace(TIGHT[3], explore=("recompute=*",))
    uniform = UniformSearch(problem, 1, lambda batch: [])
    space = LayerwiseSpace(uniform, 1e9, True)
    seen = 0
    for part in space.parts:
        every = range(len(part))
        blocks, meshes = part.blocks(), zip(part.meshes(every), part.lower(every), strict=True)
        for row, (mesh, lower) in enumerate(meshes):
            on = np.flatnonzero(part.active[:, row])
            assert lower.branches == mesh.branches
            own = lower.blocks
            for found in (blocks[:, on, row], own):
                np.testing.assert_allclose(found[1:], mesh.blocks[1:], rtol=1e-9, atol=1e-6)
                assert np.all(found[0] <= mesh.blocks[0] * (1 + 1e-9))
                rough = found is not own
                plain = [s for s, (_, r, swap) in enumerate(mesh.branches) if not (swap or (r and rough))]
                np.testing.assert_allclose(found[0, plain], mesh.blocks[0, plain], rtol=1e-9)
            assert np.all(lower["forward_s"] <= mesh["forward_s"] * (1 + 1e-9))
            np.testing.assert_allclose(lower["weights_messages"], mesh["weights_messages"])
            seen += len(on)
    assert seen > 50


def test_a_swap_loses_no_byte():
    """What leaves the device is in a slower tier, and a deal's bounds by its tables are no higher than those of its devices."""
    problem = replace(
        small(pp="2", micro_batch_size="1"),
        fixed={k: v for k, v in {**_CLOSED, "pp": "2"}.items() if not k.endswith("_offload")},
    )
    uniform = UniformSearch(problem, 1, lambda batch: [])
    space = LayerwiseSpace(uniform, 1e9, True)
    deals = space.deals(1e9)
    swapping = 0
    for mesh in {id(space.mesh(deal)): space.mesh(deal) for deal in deals}.values():
        number = {branch: s for s, branch in enumerate(mesh.branches)}
        for (state, recompute, swap), s in number.items():
            plain = number.get((state, recompute, 0))
            if swap and plain is not None:
                swapping += 1
                for here, there in (("always_bytes", "bytes"), ("saved_bytes", "saved_bytes")):
                    moved = mesh[f"host_{there}"][s] + mesh[f"nvme_{there}"][s]
                    np.testing.assert_allclose(
                        (mesh[here][s] + moved)[:-1], mesh[here][plain][:-1], rtol=1e-9
                    )
    assert swapping
    for part in sorted({deal.part for deal in deals}):
        mine = [deal for deal in deals if deal.part == part][:30]
        for deal, bound_s in zip(mine, space.sharper(part, mine, 1e9), strict=True):
            mesh, chunks = space.mesh(deal), 1 if deal.layout is None else deal.layout.virtual_stages
            costs = DeviceCosts(problem, mesh, deal.order, chunks, automatic)
            settler = Settler(deal, mesh, costs, space.order, space.kinds, uniform.branches)
            steps = [found.step_s for found in settler.candidates(1e9)]
            assert bound_s <= min(steps, default=np.inf) * (1 + 1e-9)


def test_equal_stages_are_the_least_that_paths_allow():
    """Whatever the cuts of a chain, the engine takes no less than the factor says; random cuts of unequal layers."""
    from planner.schedule.engine import simulate
    from planner.schedule.order import make_order

    draw = np.random.default_rng(4)
    for _ in range(60):
        p, m = int(draw.integers(2, 6)), int(draw.integers(1, 12))
        schedule = "1f1b" if draw.random() < 0.7 else "gpipe"
        forward, backward = draw.uniform(0.0, 1.0, (2, p))
        line = simulate(make_order(schedule, p, m), forward, backward)
        work_s = float((forward + backward).sum())
        assert work_s * float(path_factor(schedule, p, np.array([float(m)]))[0]) <= float(line.makespan_s) * (
            1 + 1e-9
        )


def test_a_critical_path_is_as_long_as_the_step_and_bounds_every_other():
    """The engine's makespan is the length of its critical path; under other seconds that path is no longer than the makespan."""
    draw = np.random.default_rng(3)
    for schedule, p, m, v in (
        ("1f1b", 4, 9, 1),
        ("interleaved", 4, 8, 3),
        ("gpipe", 3, 5, 1),
        ("1f1b", 5, 2, 1),
    ):
        order = make_order(schedule, p, m, v)
        cases = []
        for _ in range(4):
            stages_s, tail_s, hop_s = draw.uniform(1.0, 2.0, (2, p * v)), draw.uniform(0.0, 3.0, p), 0.3
            seconds = np.concatenate([stages_s, np.zeros((1, p * v))])
            path = critical_path(order, seconds, hop_s, tail_s)
            took = float(simulate(order, *stages_s, hop_s=hop_s, tail_s=tail_s).makespan_s)
            assert path.seconds(seconds, hop_s, tail_s) == pytest.approx(took, rel=1e-12)
            cases.append((path, seconds, tail_s, took))
        for (path, *_), (_, seconds, tail_s, took) in product(cases, cases):
            assert path.seconds(seconds, 0.3, tail_s) <= took * (1 + 1e-12)


def test_paths_without_an_order_are_no_longer_than_the_step():
    """Random stages of interleaved schedules, micro-batches that fill groups or do not."""
    draw = np.random.default_rng(8)
    for _ in range(60):
        p, v, m = (int(draw.integers(low, high)) for low, high in ((2, 6), (2, 5), (6, 20)))
        if m % p and draw.random() < 0.7:
            m = p * (m // p + 1)
        stages_s, tail_s, hop_s = (
            draw.uniform(0.5, 1.5, (2, p * v)),
            draw.uniform(0.0, 2.0, p),
            float(draw.uniform(0.0, 0.3)),
        )
        took = float(
            simulate(make_order("interleaved", p, m, v), *stages_s, hop_s=hop_s, tail_s=tail_s).makespan_s
        )
        seconds = np.concatenate([stages_s, np.zeros((1, p * v))])
        for path in interleaved_paths(p, v, m):
            assert path.seconds(seconds, hop_s, tail_s) <= took * (1 + 1e-12)


def unlike_layers(host_memory: float) -> Problem:
    """Two kinds of layers, of which the one works on tensors several times as large as the other's."""
    attention = Attention(16, 16, 128)
    wide, slim = (Block(attention=attention, mlp=Mlp(width, gated=True)) for width in (16384, 2048))
    model = Model(
        name="unlike", family="small", arch="decoder", hidden=2048, vocab=32000, max_seq_len=4096,
        blocks={"wide": wide, "slim": slim}, layers=(("wide", 2), ("slim", 3)), tied_embeddings=False, dropout=False,
    )  # fmt: skip
    cluster = load_cluster("rtx-4090:1x4")
    cluster = replace(cluster, host_memory_bytes=cluster.host_memory_bytes * host_memory)
    fixed = {**_CLOSED, "pp": "4", "micro_batch_size": "1", "schedule": "1f1b", "zero_stage": "1"}
    return Problem(model, cluster, TrainWorkload(8, 4096), load_stack(), fixed=fixed, reserve=0.55)


@pytest.mark.parametrize("host_memory", [1.0, 0.05])
def test_no_strategies_of_a_few_layers_undercut_a_devices_line(host_memory):
    """Every strategy of every layer of one or two neighbours: the largest transient, the update and host memory as the engine
    counts them, which are sums over blocks, and one block at work. Budgets are what some choices need, to the byte."""
    problem = unlike_layers(host_memory)
    uniform = UniformSearch(problem, 1, lambda batch: [])
    space = LayerwiseSpace(uniform, 1e9, True)
    deal = next(deal for deal in space.deals(1e9) if deal.layout is None)
    mesh = space.mesh(deal)
    costs = DeviceCosts(problem, mesh, deal.order, 1, automatic)
    stack = [space.kinds.index(kind) for kind in space.order]
    ends = {0: [len(space.kinds) - 3], 3: [len(space.kinds) - 2]}
    draw, tight = np.random.default_rng(2), 0
    for device, (a, b) in product((0, 1, 3), ((0, 1), (1, 3), (3, 5), (4, 5))):
        kinds = np.array([*stack[a:b], *ends.get(device, [])])
        flights = float(costs.flights(device).max())
        choices = np.array(list(product(*(costs.fronts[kind] for kind in kinds))))

        def held(name, choices=choices, kinds=kinds):
            return mesh[f"{name}_bytes"][choices, kinds].sum(axis=1)

        transient = costs.transient[choices, kinds].max(axis=1)
        need = held("always") + np.maximum(costs.growth * (flights * held("saved") + transient), held("step"))
        host = held("host") + flights * held("host_saved")
        need = np.where(host <= problem.cluster.slower_bytes["host"], need, np.inf)
        after = exposed(mesh, 0.0, 0.0, kinds)[:, choices, np.arange(len(kinds))].sum(axis=2)
        device_s = (costs.work[choices, kinds].sum(axis=1) + after).max(axis=0)
        fastest = int(np.argmin(np.where(np.isfinite(need), device_s, np.inf)))
        for one in (fastest, *draw.choice(np.flatnonzero(np.isfinite(need)), 4)):
            costs.room = float(need[one]) * (1 + 1e-12)
            best_s = float(device_s[need <= costs.room].min())
            found_s = costs.line(device, stack, ends.get(device, [])).cost(a, b)
            assert found_s <= best_s * (1 + 1e-9)
            tight += found_s >= best_s * (1 - 1e-9)
    assert tight > 10  # otherwise there is little that would show a bound that is too large


def test_the_same_input_gives_the_same_plan():
    first, second = (search_layerwise(TIGHT[1], 1).best for _ in range(2))
    assert first == second


def test_a_time_limit_gives_the_best_so_far_with_its_gap():
    result = search_layerwise(TIGHT[0], 1, time_limit_s=0.0)
    assert result.layerwise["stopped"] == "time"
    assert result.best.optimality.status == "gap"
    assert 0.0 < result.best.optimality.gap < 1.0


@pytest.mark.parametrize("where", ["_narrow", "deals_of", "mesh"])
def test_ctrl_c_gives_the_best_so_far_and_a_bound_that_holds(monkeypatch, where):
    done = search_layerwise(TIGHT[0], 1)

    def stop(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(LayerwiseSpace, where, stop)
    with pytest.raises(Interrupted) as stopped:
        search_layerwise(TIGHT[0], 1)
    result = stopped.value.best
    assert result.layerwise["stopped"] == "interrupted"
    assert result.layerwise["bound_s"] <= done.best.estimate.step_time_s
    assert result.best.estimate.step_time_s >= done.best.estimate.step_time_s
    assert result.best.optimality.status == "gap"


def test_recompute_by_layers_stays_with_the_uniform_search():
    problem = small(pp="2", recompute="block", activation_offload="none", reserve=0.7)
    assert search_layerwise(problem, 1).best.layerwise is None


def test_even_stages_take_the_named_layouts():
    problem = TIGHT[1]
    plan = search_layerwise(problem, 1, uneven=False).best
    orders = ("decoder",) * 5
    kinds = ("decoder", "embedding", "head", "boundary")
    named = {
        tuple(layout.counts[:, 0].astype(int))
        for layout in layouts(orders, kinds, 2, plan.knobs["virtual_stages"])
    }
    assert plan.stages in named


def test_solvers_find_the_same_plan():
    plans = [search_layerwise(TIGHT[1], 1, solver=solver).best for solver in ("auto", "ilp")]
    assert plans[0].estimate.step_time_s == pytest.approx(plans[1].estimate.step_time_s, rel=2e-4)


def test_a_stored_plan_is_priced_again_as_it_was(tmp_path):
    problem = Problem(
        planner.load_model("gpt2-xl"), load_cluster("rtx-4090:1x4"), TrainWorkload(16, 1024), load_stack(),
        fixed={**_CLOSED, "pp": "2", "activation_offload": "none"}, reserve=0.45,
    )  # fmt: skip
    plan = search_layerwise(problem, 1).best
    assert plan.layerwise is not None
    loaded = Plan.from_dict(plan.as_dict())
    assert loaded == replace(plan, layerwise=loaded.layerwise, workload=loaded.workload)
    assert loaded.id == plan.id
    again = planner.estimate(replay(loaded))
    assert again.estimate.step_time_s == pytest.approx(plan.estimate.step_time_s, rel=1e-12)
    assert again.estimate.memory_bytes["peak"] == pytest.approx(plan.estimate.memory_bytes["peak"], rel=1e-12)
    with pytest.raises(ExportError, match="differs between layers"):
        export(plan, "megatron")


@pytest.mark.parametrize("wrong", [{"strategies": []}, {"stages": [[[0, 1]]]}, {"head": 9}])
def test_a_layerwise_plan_that_does_not_add_up_is_refused(wrong):
    data = search_layerwise(TIGHT[0], 1).best.as_dict()
    with pytest.raises(SpecError):
        Plan.from_dict({**data, "layerwise": {**data["layerwise"], **wrong}})


def test_holdings_and_seconds_add_up_over_strategies():
    from planner.report.account import byte_tree, second_tree
    from planner.solve.named import examine

    plan = search_layerwise(TIGHT[0], 1).best
    problem = replace(
        TIGHT[0],
        fixed={k: str(v).lower() for k, v in {**plan.mesh, **plan.knobs}.items() if k != "pipeline_layout"},
        layerwise=plan.layerwise,
    )
    assembly = examine(problem)
    assert assembly.plan.estimate.step_time_s == pytest.approx(plan.estimate.step_time_s, rel=1e-12)
    seconds, held = second_tree(assembly), byte_tree(assembly)
    assert sum(part["seconds"] for part in seconds["children"]) == pytest.approx(
        plan.estimate.step_time_s, rel=1e-9
    )
    assert sum(part["bytes"] for part in held["children"]) == pytest.approx(
        plan.estimate.memory_bytes["peak"], rel=1e-9
    )
