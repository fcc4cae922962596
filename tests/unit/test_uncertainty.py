"""Intervals, the probability of running out of memory, ties, and what a prediction rests on."""

import json
import math
from dataclasses import replace

import pytest

import planner
from planner.errors import SpecError
from planner.uncertainty import judgement as judgements
from planner.uncertainty.published import load_published_runs, read_published_runs, write_published_runs
from planner.uncertainty.residuals import (
    FILE,
    PROBABILITIES,
    Residuals,
    Spread,
    Spreads,
    load_residuals,
    read_residuals,
)
from planner.uncertainty.terms import OUTSIDE, PEAK_TERMS, TIME_TERMS, peak_parts, time_parts
from planner.uncertainty.ties import pair_distance, tied, ties_with_first

# Quantiles of a normal distribution of mean 0 and deviation 0.1 (tables of the standard normal: z(0.95) = 1.645, z(0.9) = 1.282,
# z(0.75) = 0.674).
NORMAL = Spread((-0.16449, -0.12816, -0.06745, 0.0, 0.06745, 0.12816, 0.16449), rows=100, models=10)


@pytest.fixture(scope="module")
def problem():
    return planner.Problem(
        planner.load_model("llama3.1-8b"),
        planner.load_cluster("h100-sxm:2x8"),
        planner.TrainWorkload(64, 8192),
        planner.load_stack("pytorch-fsdp"),
        fixed={"zero_stage": "fsdp", "recompute": "full", "tp": 2},
    )


@pytest.mark.parametrize("z", [-3.0, -1.6449, -1.0, 0.0, 0.5, 1.2816, 2.5])
def test_probability_of_a_normal_spread_is_the_normal_one(z):
    """Between and beyond the stored quantiles."""
    expected = 0.5 * math.erfc(z / math.sqrt(2.0))
    assert NORMAL.probability_above(1.0, math.exp(0.1 * z)) == pytest.approx(expected, abs=2e-3)


def test_interval_is_between_the_outer_tenths():
    low, high = NORMAL.interval(100.0)
    assert (low, high) == pytest.approx((100 * math.exp(-0.12816), 100 * math.exp(0.12816)))
    assert NORMAL.probability_above(100.0, low) == pytest.approx(0.9, abs=1e-4)
    assert NORMAL.probability_above(100.0, high) == pytest.approx(0.1, abs=1e-4)


def test_what_was_never_measured_takes_the_pooled_spread():
    wide = Spread(tuple(2.0 * q for q in NORMAL.quantiles))
    spreads = Spreads(wide, {("default", "hopper"): NORMAL})
    assert spreads.of("default", "hopper") is NORMAL
    assert spreads.of("default", "a generation of tomorrow") is wide


