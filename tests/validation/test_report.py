"""Scores of whole files: what is scored, passed over, left out and bounded."""

import pytest

import planner
from planner.errors import SpecError
from planner.validation import training as module
from planner.validation import validate
from planner.validation.bounds import read_bounds
from planner.validation.exclusions import Exclusion, read_exclusions
from planner.validation.table import read_table
from planner.validation.training import score_training
from tests.validation.conftest import COMPLETE, PUBLISHED

TABLES = sorted(PUBLISHED.glob("*.csv"))
RATE = "tokens_per_s_per_device"


def test_published_runs_are_predicted_by_the_planner_itself():
    report = validate([PUBLISHED / "korthikanti2022_seqsel_a100.csv"])
    scored = next(row for row in report.rows if row.metric == RATE)
    # the 22B model with full recompute: Table 5 prints 1.42 s for 4 sequences of 2048 on 8 devices
    assert scored.measured == pytest.approx(4 * 2048 / 8 / 1.42)
    fixed = {
        "tp": 8,
        "micro_batch_size": 4,
        "recompute": "full",
        "sequence_parallel": "false",
        "precision": "fp16",
    }
    fixed |= {"gradient_dtype": "fp16", "zero_stage": "0", "loss_kernel": "eager"}
    problem = planner.Problem(
        planner.load_model("megatron-22b"), planner.load_cluster("a100-sxm-80gb:1x8"), planner.TrainWorkload(4, 2048),
        planner.load_stack("megatron-2022"), fixed,
    )  # fmt: skip
    assert scored.predicted == pytest.approx(planner.estimate(problem).estimate.tokens_per_s_per_device)


def test_recorded_bounds_hold_and_are_not_idle():
    report = validate(TABLES)
    sources = report.summary()[RATE]["by_source"]
    assert report.exceeded() == []
    for bound in report.bounds:
        if bound.file in sources:
            assert sources[bound.file][bound.statistic] > bound.most / 3, (
                f"{bound} is far from what it bounds"
            )
    assert {bound.file for bound in report.bounds} >= set(sources)


def test_summary_of_published_runs():
    found = validate(TABLES).as_dict(by="model")
    assert found["coverage"] == {RATE: 1.0, "ranking": 1.0, "oom": 1.0}
    assert found["summary"][RATE]["n"] == 9
    assert list(found["summary"][RATE]["by_source"]) == [path.name for path in TABLES]
    assert set(found["summary"][RATE]["by_model"]) >= {"megatron-22B", "GPT-530B"}
    assert "peak_memory" not in found["summary"]
    assert "ranking" not in found["summary"]  # no sweep of four plans
    assert found["summary"]["oom"] == {"tp": 0, "fp": 0, "tn": 9, "fn": 0, "balanced_accuracy": 1.0}
    row = found["rows"][0]
    assert row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1)
    assert {default["column"] for default in found["defaults"]} >= {"vpp"}


def test_memory_is_compared_by_its_kind(table):
    cells = {**COMPLETE, "score_for": "memory", "peak_memory_gb": "30", "peak_memory_unit": "GiB"}
    kinds = ("allocated", "reserved", "smi", "")
    path = table(*({**cells, "row_id": kind or "none", "peak_memory_kind": kind} for kind in kinds))
    report = validate([path])
    predicted = {row.row_id: row.predicted for row in report.rows}
    estimate = planner.estimate(module.run_of(read_table(path).rows[0]).problem).estimate
    pools, cached = estimate.memory_bytes, estimate.cached_bytes
    assert cached > 0
    assert predicted["none"] == pools["peak"] + cached
    assert predicted["smi"] < predicted["none"]  # of the first device; the last one holds the logits
    assert predicted["reserved"] == pytest.approx(
        predicted["none"] - pools["framework"] - pools["communicators"]
    )
    assert predicted["allocated"] == pytest.approx(predicted["reserved"] - pools["fragmentation"] - cached)
    assert set(report.summary()["peak_memory"]["by_kind"]) == {"allocated", "reserved", "smi", "-"}


def test_plans_of_a_sweep_are_ranked(table):
    sizes = ("1", "2", "4", "8")
    cells = {**COMPLETE, "sweep_id": "s", "score_for": "rank", "pp": "1"}
    path = table(*({**cells, "row_id": size, "micro_batch": size, "step_time_s": size} for size in sizes))
    ranking = validate([path]).summary()["ranking"]
    assert ranking["sweeps"] == 1
    assert ranking["by_sweep"][0]["plans"] == 4
    assert -1.0 <= ranking["kendall_tau_mean"] <= 1.0
    assert ranking["top1_regret_mean"] >= 0.0


