"""Does the table of plans show distinct choices, and lose none?"""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner import Problem, TrainWorkload, load_cluster, load_model, load_stack, search
from planner.plans.plan import Plan
from planner.report.plan_table import rows, show_plans
from planner.report.terminal import Screen


@pytest.fixture(scope="module")
def best() -> Plan:
    problem = Problem(load_model("gpt2"), load_cluster("a100:1x4"), TrainWorkload(16, 1024), load_stack())
    return search(problem, 1).best


def variant(plan: Plan, slower: float, *, peak: float = 1.0, mesh=None, cluster=None, **knobs) -> Plan:
    memory = {name: peak * held for name, held in plan.estimate.memory_bytes.items()}
    step_s = plan.estimate.step_time_s * (1 + slower)
    interval = {name: [end * (1 + slower) for end in ends] for name, ends in plan.estimate.interval.items()}
    estimate = replace(plan.estimate, step_time_s=step_s, memory_bytes=memory, interval=interval)
    return replace(
        plan, estimate=estimate, knobs={**plan.knobs, **knobs}, mesh={**plan.mesh, **(mesh or {})},
        cluster=cluster or plan.cluster,
    )  # fmt: skip


def numbers(plans, objective="step_time"):
    return [(row.number, [number for number, _ in row.twins]) for row in rows(plans, objective)]


def test_near_twins_share_the_row_of_the_first(best):
    plans = [
        best,
        variant(best, 0.001, zero_group="node"),
        variant(best, 0.002, mesh={"tp": 2, "dp": 2}),
        variant(best, 0.003, zero_group="node", micro_batch_size=7),
        variant(best, 0.004, mesh={"tp": 2, "dp": 2}, zero_group="node"),
    ]
    assert numbers(plans) == [(1, [2, 4]), (3, [5])]


def test_what_a_reader_would_choose_between_has_its_own_row(best):
    """Another mesh, another cluster, more than half a percent, or more than two other knobs."""
    plans = [
        best,
        variant(best, 0.001, mesh={"tp": 2, "dp": 2}),
        variant(best, 0.002, cluster="h100-sxm:1x4"),
        variant(best, 0.003, zero_group="node", micro_batch_size=7, recompute="full"),
        variant(best, 0.009, zero_group="node"),
    ]
    assert numbers(plans) == [(n, []) for n in range(1, 6)]


def test_twins_are_measured_by_what_is_ranked(best):
    """A plan that costs 1 % more dollars is no twin, whatever its step time."""
    dear = replace(best.estimate, usd_per_step=1.01)
    cheap = replace(best, estimate=replace(best.estimate, usd_per_step=1.0))
    plans = [cheap, replace(cheap, estimate=dear, knobs={**best.knobs, "zero_group": "node"})]
    assert numbers(plans, "usd") == [(1, []), (2, [])]
    assert numbers(plans) == [(1, [2])]


@pytest.mark.parametrize("width", [60, 100, 160])
def test_every_plan_is_on_the_screen(best, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    plans = [
        best,
        variant(best, 0.001, zero_group="node"),
        variant(best, 0.002, peak=2.0, micro_batch_size=7),
        variant(best, 0.1, mesh={"tp": 2, "dp": 2}),
    ]
    show_plans(Screen(), plans, "step_time")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    text = " ".join(out.split())
    twice = f"{2 * best.estimate.memory_bytes['peak'] / 2**30:.1f}"
    assert "also #2 zero group node (+0.1 %)" in text
    assert f"#3 mb 7 (+0.2 %, {twice} GiB)" in text
    assert "+10.0%" in text


def test_without_joining_every_plan_has_a_row(best, capsys):
    show_plans(Screen(), [best, variant(best, 0.001, zero_group="node")], "step_time", joined=False)
    assert "also" not in capsys.readouterr().out
