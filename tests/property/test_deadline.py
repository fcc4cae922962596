"""The fewest nodes that meet a deadline are the fewest, found by searching every number of nodes in full."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.errors import Infeasible, InvalidPlan, SpecError
from planner.solve.deadline import fewest_devices
from planner.solve.fleet import run_s
from planner.solve.kernel_floor import kernel_floor_s
from planner.solve.named import estimate
from planner.solve.train import search
from planner.specs.hardware import load_cluster
from planner.specs.models import load_model
from planner.specs.problem import Problem
from planner.specs.stack import load_stack
from planner.specs.workload import TrainWorkload

MOST = 8  # nodes


def problem(model="gpt2", cluster="a100:8x1", batch=24, seq=1024, **options):
    workload = TrainWorkload(batch, seq, tokens=1e9)
    return Problem(load_model(model), load_cluster(cluster), workload, load_stack(), **options)


@pytest.fixture(scope="module")
def runs():
    """Run time on every number of nodes; absent where no plan is valid: 7 divides neither the batch nor the model."""
    found = {}
    for nodes in range(1, MOST + 1):
        sized = problem(cluster=f"a100:{nodes}x1")
        try:
            found[nodes] = run_s(sized, search(sized, 1).best.estimate.step_time_s)
        except Infeasible:
            continue
    return found


def test_the_fewest_nodes_of_all_are_found(runs):
    """For deadlines just above and between the run times of all sizes; run times are not monotone in the nodes."""
    assert set(runs) >= {1, 2, 3, 4, 6, 8}
    for deadline_s in [1.001 * run for run in runs.values()]:
        expected = min(nodes for nodes, run in runs.items() if run <= deadline_s)
        fleet = fewest_devices([problem(deadline_s=deadline_s)], top=1)
        assert fleet.result.best.devices == expected
        assert fleet.attempts[-1].run_s == pytest.approx(runs[expected])
        assert fleet.result.best.optimality.status == "exact"


def test_every_smaller_size_is_accounted_for(runs):
    """Each is searched, or excluded by a bound that its own search keeps, or has no plan."""
    deadline_s = 1.001 * runs[MOST]
    fleet = fewest_devices([problem(deadline_s=deadline_s)], top=1)
    sizes = [n for a in fleet.attempts for n in range(a.devices - a.smaller_too, a.devices + 1)]
    assert sizes == list(range(1, fleet.result.best.devices + 1))
    kinds = {attempt.excluded_by for attempt in fleet.attempts}
    assert {"kernel time", ""} <= kinds
    for attempt in fleet.attempts:
        if attempt.run_s is not None:
            assert attempt.run_s == pytest.approx(runs[attempt.devices])
        elif attempt.run_at_least_s is not None:
            assert attempt.run_at_least_s > deadline_s
            assert runs.get(attempt.devices, attempt.run_at_least_s) >= attempt.run_at_least_s
        else:
            assert attempt.devices not in runs
            assert attempt.excluded_by == "no plan"


def test_deadline_that_no_size_meets_says_by_how_much_the_fastest_misses(runs):
    fastest = min(runs.values())
    with pytest.raises(Infeasible, match=r"the fastest size.*1\.05× too slow"):
        fewest_devices([problem(deadline_s=fastest / 1.05)])
    with pytest.raises(Infeasible, match="takes at least"):
        fewest_devices([problem(deadline_s=fastest / 100)])


def test_knob_that_no_size_has_is_a_mistake():
    with pytest.raises(SpecError, match="unknown knob"):
        fewest_devices([problem(deadline_s=1e5, fixed={"tpp": 2})])
    with pytest.raises(SpecError, match="no mesh"):
        fewest_devices([problem(deadline_s=1e5, fixed={"dp": 11})])


def test_machine_that_a_size_cannot_be_built_in_says_so():
    """19 nodes of 4 cannot share the 18-node domains of the rack equally."""
    largest = problem(cluster="gb200-nvl72:20x4", batch=60, fixed={"dp": 20, "pp": 4})
    run = run_s(largest, search(largest, 1).best.estimate.step_time_s)
    fleet = fewest_devices([replace(largest, deadline_s=1.01 * run)], top=1)
    assert fleet.result.best.devices == 80
    assert [a.excluded_by for a in fleet.attempts if a.devices == 76] == ["no mesh"]


@pytest.mark.parametrize(
    ("model", "cluster", "batch", "seq"),
    [
        ("gpt2", "a100:3x1", 24, 1024),
        ("llama3.1-8b", "h100:2x8", 64, 8192),
        ("llama3.1-8b", "l40s:2x8", 64, 2048),
        ("llama3.1-70b", "mi300x:4x8", 64, 4096),
        ("mixtral-8x7b", "h100:2x8", 64, 4096),
        ("deepseek-v2-lite", "h800:1x8", 64, 4096),
        ("bert-large-uncased", "rtx-3090:1x8", 64, 512),
        ("t5-11b", "a100:2x8", 64, 512),
        ("mamba2-2.7b", "a100:1x8", 64, 2048),
    ],
)
def test_no_plan_beats_its_kernels(model, cluster, batch, seq):
    one = problem(model, cluster, batch, seq)
    floor_s = kernel_floor_s(one)
    plans = search(one, 10).plans
    assert floor_s > 0.0
    for plan in plans:
        assert plan.estimate.step_time_s * plan.devices >= floor_s


def test_no_named_plan_beats_its_kernels():
    """Plans that the search would not list: everything sharded, tiny and huge micro-batches, unfused kernels."""
    one = problem("llama3.1-8b", "h100:2x8", 64, 4096)
    floor_s = kernel_floor_s(one)
    tried = 0
    for tp in (1, 2, 8):
        for extra in (
            {},
            {"pp": 2},
            {"cp": 2},
            {"micro_batch_size": 4},
            {"attention_kernel": "eager"},
            {"tensor_overlap": "chunked"},
            {"zero_stage": 3},
        ):
            try:
                plan = estimate(replace(one, fixed={"tp": tp, **extra}))
            except InvalidPlan:
                continue
            tried += 1
            assert plan.estimate.step_time_s * plan.devices >= floor_s
    assert tried >= 15


def test_kernels_take_the_same_on_every_size():
    """Nothing of the network and no number of nodes is in it."""
    floors = {
        nodes: kernel_floor_s(problem("llama3.1-8b", f"h100:{nodes}x8", 64, 4096)) for nodes in (1, 5, 64)
    }
    assert floors[5] == pytest.approx(floors[1])
    assert floors[64] == pytest.approx(floors[1])


def test_limit_leaves_the_best_plan_exact_or_nothing():
    one = problem(cluster="a100:4x1")
    best = search(one, 3)
    step_s = best.best.estimate.step_time_s
    limited = search(one, 3, limit_s=1.01 * step_s)
    assert limited.best.id == best.best.id
    assert limited.best.estimate.step_time_s == pytest.approx(step_s, rel=1e-12)
    assert limited.best.optimality.status == "exact"
    assert all(plan.estimate.step_time_s < 1.01 * step_s for plan in limited.plans)
    nothing = search(
        one, 3, limit_s=(1.0 - 1e-9) * step_s
    )  # a plan is summed in another order than its table
    assert nothing.plans == ()
    account = nothing.search
    fates = account.scored + sum(account.excluded_by_bound.values()) + sum(account.rejected.values())
    assert account.candidates == fates
    with pytest.raises(Infeasible):
        search(replace(one, fixed={"dp": 4}, workload=TrainWorkload(7, 1024)), 1, limit_s=1.0)
