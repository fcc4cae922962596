"""Intervals, the probability of running out of memory, ties, and what a prediction rests on."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

import planner
from planner.errors import SpecError
from planner.specs.stack import list_stacks
from planner.uncertainty import judgement as judgements
from planner.uncertainty.constants import constant_shares, constants_spread
from planner.uncertainty.judgement import time_spread
from planner.uncertainty.memory_limit import exceeded_bytes, room_bytes
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
from planner.uncertainty.terms import OUTSIDE, PEAK_TERMS, TIME_TERMS, peak_parts, terms_spread, time_parts
from planner.uncertainty.ties import pair_distance, tied, ties_with_first

# Quantiles of a normal distribution of mean 0 and deviation 0.1 (tables of the standard normal: z(0.95) = 1.645, z(0.9) = 1.282,
# z(0.75) = 0.674).
NORMAL = Spread((-0.16449, -0.12816, -0.06745, 0.0, 0.06745, 0.12816, 0.16449))
NOTHING = Spreads((0.0,) * 7, 0.01)


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


def test_large_errors_are_rarer_by_a_power_of_their_size():
    """5 % lie beyond the last quantile; with a power of two a quarter of them twice as far, and a sixteenth four times."""
    heavy = NORMAL._replace(tail=2.0)
    reach = 0.16449
    for times, chance in ((1.0, 0.05), (2.0, 0.0125), (4.0, 0.003125)):
        assert heavy.probability_above(1.0, math.exp(times * reach)) == pytest.approx(chance, rel=1e-3)
        assert heavy.probability_above(1.0, math.exp(-times * reach)) == pytest.approx(1.0 - chance, rel=1e-3)
    assert heavy.probability_above(1.0, 1.1) == NORMAL.probability_above(1.0, 1.1)


def test_a_process_is_less_certain_than_what_is_counted_of_it():
    """Half a percent of what is counted, 4 % beside it in a process, 3 % by its software: 0.5 and √(0.5² + 4² + 3²) = 5.02 %."""
    spreads = Spreads(tuple(10.0 * q for q in NORMAL.quantiles), floor=0.005, process=0.04)
    for spread, deviation in ((spreads.at(0.0, counted=True), 0.005), (spreads.at(0.03), 0.0502)):
        assert math.log(spread.interval(1.0)[1]) == pytest.approx(1.2816 * deviation, rel=1e-3)


def test_a_step_is_as_uncertain_as_its_terms():
    """Products known to 5 % in 60 % of a step and bubbles to 10 % in 40 %: √(3² + 4²) = 5 %; what is hidden counts beside."""
    known = {"matmul": 0.05, "pipeline_bubble": 0.1, "overlap": 0.5}
    assert terms_spread({"matmul": 0.6, "pipeline_bubble": 0.4}, known) == pytest.approx(0.05)
    assert terms_spread({"matmul": 1.0, "overlap": 0.24}, known) == pytest.approx(0.13)


def test_steps_that_wait_are_less_certain_than_steps_that_compute(problem):
    """The same job, of which the second spends a third of its step in the pipeline's bubble."""
    residuals = load_residuals()
    assembly = planner.examine(problem)
    step = assembly.plan.estimate
    waits = {**step.breakdown_s, "pipeline_bubble": 0.5 * step.step_time_s}
    narrow, wide = (
        time_spread(residuals, problem, sum(parts.values()), parts, assembly.spends).interval(1.0)
        for parts in (step.breakdown_s, waits)
    )
    assert wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])


def test_an_interval_is_as_wide_as_its_prediction_is_uncertain():
    """Two independent errors of 3 % and 4 % are one of 5 %."""
    normal = tuple(10.0 * q for q in NORMAL.quantiles)  # of deviation 1
    low, high = Spreads(normal, floor=0.03).at(0.04).interval(1.0)
    assert (math.log(low), math.log(high)) == pytest.approx((-1.2816 * 0.05, 1.2816 * 0.05))


def test_a_constant_moves_a_step_by_the_share_that_it_slows(problem):
    """A product known to 10 % in 60 % of the step, and attention to 20 % in 40 %: √(0.06² + 0.08²) = 10 %."""
    stack = problem.stack
    known = {"matmul_slowdown": 0.1, "attention_slowdown": 0.2}
    spread = {name: replace(getattr(stack, name), spread=value) for name, value in known.items()}
    shares = {"matmul_slowdown": 0.6, "attention_slowdown": 0.4}
    own = {name: replace(number, source="planner calibrate") for name, number in spread.items()}
    assert constants_spread(shares, replace(stack, **own), 0.3) == pytest.approx(0.1)
    assert constants_spread(shares, replace(stack, **spread), 0.3) == pytest.approx(
        0.3 * math.hypot(0.6, 0.4)
    )
    assert constants_spread(shares, stack, 0.3) == pytest.approx(0.3 * math.hypot(0.6, 0.4))


def test_shares_of_constants_are_of_the_busy_step(problem):
    """Products, attention, streams and exposed traffic are all that a dense step is made of; hidden traffic only stretches it."""
    shares = constant_shares(planner.examine(problem).spends, problem.stack.on_generation("hopper"))
    stretch = shares.pop("overlap_slowdown")
    assert sum(shares.values()) == pytest.approx(1.0, abs=0.01)
    assert 0.0 < stretch < 0.2
    assert max(shares, key=shares.get) == "matmul_slowdown"
    assert "grouped_matmul_slowdown" not in shares


