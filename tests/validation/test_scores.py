"""Error statistics against hand arithmetic."""

import pytest

from planner.validation.scores import ScoredRow, coverage, error_statistics, grouped, summarise


def row(name, file, measured, predicted, status="scored", metric="gemm"):
    return ScoredRow(name, file, metric, status, measured=measured, predicted=predicted)


ROWS = [
    row("a", "one.csv", 100.0, 110.0),  # +10 %
    row("b", "one.csv", 100.0, 80.0),  # -20 %
    row("c", "one.csv", 100.0, 130.0),  # +30 %
    row("d", "two.csv", 10.0, 15.0),  # +50 %
    row("e", "two.csv", 10.0, 100.0, "excluded"),  # +900 %, not counted
    ScoredRow("f", "two.csv", "gemm", "unsupported", "no such dtype", 10.0),
    ScoredRow("g", "two.csv", "gemm", "skipped", "asks for nothing"),
]


def test_error_is_a_fraction_of_what_was_measured():
    assert row("a", "f", 8.0, 10.0).error == pytest.approx(0.25)
    assert row("a", "f", 0.0, 10.0).error is None
    assert row("a", "f", None, 10.0).error is None
    assert row("a", "f", 8.0, None).error is None


def test_statistics():
    found = error_statistics([0.1, -0.2, 0.3])
    # |e| = 0.1 0.2 0.3: median 0.2, mean 0.2, 90th percentile at rank 1 + 0.9·2 = 2.8, so 0.2 + 0.8·0.1; bias 0.2 / 3
    assert found == pytest.approx(
        {"n": 3, "median_ape": 0.2, "mape": 0.2, "p90_ape": 0.28, "max_ape": 0.3, "bias": 0.2 / 3}
    )


def test_macro_average_gives_every_source_one_voice():
    summary = summarise(ROWS)["gemm"]
    assert summary.pooled["n"] == 4
    assert summary.pooled["median_ape"] == pytest.approx(0.25)  # 0.1 0.2 0.3 0.5
    assert summary.macro_median_ape == pytest.approx((0.2 + 0.5) / 2)
    assert summary.macro_p90_ape == pytest.approx((0.28 + 0.5) / 2)
    assert summary.by_source["two.csv"]["bias"] == pytest.approx(0.5)


def test_excluded_rows_count_on_request_alone():
    assert summarise(ROWS, with_excluded=True)["gemm"].pooled["n"] == 5
    assert summarise(ROWS, with_excluded=True)["gemm"].by_source["two.csv"]["mape"] == pytest.approx(4.75)


def test_a_metric_without_scored_rows_is_left_out():
    assert summarise(ROWS[4:]) == {}


def test_coverage_counts_what_was_asked_for():
    assert coverage(ROWS) == {"gemm": 4 / 5}


def test_groups():
    rows = [
        ScoredRow("a", "f", "gemm", "scored", "", 1.0, 1.5, {"accelerator": "A"}),
        ScoredRow("b", "f", "gemm", "scored", "", 1.0, 0.9, {"accelerator": "B"}),
        ScoredRow("c", "f", "gemm", "scored", "", 1.0, 1.1),
        ScoredRow("d", "f", "oom", "scored", "", 1.0, 0.0, {"accelerator": "A"}),
    ]
    found = grouped(rows, "accelerator")
    assert list(found) == ["gemm"]
    assert {name: values["mape"] for name, values in found["gemm"].items()} == pytest.approx(
        {"-": 0.1, "A": 0.5, "B": 0.1}
    )
