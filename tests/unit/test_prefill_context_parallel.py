"""Prompts shared by ranks: published times, where it is searched, who runs it, and how engines are told."""

from dataclasses import replace

import numpy as np
import pytest
import yaml

import planner
from planner.engine.pricer import Pricer
from planner.errors import PlannerError
from planner.export.serving import export_serving
from planner.export.serving.readers import read_launch
from planner.export.serving.rules import SERVING_LAUNCHERS
from planner.mesh import Mesh
from planner.serving.candidates import iterations_of
from planner.serving.replay import account, reprice
from planner.serving.serve import serve
from planner.serving.space import recipe_of
from planner.specs.serve_problem import ServeProblem
from planner.specs.stack import load_stack
from planner.specs.traffic import Traffic
from planner.techniques.serving import runs
from planner.techniques.serving.prompt_ranks.prefill_context_parallel import TECHNIQUE

META = "h100-hbm2e-96gb"


def meta_s(nodes, tokens=128_000.0, tp=8):
    """A prompt of Llama 3 405B on nodes of 8. The paper's fp8 is that of the feed-forward networks alone; here all layers'."""
    one, cp = np.ones(1), 8 * nodes // tp
    problem = ServeProblem(
        planner.load_model("llama3.1-405b"), planner.load_cluster(f"{META}:{nodes}x8"), Traffic(int(tokens), 1),
        load_stack("vllm"),
    )  # fmt: skip
    recipe = recipe_of({"weights": "fp8", "prompt_ranks": "pass_kv" if cp > 1 else "alone"})
    mesh = Mesh(one * tp, one * cp, one, one, one, one * tp)
    pricer = Pricer(problem.cluster, problem.stack)
    return float(iterations_of(problem, recipe, mesh, pricer)(0.0, 0.0, tokens, (tokens + 1.0) / 2.0))


# Yang et al. 2024 (arXiv:2411.01783): Table 7 (1, 2, 4 nodes), section 4.2.1 (8 nodes). No constant was fitted to them.
@pytest.mark.parametrize(("nodes", "measured_s"), [(1, 42.010), (2, 21.042), (4, 10.950), (8, 5.85)])
def test_published_times_to_the_first_token(nodes, measured_s):
    assert meta_s(nodes) == pytest.approx(measured_s, rel=0.13)


def test_a_million_tokens_on_sixteen_nodes():
    assert meta_s(16, 1e6) == pytest.approx(77.0, rel=0.08)  # section 4.2.3


def test_tensor_parallelism_over_nodes_is_slower():
    """Table 7: 29,917 ms with tp 16 and 21,042 with cp 2; 19,841 with tp 32 and 10,950 with cp 4."""
    for nodes, measured in ((2, 29.917 / 21.042), (4, 19.841 / 10.950)):
        assert meta_s(nodes, tp=8 * nodes) / meta_s(nodes) == pytest.approx(measured, rel=0.15)


def problem_of(model="deepseek-v3", cluster="h200-sxm:4x8", engine="vllm", isl=32_000, forbidden=(), **fixed):
    loaded = planner.load_model(model)
    return ServeProblem(
        loaded, planner.load_cluster(cluster), Traffic(isl, 500, ttft_s=4.0, tpot_s=0.05), load_stack(engine),
        (loaded.checkpoint,), modes=("disaggregated",), fixed=fixed, forbidden=forbidden,
        launcher=SERVING_LAUNCHERS[engine],
    )  # fmt: skip


PREFILL = {
    "prefill.tp": 1,
    "prefill.pp": 1,
    "prefill.dp": 1,
    "prefill.cp": 8,
    "prefill.ep": 8,
    "prefill.etp": 1,
}
DECODE = {"decode.tp": 8, "decode.pp": 1, "decode.dp": 1, "decode.ep": 8, "decode.etp": 1}


