"""Serving rows: how a row is read, what it is priced as, and how far off published runs are."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from planner.specs.device import Sourced
from planner.specs.stack import load_stack
from planner.validation import validate
from planner.validation.serving import predict, score_serving, served_runs
from planner.validation.serving_exclusions import contradicted, repeated
from planner.validation.serving_runs import served_run
from planner.validation.table import Row, Table, Unsupported, read_table, table_kind

PUBLISHED = Path(__file__).parents[2] / "examples" / "published_serving"
TABLES = sorted(PUBLISHED.glob("*.csv"))
COMPLETE = {
    "row_id": "a-1", "quality": "A", "engine": "vLLM", "engine_version": "0.11", "model": "meta-llama/Llama-3.1-8B",
    "accelerator": "H100-SXM", "n_devices": "2", "tp": "2", "pp": "1", "dp": "1", "ep": "1", "weight_dtype": "fp8",
    "kv_dtype": "", "input_len": "1000", "output_len": "100", "concurrency": "16", "features": "continuous batching",
    "ttft_ms": "100", "tpot_ms": "8",
}  # fmt: skip


def row(**cells):
    return Row("a.csv", 2, {**COMPLETE, **cells})


def table(*rows):
    return Table("a.csv", "serving", tuple(COMPLETE), tuple(rows))


def test_the_header_tells_a_serving_table():
    assert table_kind(tuple(COMPLETE)) == "serving"
    assert {read_table(path).kind for path in TABLES} == {"serving"}


@pytest.mark.parametrize(
    ("cells", "driver", "load"),
    [
        ({}, "concurrency", 16.0),
        ({"concurrency": "", "request_rate": "inf"}, "offline", 0.0),
        ({"request_rate": "2.5"}, "rate", 2.5),
        ({"request_rate": "2", "per_replica_request_rate": "0.5"}, "rate", 0.5),
        ({"features": "static batch", "batch": "64"}, "static", 64.0),
        (
            {
                "prefill_tp_size": "1",
                "decode_tp_size": "4",
                "prefill_num_workers": "1",
                "decode_num_workers": "2",
            },
            "pools",
            16.0,
        ),
    ],
)
def test_how_a_run_was_driven(cells, driver, load):
    run = served_run(row(**cells), Counter())
    assert (run.driver, run.load) == (driver, load)


@pytest.mark.parametrize(
    ("cells", "formats"),
    [
        ({}, ("fp8", "bf16")),
        ({"engine": "TensorRT-LLM"}, ("fp8", "fp8")),
        ({"engine": "TensorRT-LLM", "kv_dtype": "fp16"}, ("fp8", "bf16")),
        ({"weight_dtype": "fp4"}, ("nvfp4", "bf16")),
        ({"weight_dtype": "", "precision_label": ""}, ("bf16", "bf16")),
        ({"model": "deepseek-ai/DeepSeek-R1", "tp": "8"}, ("fp8_block", "bf16")),
        ({"model": "openai/gpt-oss-120b", "weight_dtype": "nvfp4"}, ("w4a16_mxfp4", "bf16")),
    ],
)
def test_number_formats_as_the_checkpoint_has_them(cells, formats):
    run = served_run(row(**cells), Counter())
    assert (run.weights, run.cache) == formats


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"tp": ""}, "layout"),
        ({"model": "nobody-1b"}, "no model"),
        ({"accelerator": "abacus"}, "no profile"),
        ({"weight_dtype": "fp3"}, "number format"),
        ({"concurrency": ""}, "load"),
        ({"prefill_tp_size": "1", "decode_tp_size": "4"}, "how many workers"),
        ({"model": "bert-base"}, "does not generate"),
        ({"input_len": ""}, "input_len"),
    ],
)
def test_what_cannot_be_priced_says_why(cells, said):
    with pytest.raises(Unsupported, match=said):
        served_run(row(**cells), Counter())
    scores = score_serving(table(row(**cells)))
    assert {entry.status for entry in scores.rows} == {"unsupported"}


INFERENCEX = {
    "upstream": "dated_2026-04-06",
    "engine": "trtllm",
    "engine_version": "",
    "model": "meta-llama/Llama-3.1-70B",
}


@pytest.mark.parametrize("column", ["n_devices", "tokens_per_s_per_device", "ttft_ms"])
def test_a_cell_that_is_no_number_concerns_what_it_tells_alone(column):
    found = {score.metric: score.status for score in score_serving(table(row(**{column: "many"}))).rows}
    assert set(found) <= {"ttft", "tpot"}
    assert found["tpot"] == "scored"


def test_a_suite_says_what_its_rows_do_not():
    """SemiAnalysisAI/InferenceX: lengths uniform from 0.8 of the stated one, ten requests per client, an 8-bit cache."""
    run = served_run(row(**INFERENCEX, kv_dtype=""), Counter())
    assert (run.isl, run.osl, run.requests_per_client, run.cache) == (900, 90, 10, "fp8")
    assert run.length_scv == pytest.approx((0.2**2 / 12) / 0.9**2)
    plain = served_run(row(), Counter())
    assert (plain.isl, plain.osl, plain.requests_per_client) == (1000, 100, None)


@pytest.mark.parametrize(
    ("cells", "iterations"),
    [
        ({"tp": "4", "input_len": "1024", "output_len": "1024"}, 20),  # batch_wait_timeout_iters
        ({"tp": "8", "input_len": "1024", "output_len": "1024"}, 0),
        ({"tp": "1", "dp": "4", "ep": "4", "model": "deepseek-ai/DeepSeek-R1"}, 60),  # timeout_iters
        (
            {"engine": "sglang", "accelerator": "B200-SXM", "concurrency": "32"},
            15,
        ),  # half of scheduler-recv-interval 30
        ({"engine": "sglang", "accelerator": "B200-SXM", "concurrency": "8"}, 5),
    ],
)
def test_launches_hold_prompts_back(cells, iterations):
    run = served_run(row(**{**INFERENCEX, "n_devices": "", **cells}), Counter())
    assert run.launch.held_back_iterations == iterations


def test_rows_that_may_have_speculated_do_not_count():
    """The suite ran DeepSeek-R1 on TensorRT-LLM with and without its prediction module from 2026-01-14 on."""
    deepseek = {**INFERENCEX, "model": "deepseek-ai/DeepSeek-R1", "tp": "8", "weight_dtype": "fp8"}
    before, after = ({"measured_date": date} for date in ("2025-11-02", "2026-01-14"))
    assert not served_run(row(**deepseek, **before), Counter()).may_speculate
    assert served_run(row(**deepseek, **after), Counter()).may_speculate
    assert not served_run(row(**INFERENCEX, **after), Counter()).may_speculate
    (entry, *_) = [e for e in score_serving(table(row(**deepseek, **after))).rows if e.metric == "tpot"]
    assert entry.status == "excluded"
    assert "multi-token prediction" in entry.reason


@pytest.mark.parametrize(
    ("engine", "date", "compiles"),
    [("sglang", "2025-11-10", True), ("sglang", "2026-03-25", False), ("vllm", "2025-11-10", False)],
)
def test_runs_that_may_have_compiled_are_known(engine, date, compiles):
    """InferenceX warms up from 2026-01-21 on (its commit d053ae2); SGLang runs no full iteration by itself before."""
    cells = {
        **INFERENCEX,
        "n_devices": "",
        "accelerator": "B200-SXM",
        "engine": engine,
        "measured_date": date,
    }
    assert served_run(row(**cells), Counter()).compiles == compiles


def test_clients_beyond_the_cache_wait_outside():
    """70 GB of fp8 weights leave some 50 GB of an H200 to caches, 3 GB each (9000 tokens of 2 * 80 * 8 * 128 * 2 bytes)."""
    cells = {"model": "meta-llama/Llama-3.1-70B", "accelerator": "H200-SXM", "tp": "1", "n_devices": "1"}
    lengths = {"input_len": "8000", "output_len": "1000"}
    few, many = predict([served_run(row(**cells, **lengths, concurrency=c), Counter()) for c in ("8", "64")])
    assert many["ttft"] > 10 * few["ttft"]
    assert many["tpot"] < 2 * few["tpot"]


def test_the_engine_s_version_chooses_the_stack():
    stacks = {
        (engine, version): served_run(row(engine=engine, engine_version=version), Counter()).stack.name
        for engine, version in (
            ("vllm", "0.18.0"),
            ("TensorRT-LLM", "0.17"),
            ("TensorRT-LLM", "1.0"),
            ("sglang", ""),
        )
    }
    assert list(stacks.values()) == ["vllm", "trtllm-engine", "trtllm", "sglang"]


def test_rows_of_quality_c_and_contradicted_ones_do_not_count():
    rows = [
        row(),
        row(row_id="a-2", quality="C"),
        row(row_id="b", tp="1"),
        row(row_id="c", tp="1", tpot_ms="12"),
    ]
    scores = score_serving(table(*rows))
    status = {(entry.row_id, entry.metric): entry.status for entry in scores.rows}
    assert status["a-1", "tpot"] == "scored"
    assert status["a-2", "tpot"] == "excluded"
    assert status["b", "tpot"] == status["c", "tpot"] == "excluded"  # one configuration, 8 and 12 ms
    assert contradicted(served_runs(table(*rows))) == {"b", "c"}


def test_a_measurement_that_is_listed_twice_counts_once():
    burst = {
        "request_rate": "inf",
        "concurrency": "",
        "ttft_ms": "",
        "tpot_ms": "",
        "output_tokens_per_s": "900",
    }
    rows = [
        row(),
        row(row_id="again"),  # every digit as before
        row(row_id="digits", tpot_ms="8.01"),
        row(row_id="load", concurrency="32"),
        row(row_id="one value", **burst),
        row(row_id="one value again", **burst),
        row(row_id="c", tp="1", quality="C"),
        row(row_id="after c", tp="1"),
    ]
    assert repeated(served_runs(table(*rows[:6]))) == {"again": "a-1"}  # one value alone may agree by chance
    status = {(entry.row_id, entry.metric): entry.status for entry in score_serving(table(*rows)).rows}
    assert [row_id for (row_id, metric), one in status.items() if metric == "ttft" and one == "excluded"] == [
        "again",
        "c",
    ]


def test_pools_with_other_numbers_of_workers_do_not_contradict_each_other():
    pools = {
        "prefill_tp_size": "1",
        "decode_tp_size": "4",
        "prefill_num_workers": "1",
        "decode_num_workers": "2",
    }
    rows = [row(**pools), row(row_id="more", **{**pools, "decode_num_workers": "4"}, tpot_ms="5")]
    assert contradicted(served_runs(table(*rows))) == set()
    assert contradicted(served_runs(table(rows[0], row(row_id="same", **pools, tpot_ms="5")))) == {
        "a-1",
        "same",
    }


def test_longer_prompts_take_longer_to_become_tokens():
    stack = load_stack("vllm").on_generation("hopper")
    constants = {"admission_s": 0.02, "admission_token_s": 5e-6}
    software = replace(
        stack.serving, on={}, **{n: Sourced(v, "assumed", "planner-defaults") for n, v in constants.items()}
    )
    none = replace(software, admission_token_s=Sourced(0.0, "assumed", "planner-defaults"))
    assert software.admitted_s(8000) == pytest.approx(0.06)
    run = served_run(row(input_len="8000"), Counter())
    (slow,), (fast,) = (
        predict([run], {"vllm": replace(stack, on={}, serving=one)}) for one in (software, none)
    )
    assert slow["ttft"] - fast["ttft"] == pytest.approx(
        8000 * 5e-6, rel=0.1
    )  # the rest: fewer generate meanwhile


def test_rows_priced_together_are_priced_as_if_alone():
    runs = [run for run, _ in served_runs(read_table(PUBLISHED / "trtllm_throughput.csv"))][:12]
    together = predict(runs)
    for run, found in zip(runs, together, strict=True):
        (alone,) = predict([run])
        assert found == pytest.approx(alone)


def test_recorded_bounds_hold_and_are_not_idle():
    report = validate(TABLES)
    assert report.exceeded() == []
    summary = report.summary()
    named = [bound for bound in report.bounds if bound.file in {path.name for path in TABLES}]
    assert {bound.file for bound in named} == {path.name for path in TABLES}
    for bound in named:
        assert summary[bound.metric]["by_source"][bound.file][bound.statistic] > bound.most / 3, bound
    assert report.summary()["latency"]["n"] == 40


def test_batches_take_their_prompts_and_their_steps():
    """FasterTransformer's GPT-20B on one A100: 225 ms for 20 tokens in and 8 out; 40 GB of weights are read 8 times at 2 TB/s."""
    cells = {
        "engine": "FasterTransformer", "engine_version": "", "model": "GPT-20B", "num_layers": "44", "hidden_size": "6144",
        "num_heads": "48", "vocab_size": "51200", "accelerator": "A100-SXM-80GB", "n_devices": "1", "tp": "1",
        "weight_dtype": "fp16", "kv_dtype": "fp16", "input_len": "20", "output_len": "8", "batch": "1",
        "features": "static batch", "concurrency": "", "latency_ms": "225", "ttft_ms": "", "tpot_ms": "",
    }  # fmt: skip
    (entry,) = score_serving(table(row(**cells))).rows
    assert entry.metric == "latency"
    assert entry.predicted > 8 * 40e9 / 2.039e12
    assert abs(entry.error) < 0.15