def test_shipped_pooled_interval_is_wider_than_most_groups():
    """A prediction for unknown software or hardware must not look surer than one for known."""
    for spreads in (load_residuals().step_time, load_residuals().peak):
        widths = sorted(s.quantiles[5] - s.quantiles[1] for s in spreads.groups.values())
        assert spreads.pooled.quantiles[5] - spreads.pooled.quantiles[1] >= widths[len(widths) // 2]


def test_every_estimate_has_its_interval(problem):
    estimate = planner.estimate(problem).estimate
    spread = load_residuals().step_time.of("pytorch-fsdp", "hopper", "dense, model-parallel")
    assert estimate.interval["step_time_s"] == pytest.approx(spread.interval(estimate.step_time_s))
    assert estimate.interval["peak"][0] < estimate.interval["peak"][1]
    assert 0.0 <= estimate.oom_probability <= 1.0


def test_a_fuller_device_is_likelier_to_run_out_of_memory(problem):
    peak = planner.estimate(problem).estimate.memory_bytes["peak"]
    total = float(problem.cluster.device.memory_bytes)
    roomy, tight = (
        planner.estimate(replace(problem, reserve=1.0 - factor * peak / total)).estimate.oom_probability
        for factor in (1.6, 1.05)
    )
    assert roomy < 0.05 < tight


def test_without_residuals_an_estimate_says_nothing(problem, monkeypatch):
    monkeypatch.setattr(judgements, "load_residuals", lambda: None)
    estimate = planner.estimate(problem).estimate
    assert (estimate.interval, estimate.oom_probability) == (None, None)


def test_weakest_constant_decides(problem):
    """With every constant measured but one, that one is the provenance; what the plan never does cannot weaken it."""
    found = planner.estimate(problem).estimate.provenance
    assert found["step_time_s"] == "assumed"
    assert "stack.dispatch_s" in found["assumed"]
    assert not [name for name in found["assumed"] if "4bit" in name or "grouped" in name]
    single = replace(problem, cluster=planner.load_cluster("h100-sxm:1x1"), fixed={})
    assert not [
        n
        for n in planner.estimate(single).estimate.provenance["assumed"]
        if n.startswith(("nic", "scale_up"))
    ]


def test_provenance_of_the_peak_is_of_the_constants_of_memory(problem):
    stack = problem.stack
    names = ("framework_bytes", "communicator_bytes", "fragmentation", "gradient_bucket_bytes")
    fitted = replace(stack, **{name: replace(getattr(stack, name), kind="fitted") for name in names})
    found = planner.estimate(replace(problem, stack=fitted)).estimate.provenance
    assert (found["peak"], found["step_time_s"]) == ("fitted", "assumed")


def test_plans_that_differ_little_are_ties(problem):
    first = planner.estimate(problem)
    spread = Spreads(NORMAL)
    residuals = Residuals(spread, spread, (0.0, 1.0), (0.05, 0.05))
    slower = replace(first.estimate, step_time_s=1.04 * first.estimate.step_time_s)
    much_slower = replace(first.estimate, step_time_s=1.06 * first.estimate.step_time_s)
    assert tied(first.estimate, slower, residuals)
    assert not tied(first.estimate, much_slower, residuals)
    assert not tied(first.estimate, slower, None)
    plans = [first, replace(first, estimate=replace(slower, step_time_s=first.estimate.step_time_s))]
    assert ties_with_first(plans) == (first.id,)
    assert ties_with_first([first, replace(plans[1], cluster="elsewhere")]) == ()


def test_distance_of_plans_counts_what_they_spend_differently(problem):
    one = planner.estimate(problem).estimate
    other = replace(one, breakdown_s={**one.breakdown_s, "pipeline_bubble": 0.25 * one.step_time_s})
    assert pair_distance(one, one) == 0.0
    assert pair_distance(one, other) == pytest.approx(0.25)


def test_parts_of_a_step(problem):
    assembly = planner.examine(problem)
    estimate = assembly.plan.estimate
    parts = time_parts(estimate.step_time_s, estimate.breakdown_s, assembly.spends, 5e-6)
    assert set(parts) <= {term.name for term in TIME_TERMS}
    inside = sum(s for name, s in parts.items() if name not in ("overlap", "host_dispatch", OUTSIDE))
    assert inside == pytest.approx(estimate.step_time_s)
    assert parts["overlap"] == pytest.approx(sum(s.alone_s - s.seconds for s in assembly.spends))
    assert parts[OUTSIDE] == estimate.step_time_s


def test_parts_of_a_peak_leave_out_what_was_not_counted(problem):
    memory_bytes = planner.estimate(problem).estimate.memory_bytes
    parts = peak_parts(memory_bytes, ("framework", "communicators"))
    assert set(parts) <= {term.name for term in PEAK_TERMS}
    whole = memory_bytes["peak"] - memory_bytes["framework"] - memory_bytes["communicators"]
    assert parts[OUTSIDE] == pytest.approx(whole)


def test_every_term_has_a_shipped_uncertainty():
    terms = load_residuals().terms
    assert set(terms["step_time"]) <= {term.name for term in TIME_TERMS}
    assert set(terms["peak"]) <= {term.name for term in PEAK_TERMS}
    assert OUTSIDE in terms["step_time"]


def test_table_of_published_runs_survives_writing(tmp_path):
    runs = load_published_runs()
    assert len({run.row_id for run in runs}) == len(runs) > 400
    write_published_runs(tmp_path / "runs.csv", runs)
    assert read_published_runs(tmp_path / "runs.csv") == runs


@pytest.mark.parametrize(
    ("keys", "value", "found"),
    [
        (("step_time", "pooled", "quantiles"), [0.0, 0.1], "7 numbers that do not fall"),
        (("step_time", "pooled", "quantiles"), [6, 5, 4, 3, 2, 1, 0], "7 numbers that do not fall"),
        (("peak", "pooled", "rows"), -1, "a number from 1"),
        (("peak", "pooled"), None, "pooled"),
        (("pairs", "noises"), ["much"], "a list of finite numbers"),
        (("step_time", "more"), 1, "unknown key"),
    ],
)
def test_wrong_residuals_are_refused(tmp_path, keys, value, found):
    data = json.loads(FILE.read_text())
    table = data
    for key in keys[:-1]:
        table = table[key]
    table[keys[-1]] = value
    path = tmp_path / "residuals.json"
    path.write_text(json.dumps(data))
    with pytest.raises(SpecError, match=found):
        read_residuals(path)


def test_quantiles_are_stored_at_the_probabilities_that_intervals_use():
    assert {0.1, 0.5, 0.9} < set(PROBABILITIES)
