"""Pools of their own for prompts and generation: what the cache's way between them takes, and what a missed limit says."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from planner import ServeProblem, Traffic, load_cluster, load_model, load_stack, serve
from planner.errors import Infeasible
from planner.serving.deployment import deployment_of

SLOW = Path(__file__).resolve().parents[2] / "examples" / "slow_network.toml"
APART = ("disaggregated",)


@pytest.mark.parametrize(("senders", "receivers"), [(4, 1), (1, 4), (4, 4)])
def test_a_cache_comes_over_as_many_links_as_the_smaller_side_has(senders, receivers):
    """Llama 3.1 8B keeps 2·32·8·128 values of 2 bytes per token: 262 MB of a prompt, at 14 MB/s per link all that counts."""
    cluster = load_cluster(SLOW)
    *inner, last = cluster.tiers
    cluster = replace(cluster, tiers=(*inner, replace(last, bytes_per_s=0.01 * last.bytes_per_s)))
    fixed = {"prefill.tp": senders, "decode.tp": receivers, "pp": 1}
    traffic = Traffic(isl=2000, osl=200, ttft_s=60.0, tpot_s=0.1)
    problem = ServeProblem(
        load_model("llama3.1-8b"), cluster, traffic, load_stack("vllm"), modes=APART, fixed=fixed
    )
    best = serve(problem, top=1).best
    link_s = 2 * 32 * 8 * 128 * 2 * 2000 / cluster.tiers[-1].effective_bytes_per_s
    assert best.estimate.ttft_s["mean"] > link_s / min(senders, receivers)


def test_a_missed_limit_of_whole_answers_counts_every_token():
    """Each of the 199 tokens after the first reads 16 GB of weights, at most over eight devices of 3.35 TB/s."""
    traffic = Traffic(isl=2000, osl=200, e2e_s=0.02)
    model, cluster = load_model("llama3.1-8b"), load_cluster("h100-sxm:1x8")
    with pytest.raises(Infeasible) as found:
        serve(ServeProblem(model, cluster, traffic, load_stack("vllm"), modes=APART), top=1)
    told = re.search(r"nothing is faster than ([\d.]+) ms", str(found.value))
    assert told is not None
    assert float(told[1]) * 1e-3 > 199 * 2 * 8.03e9 / (8 * 3.35e12)


def test_a_cache_that_came_over_joins_as_a_token_of_the_step():
    """Who joins a pool that generates computes one token, as those that are there do, and holds nobody up."""
    traffic = Traffic(isl=2000, osl=200, tpot_s=0.02)
    job = (load_model("llama3.1-8b"), load_cluster("h100-sxm:1x8"), traffic, load_stack("trtllm"))
    best = serve(ServeProblem(*job, modes=APART), top=1).best
    (stage,) = (stage for stage in deployment_of(best).stages if stage.role == "decode")
    assert stage.rules.mixed
    alone, joined = stage.iteration(40.0, 80e3, 0.0, 0.0), stage.iteration(39.0, 78e3, 1.0, 2e3)
    assert float(joined) == pytest.approx(float(alone), rel=0.01)