def test_the_search_finds_it_where_it_helps():
    """Prompts of 32,000 tokens of DeepSeek-V3 within four seconds: more are answered where ranks may share them."""
    plain = serve(problem_of(forbidden=("prompt_ranks=all_gather",)), top=1).best
    found = serve(problem_of(), top=1).best
    assert found.pools[0].mesh["cp"] > 1
    assert found.estimate.goodput_requests_per_s > plain.estimate.goodput_requests_per_s
    assert found.devices == sum(pool.devices for pool in found.pools) <= 32
    assert reprice(found).estimate.goodput_requests_per_s == pytest.approx(
        found.estimate.goodput_requests_per_s, rel=1e-6
    )
    assert any(row["what"] == "attention.gather_kv" for row in account(found)[0]["iterations"][0]["items"])


def test_ranks_hold_whole_caches_or_their_part():
    tokens = {}
    for choice in ("all_gather", "pass_kv"):
        fixed = {
            "prefill.prompt_ranks": choice,
            "prefill.tp": 8,
            "prefill.cp": 2,
            "prefill.pp": 1,
            "decode.tp": 8,
            "decode.pp": 1,
        }
        problem = problem_of("llama3.1-70b", "h100-sxm:4x8", **fixed)
        plan = serve(replace(problem, launcher=None), top=1).best
        assert plan.pools[0].devices == 16 * plan.pools[0].replicas
        tokens[choice] = runs.cache_bytes_per_token(
            runs.run(
                "prompt_ranks",
                TECHNIQUE.apply,
                model="llama3.1-70b",
                tp=8,
                cp=2,
                prefill=1000.0,
                prompt_ranks=choice,
            )
        )
    assert tokens["pass_kv"] == pytest.approx(tokens["all_gather"] / 2)


@pytest.mark.parametrize(
    ("engine", "model", "fixed", "why"),
    [
        ("vllm", "llama3.1-8b", {"prefill.cp": 2}, "prompts shared by ranks without a latent cache"),
        ("sglang", "llama3.1-8b", {"prefill.cp": 2}, "prompts shared by ranks that cut dense layers"),
        ("trtllm", "deepseek-v3", {"prefill.cp": 2}, "has no words for prompt_ranks"),
        ("vllm", "deepseek-v3", {"cp": 2}, "in a pool that generates"),
        ("vllm", "gpt-oss-20b", {"prefill.cp": 2}, "context parallelism of windows"),
    ],
)
def test_it_is_refused_by_name(engine, model, fixed, why):
    with pytest.raises(PlannerError, match=why):
        serve(problem_of(model, engine=engine, isl=4000, **fixed))


def test_engines_are_told_and_read_back(tmp_path):
    for engine in ("vllm", "sglang"):
        plan = serve(problem_of(engine=engine, **PREFILL, **DECODE), top=1).best
        folder = tmp_path / engine
        folder.mkdir()
        for name, text in export_serving(plan, engine).items():
            (folder / name).write_text(text)
        prefill, decode = (
            yaml.safe_load((folder / f"{engine}-{r}.yaml").read_text()) for r in ("prefill", "decode")
        )
        if engine == "vllm":
            assert (prefill["tensor-parallel-size"], prefill["prefill-context-parallel-size"]) == (1, 8)
            assert prefill["kv-transfer-config"]["kv_role"] == "kv_producer"
            assert "prefill-context-parallel-size" not in decode
        else:
            assert (prefill["tp-size"], prefill["attn-cp-size"], prefill["moe-dense-tp-size"]) == (8, 8, 1)
            assert (prefill["enable-prefill-cp"], prefill["cp-strategy"]) == (True, "zigzag")
            assert "enable-prefill-cp" not in decode
        pools = read_launch(engine, f"{folder / 'serve-prefill.sh'},{folder / 'serve-decode.sh'}")
        assert {name: pools[0].fixed[name] for name in ("tp", "cp", "ep")} == {"tp": 1, "cp": 8, "ep": 8}
        assert pools[0].fixed["prompt_ranks"] == "all_gather"
        assert "cp" not in pools[1].fixed
