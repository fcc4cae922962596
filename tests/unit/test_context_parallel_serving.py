"""Caches split over tensor ranks: what fits, what it gains, who runs it, and how engines are told."""

import numpy as np
import pytest

import planner
from planner.errors import PlannerError
from planner.export.serving import export_serving
from planner.export.serving.readers import read_launch
from planner.serving.serve import serve
from planner.specs.serve_problem import ServeProblem
from planner.specs.stack import load_stack
from planner.specs.traffic import Traffic
from planner.techniques.serving import runs


def plan_of(model, cluster, engine="vllm", isl=8000, osl=390, weights=None, explore=(), **fixed):
    loaded = planner.load_model(model)
    problem = ServeProblem(
        loaded, planner.load_cluster(cluster), Traffic(isl, osl), load_stack(engine), (weights or loaded.checkpoint,),
        modes=("aggregated",), fixed=fixed, explore=explore,
    )  # fmt: skip
    return serve(problem, top=1).best


def test_whole_caches_hold_what_the_logs_say():
    """Kimi-K2-Thinking on 8 H200 without dcp: 715,072 tokens in 46.80 GiB (vllm-project/recipes, start-up logs)."""
    each = runs.cache_bytes_per_token(
        runs.run("cache_copies", lambda ledger, _: ledger, model="kimi-k2", tp=8)
    )
    assert 46.80 * 2**30 / each == pytest.approx(715_072, rel=1e-3)


def test_what_a_published_overload_gains():
    """Kimi-K2-Thinking on 8 H200, prompts of 8,000, answers of 388,750/998 tokens, 100 requests/s offered: with dcp 8 requests
    per second rise from 1.25 to 1.57 and tokens per second from 486 to 695 (vllm-project/recipes, moonshotai/Kimi-K2-Think.md;
    answers of the second run were longer)."""
    mesh = {"tp": 8, "pp": 1, "dp": 1, "ep": 1, "chunk_tokens": 8192, "replicas": 1}
    rates = [
        plan_of(
            "kimi-k2", "h200-sxm:1x8", weights="int4_wo", cache_copies=choice, **mesh
        ).estimate.goodput_requests_per_s
        for choice in ("kept", "dcp")
    ]
    assert 0.9 * 1.57 / 1.25 <= rates[1] / rates[0] <= 695 / 486


def test_as_many_times_the_sequences_fit():
    """Llama-3.1 8B has 8 key heads: of 16 ranks two share one, so that dcp 2 holds twice the requests (blocks round down)."""
    held = [
        plan_of(
            "llama3.1-8b", "h100-sxm:2x8", isl=100_000, tp=16, pp=1, replicas=1, cache_copies=choice
        ).estimate.max_concurrency
        for choice in ("kept", "dcp")
    ]
    assert held[1] == pytest.approx(2 * held[0], abs=1)


@pytest.mark.parametrize(
    ("engine", "model", "mesh", "reason"),
    [
        ("trtllm", "deepseek-v3", {"tp": 8}, "trtllm does not split"),
        ("sglang", "llama3.1-8b", {"tp": 16}, "sglang does not split"),
        ("vllm", "llama3.1-8b", {"tp": 8}, "hold no copies"),
        ("vllm", "gpt-oss-120b", {"tp": 16}, "with windows"),
    ],
)
def test_it_is_refused_by_name(engine, model, mesh, reason):
    with pytest.raises(PlannerError, match=reason):
        plan_of(model, "h200-sxm:2x8", engine, **mesh, cache_copies="dcp")


@pytest.mark.parametrize(
    ("engine", "flag"), [("vllm", "decode-context-parallel-size"), ("sglang", "dcp-size")]
)
def test_engines_are_told_and_read_back(engine, flag, tmp_path):
    plan = plan_of(
        "deepseek-v3", "h200-sxm:1x8", engine, tp=8, pp=1, dp=1, ep=8, etp=1, replicas=1, cache_copies="dcp"
    )
    for name, text in export_serving(plan, engine).items():
        (tmp_path / name).write_text(text)
    assert f"{flag}: 8" in (tmp_path / f"{engine}.yaml").read_text()
    assert read_launch(engine, str(tmp_path / "serve.sh"))[0].fixed["cache_copies"] == "dcp"


def test_the_search_tries_it_when_it_may():
    """Prompts of 100,000 tokens on one mesh whose ranks copy the latent: memory binds, and what holds more is found."""
    mesh = {"tp": 8, "pp": 1, "dp": 1, "replicas": 1}
    plain = plan_of("deepseek-v3", "h200-sxm:1x8", isl=100_000, osl=1000, **mesh)
    found = plan_of("deepseek-v3", "h200-sxm:1x8", isl=100_000, osl=1000, explore=("cache_copies=*",), **mesh)
    assert plain.pools[0].knobs["cache_copies"] == "kept"
    assert found.pools[0].knobs["cache_copies"] == "dcp"
    assert found.estimate.goodput_requests_per_s > plain.estimate.goodput_requests_per_s
    assert np.isclose(
        found.pools[0].knobs["max_sequences"], 8 * plain.pools[0].knobs["max_sequences"], rtol=0.2
    )