OVERVIEW = {
    "source": "NVIDIA/TensorRT-LLM@00f3768 docs/source/performance/perf-overview.md", "engine": "TensorRT-LLM",
    "engine_version": "1.0", "concurrency": "", "request_rate": "inf", "output_tokens_per_s": "1000", "ttft_ms": "",
    "tpot_ms": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("cells", "requests"),
    [
        ({"input_len": "128", "output_len": "4096"}, 1500),
        ({"input_len": "500", "output_len": "2000"}, 3000),
        ({"input_len": "777", "output_len": "2000"}, float("inf")),
    ],
)
def test_a_page_says_how_many_requests_its_runs_had(cells, requests):
    """The table of $num_requests in TensorRT-LLM's docs/source/performance/perf-overview.md."""
    run = served_run(row(**OVERVIEW, **cells), Counter())
    assert (run.requests, run.launch.cache_fraction) == (requests, 0.95)


def test_attention_of_mixtures_is_data_parallel_where_the_page_says_so():
    """llm_options.yml for models with experts of v1.0: enable_attention_dp; dense models have no such option."""
    mixture = served_run(row(**OVERVIEW, model="Qwen/Qwen3-30B-A3B", tp="4", n_devices="4"), Counter())
    dense = served_run(row(**OVERVIEW, tp="4", n_devices="4"), Counter())
    assert mixture.degrees == (1, 1, 4, 4)
    assert not mixture.exchanged  # TensorRT-LLM gathers tokens unless it is asked for more
    assert dense.degrees == (4, 1, 1, 1)


