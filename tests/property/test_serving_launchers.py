"""A search for an engine returns what that engine's export takes, and finds what a free search finds where no rule is met."""

from dataclasses import replace

import numpy as np
import pytest

import planner
from planner.export.serving import find_serving_exporter, serving_problems
from planner.export.serving.rules import SERVING_LAUNCHERS
from planner.export.serving.target import ServingTarget
from planner.serving.launcher import nodes_taken, seated
from planner.serving.serve import serve
from planner.specs.serve_problem import ServeProblem
from planner.specs.speculation import Speculation
from planner.specs.stack import load_stack
from planner.specs.traffic import Traffic

PROBLEMS = {
    "dense": ("qwen3-32b", "h200-sxm:4x8", ("fp8",), Traffic(4000, 500, ttft_s=1.0, tpot_s=0.02)),
    "experts": ("mixtral-8x7b", "h100-sxm:2x8", ("bf16",), Traffic(2000, 300, ttft_s=2.0, tpot_s=0.03)),
    "latent": ("deepseek-v3", "h200-sxm:4x8", ("fp8_block",), Traffic(4000, 500, ttft_s=1.5, tpot_s=0.04)),
    "windows": (
        "gpt-oss-120b",
        "h100-sxm:2x8",
        ("w4a16_mxfp4",),
        Traffic(2000, 300, ttft_s=2.0, tpot_s=0.03),
    ),
    "odd nodes": ("llama3.1-8b", "a100-sxm-80gb:3x6", ("bf16",), Traffic(2000, 300, ttft_s=2.0, tpot_s=0.03)),
}


def problem_of(name, engine, **changes):
    model, cluster, formats, traffic = PROBLEMS[name]
    return ServeProblem(
        planner.load_model(model), planner.load_cluster(cluster), traffic, load_stack(engine), formats,
        launcher=SERVING_LAUNCHERS[engine], **changes,
    )  # fmt: skip


@pytest.mark.parametrize("engine", SERVING_LAUNCHERS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_plan_of_a_search_for_an_engine_is_exported(name, engine):
    exporter = find_serving_exporter(engine)
    for plan in serve(problem_of(name, engine), top=20).plans:
        target = ServingTarget(plan)
        assert serving_problems(target, exporter) == []
        assert target.nodes <= sum(group.nodes for group in target.problem.cluster.groups)


def test_drafts_of_the_prompt_keep_to_the_engine_as_well():
    drafts = Speculation("ngram", 0.6, (3,))
    for plan in serve(problem_of("latent", "sglang", speculation=drafts), top=20).plans:
        assert serving_problems(ServingTarget(plan), find_serving_exporter("sglang")) == []


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_best_without_rules_and_exported_all_the_same_is_found_under_them(name):
    problem = problem_of(name, "vllm")
    free = serve(replace(problem, launcher=None), top=1).best
    bound = serve(problem, top=1).best
    most, found = (plan.estimate.goodput_requests_per_s for plan in (free, bound))
    if not serving_problems(ServingTarget(free), find_serving_exporter("vllm")):
        assert found >= most * (1.0 - 1e-9)


def test_nodes_are_counted_as_replicas_are_seated():
    """Against seating one replica after the other, the largest first, on the node of the last or on the next."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        per_node = int(rng.choice([4, 6, 8, 72]))
        sizes = rng.choice([1, 2, 3, 4, 6, 8, 16], size=2)
        sizes = np.where(sizes > per_node, -(-sizes // per_node) * per_node, sizes)
        counts = rng.integers(1, 9, size=2)
        node, free = 0, 0
        for size in sorted(np.repeat(sizes, counts), reverse=True):
            if size >= per_node:
                node, free = node + size // per_node, 0
            elif size <= free:
                free -= size
            else:
                node, free = node + 1, per_node - size
        found = nodes_taken(float(per_node), sizes[:, None].astype(float), counts[:, None].astype(float))
        assert found.tolist() == [node]


def test_odd_nodes_hold_fewer_replicas_than_devices_say():
    # 3 nodes of 6: one replica of 4 on each, where 18 devices would be room for 4.
    assert seated(planner.load_cluster("a100-sxm-80gb:3x6"), np.array([4.0])).tolist() == [3.0]
