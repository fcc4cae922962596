"""Attention and experts on devices of their own: the paper's equations and ablation, and plans whose pools add up."""

from dataclasses import replace

import numpy as np
import pytest

import planner
from planner.costs.serving import ping_pong_s
from planner.engine import Pricer
from planner.errors import PlannerError
from planner.export.serving import export_serving
from planner.serving.candidates import Account
from planner.serving.ping_pong import ping_pong_kinds
from planner.serving.pools import decode_kinds
from planner.serving.replay import problem_of
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


def test_what_no_engine_runs_is_neither_exported_nor_priced_again():
    best = serve(problem(), top=1).best
    for use in (problem_of, lambda plan: export_serving(plan, "vllm")):
        with pytest.raises(PlannerError, match="ping_pong"):
            use(best)