def test_a_run_of_stated_length_is_full_waves_and_a_last_one():
    """A short last wave: 3000 requests take longer each than endless ones do, and no more than a wave in all."""
    cells = {**OVERVIEW, "input_len": "500", "output_len": "2000", "tp": "1", "n_devices": "1"}
    finite = served_run(row(**cells), Counter())
    endless = replace(finite, requests=float("inf"))
    found, most = (each["output_tokens_per_s"] for each in predict([finite, endless]))
    assert 0.5 * most < found < most
    many = replace(finite, requests=3e6)
    (long,) = predict([many])
    assert long["output_tokens_per_s"] == pytest.approx(most, rel=0.01)


def test_the_first_release_on_pytorch_has_its_constants():
    """docs/source/performance/perf-overview.md of v0.20: from v0.19 on, tests ran on the PyTorch backend."""
    stacks = [
        served_run(row(engine="TensorRT-LLM", engine_version=version), Counter()).stack.name
        for version in ("0.18.1", "0.19", "0.20")
    ]
    assert stacks == ["trtllm-engine", "trtllm", "trtllm"]


def test_a_latency_that_ends_before_the_answer_does_not_count():
    """100 ms and 99 tokens of 8 ms are 0.9 s: 0.4 s are half an answer, 0.85 s are not."""
    entries = [
        {e.metric: e for e in score_serving(table(row(latency_ms=latency))).rows}
        for latency in ("400", "850")
    ]
    assert [found["latency"].status for found in entries] == ["excluded", "scored"]
    assert [found["tpot"].status for found in entries] == ["scored", "scored"]
