"""What is said of the error of plans: intervals, ties, memory, and runs near the job."""

import io
from contextlib import redirect_stdout
from dataclasses import replace

import pytest

import planner
from planner.report.confidence import confidence, interval_text, out_of_memory_matters
from planner.report.plan_table import show_plans
from planner.report.terminal import Screen
from planner.report.totals import confidence_fields
from planner.uncertainty.nearest import far_of, far_without_source, is_far, nearby
from planner.uncertainty.published import load_published_runs


def job(model="llama2-7b", cluster="a100-sxm-80gb:4x8", batch=256, seq_len=2048, stack="pytorch-fsdp"):
    return planner.Problem(
        planner.load_model(model),
        planner.load_cluster(cluster),
        planner.TrainWorkload(batch, seq_len),
        planner.load_stack(stack),
        fixed={"zero_stage": "fsdp", "recompute": "full"},
    )


@pytest.fixture(scope="module")
def plan():
    return planner.estimate(job())


def printed(plans, monkeypatch, width=100):
    monkeypatch.setenv("COLUMNS", str(width))
    with redirect_stdout(io.StringIO()) as stream:
        show_plans(Screen(), plans, "step_time", joined=False)
    return stream.getvalue()


def slower(plan, by):
    """A plan with the same terms and another micro-batch, its matrix products slower by a fraction of the step."""
    e = plan.estimate
    terms = {**e.breakdown_s, "matmul": e.breakdown_s["matmul"] + by * e.step_time_s}
    estimate = replace(e, step_time_s=(1.0 + by) * e.step_time_s, breakdown_s=terms)
    interval = {**e.interval, "step_time_s": [end * (1.0 + by) for end in e.interval["step_time_s"]]}
    return replace(
        plan, estimate=replace(estimate, interval=interval), knobs={**plan.knobs, "micro_batch_size": 7}
    )


def test_interval_stands_beside_the_step_of_one_plan(plan, monkeypatch):
    text = f"{plan.estimate.step_time_s:.3f} {interval_text(plan.estimate)}"
    assert text in printed([plan], monkeypatch)


def test_interval_that_all_plans_share_is_said_once(plan, monkeypatch):
    shown = printed([plan, slower(plan, 0.5)], monkeypatch)
    assert shown.count(interval_text(plan.estimate)) == 1
    assert f"step s {interval_text(plan.estimate)}" in shown


def test_a_tie_is_marked_and_a_clear_order_is_not(plan, monkeypatch):
    """A hundredth of a step is less than repeats of one run differ by, half a step is more than any published pair's noise."""
    assert "~+1.0%" in printed([plan, slower(plan, 0.01)], monkeypatch)
    shown = printed([plan, slower(plan, 0.5)], monkeypatch)
    assert "+50.0%" in shown
    assert "~+50.0%" not in shown


def test_probability_of_running_out_is_shown_where_it_matters(plan, monkeypatch):
    roomy, tight = (replace(plan, estimate=replace(plan.estimate, oom_probability=p)) for p in (1e-4, 0.3))
    assert not out_of_memory_matters([roomy])
    assert "OOM" not in printed([roomy], monkeypatch)
    shown = printed([roomy, replace(tight, knobs={**plan.knobs, "micro_batch_size": 7})], monkeypatch)
    assert "OOM" in shown
    assert "<1%" in shown
    assert "30%" in shown


def test_a_plan_that_may_run_out_of_memory_comes_with_what_to_do(plan):
    """Nine of ten peaks lie below the upper end of the interval: with a fifth more, a sixth is kept in reserve."""
    peak = plan.estimate.memory_bytes["peak"]
    interval = {**plan.estimate.interval, "peak": (0.9 * peak, 1.2 * peak)}
    risky, safe = (
        replace(plan, estimate=replace(plan.estimate, interval=interval, oom_probability=p))
        for p in (0.27, 0.05)
    )
    assert any("(27%): --max-oom-risk 10%" in line for line in confidence([risky], job()))
    assert not any("--max-oom-risk" in line for line in confidence([safe], job()))


def test_plans_without_an_interval_are_shown_without_one(plan, monkeypatch):
    """As those that an earlier version wrote."""
    old = replace(plan, estimate=replace(plan.estimate, interval=None, oom_probability=None, provenance=None))
    assert f"{old.estimate.step_time_s:.3f} " in printed([old], monkeypatch)
    assert confidence([old], job()) == []


def test_what_is_said_of_a_job_that_was_measured(plan):
    told = " ".join(confidence([plan, slower(plan, 0.01)], job()))
    for words in (
        "80 % of measurements",
        "pytorch-fsdp on ampere: its constants are fitted",
        "~ ties with plan 1: plan 2",
        "near this job: ",
        "median",
    ):
        assert words in told


def test_what_is_said_of_a_job_that_was_never_measured():
    problem = replace(job(cluster="mi300x:4x8"), fixed={"tp": 2, "zero_stage": 3, "recompute": "full"})
    told = " ".join(confidence([planner.estimate(problem)], problem))
    assert "pytorch-fsdp on cdna3: of which there is no published run" in told
    assert "near this job: no published run" in told


def test_runs_near_a_job_are_like_it():
    """MPT 7B-class runs on 8 to 128 A100, published by MosaicML, are the nearest to a 7B model on 32."""
    near = nearby(job(stack="composer"))
    assert len(near.runs) >= 5
    for run in near.runs:
        assert (run.stack, run.accelerator, run.experts) == ("composer", "a100-sxm-80gb", False)
        assert 8 <= run.devices <= 128
        assert 512 <= run.seq_len <= 8192
    errors = sorted(abs(run.error_without_model) for run in near.runs)
    assert near.worst_error == errors[-1]
    assert errors[0] <= near.median_error <= errors[-1]


def test_farther_runs_count_where_there_are_no_nearer_ones():
    """Mixtures of experts on Hopper were measured under other stacks alone."""
    near = nearby(job(model="mixtral-8x7b", cluster="h100-sxm:4x8", stack="internlm"))
    assert all(run.experts and run.generation == "hopper" for run in near.runs)
    assert "with internlm" not in near.alike


def test_document_names_ties_and_the_nearest_runs(plan):
    found = confidence_fields([plan, slower(plan, 0.01), slower(plan, 0.5)], job())
    assert found["ties"] == [slower(plan, 0.01).id]
    assert found["nearest"]["runs"] == len(nearby(job()).runs)
    known = {run.source for run in load_published_runs()}
    assert set(found["nearest"]["sources"]) <= known


def test_a_job_is_near_runs_of_its_software_kind_and_size():
    """InternLM was measured with 7B on 8 to 64 A100: on 128 it is within a factor of two of them, on 256 it is not."""
    near = job(stack="internlm", cluster="a100-sxm-80gb:16x8")
    own = replace(near, stack=replace(near.stack, name="of-my-own"))
    assert not is_far(near, measured=True)
    assert is_far(job(stack="internlm", cluster="a100-sxm-80gb:32x8"), measured=True)
    assert is_far(own, measured=True)
    assert not is_far(own, measured=False)
    assert is_far(replace(near, model=planner.load_model("mixtral-8x7b")), measured=True)


def test_a_run_is_no_neighbour_of_its_own_and_held_out_runs_are_none():
    run = next(run for run in load_published_runs() if run.error is not None and not run.held_out)
    assert far_of([run]) == [True]
    assert far_of([run, run]) == [False, False]
    assert far_of([run, run._replace(row_id="held_out-1")]) == [True, False]
    assert far_without_source([run, run]) == [True, True]
    assert far_without_source([run, run._replace(source="another", stack="other")]) == [False, False]
