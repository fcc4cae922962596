"""What a benchmark's scripts say beside its rows: layouts, places, held-back prompts, first runs, requests of a client."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from planner.specs.device import Sourced
from planner.validation.benchmark_suites import Launch
from planner.validation.serving import predict
from planner.validation.serving_runs import served_run
from planner.validation.table import Row

CELLS = {
    "upstream": "dbdump",
    "engine": "sglang",
    "model": "deepseek-ai/DeepSeek-R1",
    "accelerator": "B200-SXM",
    "tp": "8",
    "ep": "1",
    "weight_dtype": "nvfp4",
    "input_len": "1024",
    "output_len": "1024",
    "concurrency": "32",
    "measured_date": "2025-11-10",
}
POOLS = {
    **CELLS,
    "accelerator": "GB200-NVL72",
    "tp": "",
    "prefill_num_workers": "1",
    "prefill_tp_size": "1",
    "prefill_attention_dp_size": "4",
    "prefill_moe_ep_size": "1",
    "decode_num_workers": "2",
    "decode_tp_size": "1",
    "decode_attention_dp_size": "4",
    "decode_moe_ep_size": "1",
    "measured_date": "2025-12-21",
}


def run(cells=CELLS, **others):
    return served_run(Row("launches.csv", 2, {**cells, **others}), Counter())


def test_the_first_split_prompt_waits_for_its_kernels_to_be_compiled():
    """29,504 tokens at once beyond a budget of 16,384: a tenth of the requests, the first of ten, waits a minute; 14,752 fit."""
    (split, kept, fit, whole) = predict(
        [
            run(),
            replace(run(), compiles=False),
            run(concurrency="16"),
            replace(run(concurrency="16"), compiles=False),
        ]
    )
    assert split["ttft"] - kept["ttft"] == pytest.approx(60.0 / 10)
    assert fit["ttft"] == whole["ttft"]
    assert split["tpot"] == kept["tpot"]


@pytest.mark.parametrize(
    ("cells", "requests"),
    [
        ({}, 10),  # the second version of the checkpoint is not in the runner's list
        ({"measured_date": "2025-11-02"}, 50),
        ({"measured_date": "2025-11-02", "output_len": "8192"}, 20),
        ({"weight_dtype": "fp8", "moe_dtype": "fp8_block", "measured_date": "2025-11-18"}, 50),
        ({"measured_date": "2026-03-25"}, 10),
    ],
)
def test_requests_of_a_client_by_the_runner_of_the_day(cells, requests):
    """SemiAnalysisAI/InferenceX, runners/launch_b200-nvd.sh: NUM_PROMPTS."""
    assert run(**cells).requests_per_client == requests


def test_ranks_attended_to_requests_of_their_own_where_the_script_said_so():
    """SemiAnalysisAI/InferenceX@17d5e20: dp-attn from 64 clients on with prompts of 8192 tokens, from 256 with 1024."""
    trt = {"engine": "trtllm", "input_len": "8192", "measured_date": "2025-11-02"}
    assert run(**trt, concurrency="64").degrees == (1, 1, 8, 8)
    assert run(**trt, concurrency="32").degrees == (8, 1, 1, 1)
    assert run(**{**trt, "input_len": "1024"}, concurrency="128").degrees == (8, 1, 1, 1)
    assert run(**{**trt, "measured_date": "2026-01-14"}, concurrency="64").degrees == (8, 1, 1, 1)


def test_prompts_that_are_held_back_run_together():
    """On eight attention ranks one prompt keeps all of them busy; five that begin together cost what one does."""
    held = run(engine="trtllm", input_len="8192", concurrency="64", measured_date="2025-11-02")
    at_once = replace(held, launch=replace(held.launch, held_back_iterations=0))
    together, apart = predict([held, at_once])
    assert together["tpot"] < 0.75 * apart["tpot"]
    assert together["ttft"] > 60 * together["tpot"]


def test_low_latency_pools_share_every_request_whatever_their_rows_say():
    """ai-dynamo/dynamo, 1k1k-low-latency.sh: --data-parallel-size 1 over all devices of a worker; five requests per client."""
    low = run(POOLS)
    assert (low.degrees, low.prefill[:4]) == ((4, 1, 1, 1), (4, 1, 1, 1))
    assert (low.requests_per_client, low.compiles, low.launch.held_back_iterations) == (5, False, 5)
    high = run(POOLS, concurrency="4096")
    assert high.degrees == (1, 1, 4, 4)
    later = run(POOLS, measured_date="2026-02-08")
    assert (later.degrees, later.requests_per_client) == ((1, 1, 4, 4), 10)


def test_clients_beyond_the_places_of_the_workers_wait_for_one():
    """55 clients, five workers of eight places: an answer's 921 steps times 55/40 is what a request takes (Little's law)."""
    kimi = {
        **POOLS, "engine": "trtllm", "model": "moonshotai/Kimi-K2.5", "decode_num_workers": "5", "decode_tp_size": "4",
        "decode_attention_dp_size": "1", "decode_moe_ep_size": "4", "prefill_moe_ep_size": "4", "concurrency": "55",
        "measured_date": "2026-04-18",
    }  # fmt: skip
    one = run(kimi)
    assert one.launch == Launch(cache="fp8", max_sequences=8)
    (found,) = predict([one])
    assert found["ttft"] + 921 * found["tpot"] == pytest.approx(55 / 40 * 921 * found["tpot"], rel=1e-3)
    (free,) = predict([replace(one, launch=replace(one.launch, max_sequences=0))])
    assert free["tpot"] > found["tpot"]
    assert free["ttft"] < 0.1 * found["ttft"]


def test_attention_ranks_of_vllm_s_pools():
    """SemiAnalysisAI/InferenceX: disagg-gb200-1p1d-dep4-dep16 and 1p4d-dep4-tep4 of Kimi K2.5."""
    kimi = {
        **POOLS, "engine": "vllm", "model": "moonshotai/Kimi-K2.5", "decode_tp_size": "16", "decode_attention_dp_size": "1",
        "prefill_tp_size": "4", "prefill_attention_dp_size": "1", "measured_date": "2026-04-07",
    }  # fmt: skip
    wide = run(kimi)
    assert (wide.degrees, wide.prefill[:4]) == ((1, 1, 16, 16), (1, 1, 4, 4))
    narrow = run(kimi, decode_tp_size="4", decode_moe_ep_size="4")
    assert (narrow.degrees, narrow.prefill[:4]) == ((4, 1, 1, 4), (1, 1, 4, 4))


def test_experts_are_whole_where_the_script_always_spreads_them():
    """SemiAnalysisAI/InferenceX@a363463, minimaxm2.5_fp8_h200.sh: expert parallel if EP_SIZE is 1 or more."""
    cells = {
        "engine": "vllm",
        "model": "MiniMaxAI/MiniMax-M2.5",
        "weight_dtype": "fp8",
        "measured_date": "2026-03-27",
    }
    assert run(**cells, accelerator="H200-SXM").degrees == (8, 1, 1, 8)
    assert run(**cells, accelerator="H100-SXM").degrees == (8, 1, 1, 1)


def test_an_engine_that_compiles_nothing_stalls_for_nothing():
    one = run()
    stack = one.stack
    none = replace(stack.serving, compile_s=Sourced(0.0, "assumed", "planner-defaults"))
    (quick,) = predict([one], {stack.name: replace(stack, serving=none)})
    (warm,) = predict([replace(one, compiles=False)])
    assert np.isclose(quick["ttft"], warm["ttft"])
