"""Static batches as a mode of serving: what they take, by the simulator, and what continuous batching gains over them."""

import json

import numpy as np
import pytest

import planner
from planner.costs.queueing import static_batch_occupancy
from planner.errors import PlannerError
from planner.load.requests import Lengths, draw
from planner.load.results import summarize
from planner.serving.deployment import deployment_of, run
from planner.serving.replay import reprice
from planner.serving.serve import serve
from planner.serving.static_batch import longest_answer
from planner.specs.serve_problem import ServeProblem
from planner.specs.stack import load_stack
from planner.specs.traffic import Traffic


def plan_of(mode="static", devices=2, **traffic):
    problem = ServeProblem(
        planner.load_model("llama3.1-8b"), planner.load_cluster(f"h100-sxm:1x{devices}"), Traffic(500, 200, **traffic),
        load_stack("vllm"), modes=(mode,),
    )  # fmt: skip
    return serve(problem, top=1).best


def simulated(plan, count):
    lengths = Lengths(500, 200, 0.0, plan.traffic["length_scv"])
    clients = plan.traffic.get("concurrency")
    rate = None if clients else plan.estimate.goodput_requests_per_s
    requests = draw(lengths, count, rate_per_s=rate, seed=3)
    done = run(deployment_of(plan), requests, concurrency=clients)
    return summarize(done, 0.1)


@pytest.mark.parametrize(
    "traffic",
    [
        {"ttft_s": 0.8},
        {"ttft_s": 1.5},
        {"tpot_s": 0.01},
        {"ttft_s": 4.0, "length_scv": 1.0},
    ],
)
def test_arrivals_wait_as_in_the_simulator(traffic):
    """Inoue's response with batches as long as their longest answer: within a tenth of the simulated wait."""
    plan = plan_of(**traffic)
    assert plan.mode == "static"
    found = simulated(plan, 12_000)
    assert plan.estimate.ttft_s["mean"] == pytest.approx(found.ttft_s.mean, rel=0.1)
    if not plan.traffic["length_scv"]:  # of unlike answers, the shorter ones wait longer per token
        assert plan.estimate.tpot_s["mean"] == pytest.approx(found.tpot_s.mean, rel=0.03)


def test_clients_that_replace_answers_make_one_batch():
    plan = plan_of(concurrency=64)
    found = simulated(plan, 1_280)
    assert plan.estimate.ttft_s["mean"] == pytest.approx(found.ttft_s.mean, rel=0.02)
    assert plan.estimate.tpot_s["mean"] == pytest.approx(found.tpot_s.mean, rel=0.03)


def test_a_batch_lasts_as_long_as_its_longest_answer():
    """Exponential answers: 1/H_b of the slots work (Kleinrock, vol. 1, section 2.3)."""
    sizes = np.array([1.0, 8.0, 32.0, 128.0])
    longest, _ = longest_answer(Traffic(1, 200, length_scv=1.0), sizes)
    assert 200.0 / longest == pytest.approx(static_batch_occupancy(sizes.astype(int)), rel=0.01)


@pytest.mark.parametrize("traffic", [{"ttft_s": 1.5, "tpot_s": 0.02}, {"ttft_s": 6.0, "length_scv": 1.0}])
def test_iteration_level_batching_answers_more(traffic):
    """The claim that Orca made (Yu et al. 2022): under the same limits, more requests on the same devices."""
    rates = [plan_of(mode, **traffic).estimate.goodput_requests_per_s for mode in ("static", "aggregated")]
    assert rates[1] > 1.5 * rates[0]


def test_a_rate_takes_replicas_and_limits_bind():
    limited = plan_of(devices=8, ttft_s=1.5, rate_per_s=40.0)
    assert limited.estimate.goodput_requests_per_s == pytest.approx(40.0)
    assert limited.estimate.ttft_s["mean"] <= 1.5
    assert plan_of(ttft_s=1.5).estimate.binding == "ttft"
    with pytest.raises(PlannerError, match="--ttft-ms"):
        plan_of(ttft_s=0.01)
    with pytest.raises(PlannerError, match="--rate"):
        plan_of(ttft_s=1.5, rate_per_s=1e5)


def test_the_plan_is_priced_again_alike():
    plan = plan_of(ttft_s=1.5)
    again = reprice(plan)
    assert (again.mode, again.pools) == ("static", plan.pools)
    assert again.estimate == plan.estimate
    assert json.loads(json.dumps(plan.as_dict()))["mode"] == "static"