def test_software_that_was_never_measured_widens_the_interval(problem):
    unknown = replace(problem, stack=replace(problem.stack, name="of-my-own"))
    measured, own = (planner.estimate(one).estimate.interval["step_time_s"] for one in (problem, unknown))
    assert own[1] - own[0] > 1.2 * (measured[1] - measured[0])


def test_a_spread_is_read_with_its_constant(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\nextends = "default"\n'
        'matmul_slowdown = { value = 1.2, kind = "fitted", spread = 0.07, source = "planner-defaults" }\n'
    )
    stack = planner.load_stack(path)
    assert stack.matmul_slowdown.spread == 0.07
    assert stack.attention_slowdown.spread == planner.load_stack().attention_slowdown.spread
    path.write_text(path.read_text().replace("0.07", "0"))
    with pytest.raises(SpecError, match="spread"):
        planner.load_stack(path)


def test_every_fitted_constant_of_training_says_how_well_it_is_known():
    names = (name for name in list_stacks() if planner.load_stack(name).serving is None)
    for name in names:
        stack = planner.load_stack(name)
        every = [getattr(stack, field) for field in stack.__dataclass_fields__]
        every += [constant for constants in stack.on.values() for constant in constants.values()]
        for constant in every:
            if getattr(constant, "source", "") == "published-training-runs":
                assert 0.0 < constant.spread < 1.0, name


def test_every_estimate_has_its_interval(problem):
    estimate = planner.estimate(problem).estimate
    spends = planner.examine(problem).spends
    spread = time_spread(load_residuals(), problem, estimate.step_time_s, estimate.breakdown_s, spends)
    assert estimate.interval["step_time_s"] == pytest.approx(spread.interval(estimate.step_time_s))
    assert estimate.interval["peak"][0] < estimate.interval["peak"][1]
    assert 0.0 <= estimate.oom_probability <= 1.0


def test_a_fuller_device_is_likelier_to_run_out_of_memory(problem):
    assembly = planner.examine(problem)
    pools = dict(assembly.plan.estimate.memory_bytes)
    peak = pools.pop("peak")
    roomy, tight = (
        judgements.judgement(problem, 1.0, {}, pools, assembly.spends, factor * peak)["oom_probability"]
        for factor in (1.6, 1.05)
    )
    assert roomy < 0.05 < tight


def test_memory_in_reserve_is_there_to_be_run_into(problem):
    """The same plan on the same device: what may be planned with changes nothing about where its memory ends."""
    chances = [
        planner.estimate(replace(problem, reserve=reserve)).estimate.oom_probability for reserve in (0.0, 0.3)
    ]
    assert chances[0] == pytest.approx(chances[1])


@pytest.mark.parametrize("risk", [0.01, 0.1, 0.5])
def test_what_fits_is_exceeded_with_the_chance_that_is_allowed(problem, risk):
    """The other way round: of a peak whose limit is the device's memory, the chance to exceed it is that of the limit."""
    job = replace(problem, max_oom_risk=risk)
    memory, software = float(problem.cluster.device.memory_bytes), 4e9
    peak = 0.9 * memory
    limit = float(exceeded_bytes(job, np.array([peak]), np.array([software]))[0])
    spread = load_residuals().peak.at(software / peak)
    assert spread.probability_above(peak, limit) == pytest.approx(risk, rel=1e-6)
    assert limit <= float(exceeded_bytes(job, np.array([1.01 * peak]), np.array([software]))[0])
    assert limit <= float(exceeded_bytes(job, np.array([peak]), np.array([1.01 * software]))[0])


def test_a_device_filled_with_activations_keeps_the_limit(problem):
    """So many bytes of framework, the rest activations of which a share is lost to fragments: that just fits."""
    idle, lost = 2e9, problem.stack.fragmentation.value
    room = float(room_bytes(problem, idle))
    software = idle + (room - idle) * lost / (1.0 + lost)
    exceeded = exceeded_bytes(problem, np.array([room]), np.array([software]))[0]
    assert exceeded == pytest.approx(float(problem.cluster.device.memory_bytes), rel=1e-6)
    assert float(room_bytes(replace(problem, max_oom_risk=1.0), idle)) == problem.memory_budget_bytes


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
    residuals = Residuals(NOTHING, NOTHING, (0.0, 1.0), (0.05, 0.05))
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
    residuals = load_residuals()
    assert set(residuals.step_time.terms) == {term.name for term in TIME_TERMS}
    assert {OUTSIDE} < set(residuals.peak.terms) <= {term.name for term in PEAK_TERMS}
    assert residuals.step_time.floor == residuals.step_time.terms[OUTSIDE]


def test_table_of_published_runs_survives_writing(tmp_path):
    runs = load_published_runs()
    assert len({run.row_id for run in runs}) == len(runs) > 400
    write_published_runs(tmp_path / "runs.csv", runs)
    assert read_published_runs(tmp_path / "runs.csv") == runs


@pytest.mark.parametrize(
    ("keys", "value", "found"),
    [
        (("step_time", "quantiles"), [0.0, 0.1], "7 numbers that do not fall"),
        (("step_time", "quantiles"), [6, 5, 4, 3, 2, 1, 0], "7 numbers that do not fall"),
        (("peak", "rows"), -1, "a number from 1"),
        (("peak", "floor"), 0.0, "a positive number"),
        (("peak",), None, "peak"),
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
