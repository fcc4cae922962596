"""Serving rows of kinds that the stacks' constants have not seen: bursts, lengths that vary, engines without rules."""

import csv
from collections import Counter
from math import exp, inf
from pathlib import Path

import pytest

from planner.specs.models import load_model
from planner.validation import validate
from planner.validation.benchmark_suites import DEFAULTS
from planner.validation.bursts import _uncut
from planner.validation.serving import predict
from planner.validation.serving_runs import served_run
from planner.validation.table import Row

HELD_OUT = sorted((Path(__file__).parents[2] / "benchmarks" / "held_out" / "serving").glob("*.csv"))
BURST = {
    "row_id": "a-1", "quality": "A", "engine": "vLLM", "engine_version": "0.11", "model": "Llama-3.1-8B",
    "accelerator": "H100-SXM", "n_devices": "1", "tp": "1", "weight_dtype": "bf16", "kv_dtype": "", "input_len": "1000",
    "output_len": "100", "concurrency": "", "request_rate": "inf", "features": "online; 64 requests", "ttft_ms": "100",
    "tpot_ms": "8",
}  # fmt: skip


def run(**cells):
    return served_run(Row("a.csv", 2, {**BURST, **cells}), Counter())


def test_requests_that_come_at_once_are_a_burst_where_latencies_are_told():
    assert (run().driver, run().load) == ("burst", 64.0)
    assert run(ttft_ms="", tpot_ms="").driver == "offline"
    assert run(ttft_ms="", tpot_ms="", features="offline; 64 requests; ShareGPT").driver == "burst"


def test_the_first_token_of_a_burst_waits_for_half_of_the_prompts():
    small, large = predict([run(features="online; 64 requests"), run(features="online; 256 requests")])
    each = (large["ttft"] - small["ttft"]) / (256 - 64)
    alone = predict([run(features="online; 1 requests")])[0]
    assert alone["ttft"] < small["ttft"] < large["ttft"]
    prompt = alone["ttft"] - float(run().stack.on_generation("hopper").serving.admitted_s(run().isl))
    assert 0.3 * prompt < each < 0.7 * prompt
    assert alone["tpot"] < small["tpot"]


def test_a_run_is_as_long_as_all_of_its_answers():
    (found,) = predict([run(features="online; 1 requests")])
    assert found["output_tokens_per_s"] == pytest.approx(
        100.0 / (found["ttft"] + 99 * found["tpot"]), rel=0.02
    )


def test_lengths_vary_and_answers_are_cut():
    told = run(features="online; 64 requests; ShareGPT; at most 512 tokens")
    assert (told.length_scv, told.longest_answer) == (1.0, 512.0)
    assert (run().length_scv, run().longest_answer) == (0.0, float("inf"))


@pytest.mark.parametrize(("mean", "longest"), [(100.0, inf), (345.0, 512.0), (512.0, 512.0)])
def test_a_law_that_is_cut_keeps_its_mean(mean, longest):
    uncut = _uncut(mean, longest)
    if longest < inf and mean < longest:
        assert uncut * (1.0 - exp(-longest / uncut)) == pytest.approx(mean, rel=1e-6)
    else:
        assert uncut == mean


def test_a_request_larger_than_the_cache_has_no_times():
    (found,) = predict([run(model="Llama-3.1-70B", tp="2", n_devices="2", input_len="120000")])
    assert "ttft" not in found


def test_clients_have_so_many_requests_each():
    told = run(request_rate="", concurrency="16", features="online; 64 requests")
    assert (told.driver, told.requests_per_client) == ("concurrency", 4.0)
    assert run(request_rate="", concurrency="16", features="online").requests_per_client is None


def test_an_engine_without_a_stack_is_one_of_no_particular_make():
    defaults = Counter()
    cells = {**BURST, "engine": "no such engine"}
    assert served_run(Row("a.csv", 2, cells), defaults).stack.name == "serving"
    assert defaults["engine"] == 1


def test_fp8_weights_are_unpacked_where_no_products_take_them():
    assert run(accelerator="A100-SXM-80GB", weight_dtype="fp8").weights == "int8_wo"
    assert run(weight_dtype="fp8").weights == "fp8"


@pytest.mark.parametrize(
    ("cells", "stack"),
    [
        ({"engine_version": "0.6.3"}, "vllm-v0"),
        ({"engine_version": "", "measured_date": "2024-08"}, "vllm-v0"),
        ({"engine_version": "0.9.1"}, "vllm"),
        ({"engine": "NIM", "engine_version": "1.8"}, "trtllm-engine"),
    ],
)
def test_stacks_of_first_engines_and_other_names(cells, stack):
    assert run(**cells).stack.name == stack


@pytest.mark.parametrize(
    ("cells", "options"),
    [
        ({}, (0, 0)),
        ({"accelerator": "A100-SXM-80GB"}, (2048, 256)),
        ({"accelerator": "L40S"}, (2048, 256)),
        ({"engine": "SGLang", "engine_version": "0.5.5"}, (0, 0)),
        ({"engine": "SGLang", "engine_version": "0.5.5", "accelerator": "B200"}, (16384, 0)),
        ({"engine": "SGLang", "engine_version": "0.5.5", "accelerator": "RTX 4090"}, (2048, 0)),
    ],
)
def test_engines_choose_their_batches_by_the_machine(cells, options):
    launch = run(**cells).launch
    assert (launch.chunk_tokens, launch.max_sequences) == options
    assert (launch == DEFAULTS) == (options == (0, 0))


def test_held_out_rows_are_named_and_mostly_priced():
    small = [path for path in HELD_OUT if path.stem in ("nvidia_nim", "vultr_b200", "trtllm_v019")]
    assert len(small) == 3
    report = validate([str(path) for path in small])
    assert all(row.status == "scored" for row in report.rows if row.status != "skipped")
    for path in HELD_OUT:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert all(cells["source"] and cells["model"] and cells["accelerator"] for cells in rows), path


@pytest.mark.parametrize("name", ["glm-4.6", "mistral-7b", "qwq-32b"])
def test_models_of_the_held_out_rows_have_names(name):
    assert load_model(name).arch == "decoder"