def test_models_of_one_name_that_differ_in_their_heads_are_no_repeats(table):
    cells = {
        **COMPLETE,
        "model": "x",
        "n_kv_heads": "",
        "head_dim": "",
        "sweep_id": "s",
        "score_for": "rank",
        "pp": "1",
    }
    plans = [{"micro_batch": size, "step_time_s": size} for size in ("1", "2", "4", "8")]
    rows = ({**cells, **plan, "n_heads": heads} for heads in ("32", "64") for plan in plans)
    ranking = validate([table(*({**row, "row_id": str(n)} for n, row in enumerate(rows)))]).summary()[
        "ranking"
    ]
    assert [(sweep["plans"], sweep["rows"]) for sweep in ranking["by_sweep"]] == [(4, 4), (4, 4)]


def test_contradicting_rows_are_shown_but_do_not_count(table, monkeypatch):
    path = table({**COMPLETE}, {**COMPLETE, "row_id": "a-2", "step_time_s": "400"})
    exclusion = Exclusion("prints 4 s elsewhere", (RATE,))
    monkeypatch.setattr("planner.validation.report.read_exclusions", lambda: {"a-2": exclusion})
    found = validate([path]).as_dict()
    assert found["summary"][RATE]["n"] == 1
    assert found["with_excluded"][RATE]["n"] == 2
    assert found["rows"][1]["status"] == "excluded"
    assert found["rows"][1]["reason"] == "prints 4 s elsewhere"
    assert found["coverage"] == {RATE: 1.0}


def test_every_row_has_a_status_and_a_reason_where_it_is_not_scored(table):
    path = table(
        COMPLETE,
        {**COMPLETE, "row_id": "a-2", "score_for": "none"},
        {**COMPLETE, "row_id": "a-3", "other_flags": "QLoRA"},
        {**COMPLETE, "row_id": "a-4", "step_time_s": "nan"},
        {**COMPLETE, "row_id": "a-5", "seq_len": ""},
        {**COMPLETE, "row_id": "a-6", "score_for": "time+beauty"},
        {**COMPLETE, "row_id": "a-7", "dtype": "fp8", "accelerator": "A100-SXM-80GB"},
    )
    scores = score_training(read_table(path))
    assert [row.status for row in scores.rows] == [
        "scored", "skipped", "unsupported", "unsupported", "unsupported", "skipped", "unsupported",
    ]  # fmt: skip
    assert all(row.reason for row in scores.rows[1:])
    assert "a100-sxm-80gb has no fp8 matrix rate" in scores.rows[-1].reason
    assert validate([path]).as_dict()["coverage"] == {RATE: 1 / 5}


def test_other_kinds_are_passed_over(table):
    training = table(COMPLETE)
    kernels = table({"accelerator": "x", "latency_ms": "1"}, name="kernels.csv")
    assert validate([training, kernels]).passed_over == {str(kernels): "kernels"}
    with pytest.raises(SpecError, match="holds kernels"):
        validate([kernels])


def test_wrong_bounds_are_refused(tmp_path):
    path = tmp_path / "bounds.toml"
    path.write_text('["runs.csv".tokens_per_s_per_device]\nmiddle = 0.1\n')
    with pytest.raises(SpecError, match="middle"):
        read_bounds(path)


def test_exclusions(tmp_path):
    assert all(exclusion.contradiction for exclusion in read_exclusions().values())
    path = tmp_path / "exclusions.toml"
    path.write_text('["a-1"]\nmetrics = ["oom"]\ncontradiction = "ran, and did not"\n')
    exclusion = read_exclusions(path)["a-1"]
    assert (exclusion.reason("oom"), exclusion.reason(RATE)) == ("ran, and did not", "")
    path.write_text('["a-1"]\nbecause = "I say so"\n')
    with pytest.raises(SpecError, match="contradiction"):
        read_exclusions(path)


def test_silence_about_recompute_means_what_fits(table):
    # 8 B parameters without sharding leave little room on 80 GB for 4 sequences of 8192 that keep everything.
    cells = {
        **COMPLETE,
        "tp": "1",
        "pp": "1",
        "n_devices": "8",
        "micro_batch": "4",
        "zero_stage": "3",
        "score_for": "oom",
    }
    cells |= {"oom": "false"}
    path = table({**cells, "recompute": ""}, {**cells, "row_id": "a-2", "recompute": "none"})
    assert [row.predicted for row in validate([path]).rows] == [0.0, 1.0]
