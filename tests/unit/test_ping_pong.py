"""Attention and experts on devices of their own: the paper's equations and ablation, and plans whose pools add up."""

from dataclasses import replace

import numpy as np
import pytest

import planner
from planner.costs.serving import ping_pong_s
from planner.engine.pricer import Pricer
from planner.errors import PlannerError
from planner.export.serving import export_serving
from planner.load.requests import Lengths, draw
from planner.load.results import summarize
from planner.serving.candidates import Account
from planner.serving.deployment import deployment_of, run
from planner.serving.ping_pong import ping_pong_kinds
from planner.serving.pools import decode_kinds
from planner.serving.replay import account, reprice
from planner.serving.serve import serve
from planner.serving.space import ServeSpace
from planner.specs.serve_problem import ServeProblem
from planner.specs.stack import load_stack
from planner.specs.traffic import Traffic


def problem(model="dbrx", stack="trtllm", **fixed):
    """MegaScale-Infer's testbed: 64 A100, prompts of 571 and answers of 159 tokens, at most 150 ms between tokens."""
    return ServeProblem(
        planner.load_model(model), planner.load_cluster("a100-sxm-80gb:8x8"), Traffic(571, 159, tpot_s=0.15),
        load_stack(stack), fixed=fixed, modes=("ping_pong",),
    )  # fmt: skip


def per_device(problem, kinds):
    """The most answers per second and device of replicas that generate."""
    pricer = Pricer(problem.cluster, problem.stack)
    found = kinds(problem, ServeSpace(problem, "decode"), pricer, Account())
    return max(float((d.rate / d.kind.size).max()) for d in found)


@pytest.mark.parametrize(("way", "needed"), [(0.0, 2), (0.4, 3), (0.5, 3), (0.9, 4)])
def test_micro_batches_that_hide_the_way(way, needed):
    """m ≥ 2 (1 + C/F) (arXiv:2504.02263, equation 3): then T = A + E + 2C + F (m L − 1) (equation 5), else sides wait."""
    layers, busy = 40.0, np.array([0.8, 1.0])
    whole = float(ping_pong_s(*busy, way, layers, needed))
    balanced = float(ping_pong_s(1.0, 1.0, way, layers, needed))
    assert balanced == pytest.approx(2.0 + 2.0 * way + needed * layers - 1.0)
    assert whole < balanced
    if needed > 2:
        assert float(ping_pong_s(1.0, 1.0, way, layers, needed - 1)) > (needed - 1) * layers + 1.0 + 2.0 * way


@pytest.mark.parametrize("model", ["mixtral-8x22b", "dbrx"])
def test_against_tensor_parallelism(model):
    """Up to 1.28 times TensorRT-LLM's tokens per device, both models (figure 8a, second hand); nothing says for which of them."""
    split = per_device(problem(model), ping_pong_kinds)
    whole = problem(model, dp=1, pp=1, experts="gathered", micro_batches="1")
    assert 1.0 < split / per_device(whole, decode_kinds) < 1.28


def test_a_plan_has_three_pools_on_the_devices_that_are_there():
    best = serve(problem(), top=1).best
    prompts, attention, experts = best.pools
    assert (best.mode, prompts.role, attention.role, experts.role) == (
        "ping_pong",
        "prefill",
        "attention",
        "experts",
    )
    assert best.devices == prompts.devices + attention.devices + experts.devices <= 64
    assert experts.mesh["ep"] * experts.replicas == experts.devices
    assert best.estimate.tpot_s["mean"] <= 0.15
    assert attention.in_flight == experts.in_flight > int(attention.knobs["batches_in_turn"])
    assert best.estimate.output_tokens_per_s_per_device * best.devices == pytest.approx(
        best.estimate.goodput_requests_per_s * 159
    )


def test_a_model_without_experts_has_nothing_to_part():
    dense = replace(problem(), model=planner.load_model("llama3.1-8b"))
    with pytest.raises(PlannerError, match="no experts in llama3"):
        serve(dense, top=1)


def test_every_plan_of_a_file_is_priced_again_as_it_was():
    for plan in serve(problem(), top=3).plans:
        again = reprice(plan)
        assert again.id == plan.id
        assert again.estimate == plan.estimate


def test_seconds_of_a_token_by_what_they_wait_for():
    """Equation 5 of the paper by its terms, and either side by its kernels."""
    plan = serve(problem(), top=1).best
    both, attention, experts, prompts = account(plan)
    (token,), (a,), (e,) = (pool["iterations"] for pool in (both, attention, experts))
    assert sum(item["seconds"] for item in token["items"]) == pytest.approx(token["seconds"])
    assert token["seconds"] == pytest.approx(
        plan.estimate.tpot_s["mean"], rel=0.05
    )  # between loads tried, by a line
    for side in (a, e):
        assert sum(item["seconds"] for item in side["items"]) == pytest.approx(side["seconds"], rel=0.02)
    busy = next(item["seconds"] for item in token["items"] if item["what"].endswith("at work"))
    batches = int(plan.pools[1].knobs["batches_in_turn"])
    assert busy == pytest.approx(batches * max(a["seconds"], e["seconds"]))
    assert {item["what"] for item in e["items"]} >= {"moe.fc1", "moe.fc2"}
    assert not {item["what"] for item in a["items"]} & {item["what"] for item in e["items"]}
    assert prompts["role"] == "prefill"


def test_simulated_replicas_take_a_turn_for_a_token():
    """At a light load every answer has the time between tokens that the paper's equation gives for what is in flight."""
    plan = serve(problem(), top=1).best
    deployment = deployment_of(plan)
    assert [stage.role for stage in deployment.stages] == ["prefill", "decode"]
    done = run(deployment, draw(Lengths(571, 159), 600, rate_per_s=2.0 * plan.pools[1].replicas, seed=1))
    found = summarize(done, 0.2)
    (engine,) = (stage for stage in deployment.stages if stage.role == "decode")
    held = 1.0 + 2.0 * found.tpot_s.mean * 158.0  # Little's law, of a replica, and the answer that sees them
    assert found.tpot_s.mean == pytest.approx(float(engine.iteration(held, held * 650.5, 0.0, 0.0)), rel=0.05)
    assert engine.pool.blocks > 0


def test_what_no_engine_runs_is_not_exported():
    with pytest.raises(PlannerError, match="attention and experts apart"):
        export_serving(serve(problem(), top=1).best, "vllm")
