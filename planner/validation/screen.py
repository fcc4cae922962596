"""The screen of ``planner validate``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from planner.report.terminal import Screen, words
from planner.validation.cells import DEFAULTS
from planner.validation.report import Report
from planner.validation.scores import coverage, interval_statistics
from planner.validation.spreads import Coverage

__all__ = ["show_left_out", "show_report"]

_STATISTICS = {"median_ape": "median", "mape": "mean", "p90_ape": "90th", "bias": "bias"}
_OTHER_SCORES = ("oom", "ranking")
_NUMBERED = re.compile(r"(.*?)(\d{1,9})")


def show_report(report: Report, by: str) -> None:
    """Prints errors per group and over all sources, outcomes, ranking, coverage, and why rows are not scored."""
    screen = Screen()
    if not report.rows:
        screen.line("The files hold no rows.")
        screen.section("Passed over", [f"{path}: {kind}" for path, kind in report.passed_over.items()])
        return
    summary, asked = report.summary(by), coverage(report.rows)
    screen.line(
        "Errors are fractions of the measured value; 90th: 90th percentile; bias: mean signed error.", "dim"
    )
    for metric, found in summary.items():
        if metric not in _OTHER_SCORES:
            _show_errors(screen, metric, found, by)
    _show_outcomes(screen, summary)
    screen.section(
        "Coverage",
        [f"{words(metric)}: {part:.1%} of the rows that ask for it" for metric, part in asked.items()],
    )
    screen.section(
        "Intervals that should hold 80 % of measurements",
        [
            f"{words(metric)}: hold {found['held']:.1%} of {found['n']:,}; median width {found['median_width']:.1%}"
            for metric, found in interval_statistics(report.rows).items()
        ],
    )
    _show_unscored(screen, report)
    _show_excluded(screen, report, summary)
    taken = [
        f"{d.column}: {d.meaning} ({d.why}), {report.defaults[d.column]:,} rows"
        for d in DEFAULTS
        if report.defaults[d.column]
    ]
    screen.section("Empty cells taken as", taken)
    screen.section("Passed over", [f"{path}: {kind}" for path, kind in report.passed_over.items()])
    screen.section("Bounds exceeded", [f"{bound}: {found:.1%}" for bound, found in report.exceeded()])


def show_left_out(coverages: Mapping[str, Sequence[Coverage]]) -> None:
    """Prints how intervals do on runs that were left out of the fit."""
    screen = Screen()
    screen.line()
    screen.line("80 % intervals, fitted without what is left out", "bold")
    rows = [
        (
            words(metric), c.left_out, f"{c.rows:,}", f"{c.held:.1%}", f"{c.median_width:.1%}", f"{c.median_error:.1%}",
            f"{c.widths_per_error:.1f}",
        )
        for metric, found in coverages.items()
        for c in found
    ]  # fmt: skip
    headings = ("quantity", "left out", "rows", "held", "median width", "median error", "width/error")
    screen.grid(headings, rows, ("quantity", "left out"))


def _show_errors(screen: Screen, metric: str, found: Mapping[str, Any], by: str) -> None:
    screen.line()
    screen.line(words(metric), "bold")
    rows = [(name, *_cells(values)) for name, values in found[f"by_{by}"].items()]
    rows += [(f"kind: {name}", *_cells(values)) for name, values in found.get("by_kind", {}).items()]
    rows.append(("all rows", *_cells(found)))
    macro = (f"{found['macro_median_ape']:.1%}", "", f"{found['macro_p90_ape']:.1%}", "")
    rows.append((f"mean over {len(found['by_source'])} sources", "", *macro))
    screen.grid((by, "rows", *_STATISTICS.values()), rows, (by,), bold=(len(rows) - 2, len(rows) - 1))


def _cells(values: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{values['n']:,}",
        *(f"{values[key]:+.1%}" if key == "bias" else f"{values[key]:.1%}" for key in _STATISTICS),
    )


def _show_outcomes(screen: Screen, summary: Mapping[str, Any]) -> None:
    if (oom := summary.get("oom")) is not None:
        text = (
            f"{oom['tp']} as predicted, {oom['fn']} not foreseen; {oom['tn']} fit as predicted, {oom['fp']} fit against the "
            f"prediction; balanced accuracy {oom['balanced_accuracy']:.2f}"
        )
        screen.section("Out of memory", [text])
    if (ranking := summary.get("ranking")) is not None:
        lines = [
            f"{s['file']} {s['sweep_id']}: {s['plans']} plans, τ-b {s['kendall_tau']:.2f}, regret {s['top1_regret']:.1%}"
            for s in ranking["by_sweep"]
        ]
        mean = (
            f"{ranking['sweeps']} sweeps: mean Kendall τ-b {ranking['kendall_tau_mean']:.2f}, mean top-1 regret "
            f"{ranking['top1_regret_mean']:.1%}"
        )
        screen.section("Ranking of plans", [*lines, mean])


def _show_unscored(screen: Screen, report: Report) -> None:
    """Reasons with the rows that they concern."""
    for status, heading in (
        ("unsupported", "Asked for and not scored"),
        ("skipped", "Rows that ask for nothing"),
    ):
        rows = [row for row in report.rows if row.status == status]
        ids: dict[tuple[str, str], dict[str, None]] = {}
        for row in rows:
            ids.setdefault((row.file, row.reason), {})[row.row_id] = None
        numbers = Counter((row.file, row.reason) for row in rows)
        screen.section(
            heading,
            [f"{file}: {reason}: {', '.join(_in_runs(list(ids[file, reason])))}" for file, reason in numbers],
        )


def _in_runs(names: Sequence[str]) -> Iterator[str]:
    """Names, those of three consecutive numbers or more by the first and the last.

    >>> list(_in_runs(["a-007", "a-008", "a-009", "a-011", "b-012", "b"]))
    ['a-007 to a-009', 'a-011', 'b-012', 'b']
    """
    start = 0
    for end in range(1, len(names) + 1):
        if end < len(names) and _follows(names[end - 1], names[end]):
            continue
        run = names[start:end]
        yield from [f"{run[0]} to {run[-1]}"] if len(run) > 2 else run
        start = end


def _follows(one: str, other: str) -> bool:
    """Whether two names differ by one in the number that they end with."""
    before, after = _NUMBERED.fullmatch(one), _NUMBERED.fullmatch(other)
    return (
        before is not None
        and after is not None
        and before[1] == after[1]
        and int(after[2]) == int(before[2]) + 1
    )


def _show_excluded(screen: Screen, report: Report, summary: Mapping[str, Any]) -> None:
    excluded = {row.row_id: row.reason for row in report.rows if row.status == "excluded"}
    if not excluded:
        return
    whole = report.summary(with_excluded=True)
    lines = [f"{row_id}: {reason}" for row_id, reason in excluded.items()]
    for metric, found in whole.items():
        if metric not in _OTHER_SCORES:
            without = summary.get(metric)
            before = f"{without['macro_median_ape']:.1%}" if without else "-"
            lines.append(
                f"{words(metric)}: median over sources {before} without them, {found['macro_median_ape']:.1%} with them"
            )
    screen.section("Excluded: contradict themselves at their source", lines)
