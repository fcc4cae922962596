"""Files of measurements in, scores out: what ``planner validate`` prints and ``planner.validation`` returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from planner.errors import Problem, SpecError
from planner.validation.bounds import Bound, exceeded, read_bounds
from planner.validation.cells import DEFAULTS
from planner.validation.exclusions import read_exclusions
from planner.validation.outcomes import outcomes
from planner.validation.ranking import Comparison, ranking_summary, sweeps
from planner.validation.scores import ScoredRow, coverage, grouped, interval_statistics, summarise
from planner.validation.table import TRAINING_COLUMNS, Table, read_table
from planner.validation.training import Priced, score_training

__all__ = ["GROUPS", "Report", "validate"]

GROUPS = ("family", "accelerator", "source", "model")
_OPERATORS = {"kernels": ("operators", "score_kernels"), "collectives": ("collectives", "score_collectives")}


@dataclass(slots=True)
class Report:
    """Scores of some files.

    Attributes:
        rows: every row and metric.
        runs: training runs that may be ranked.
        defaults: by column, how many rows took its documented default.
        passed_over: files of another kind, with the kind that their header tells.
        bounds: recorded bounds; those of other files do not count.
        priced: training runs that could be priced.
    """

    rows: list[ScoredRow] = field(default_factory=list)
    runs: list[Comparison] = field(default_factory=list)
    defaults: Counter[str] = field(default_factory=Counter)
    passed_over: dict[str, str] = field(default_factory=dict)
    bounds: tuple[Bound, ...] = ()
    priced: list[Priced] = field(default_factory=list)

    def exceeded(self) -> list[tuple[Bound, float]]:
        """Recorded bounds that these scores exceed, with what was found."""
        return exceeded(self.bounds, summarise(self.rows))

    def summary(self, by: str | None = None, *, with_excluded: bool = False) -> dict[str, Any]:
        """Error statistics by metric, outcomes of memory, and ranking; what has no row is left out.

        Args:
            by: one of :data:`GROUPS`, for statistics by group beside those by source.
            with_excluded: whether rows that contradict themselves count.
        """
        errors = summarise(self.rows, with_excluded=with_excluded)
        summary: dict[str, Any] = {metric: found.as_dict() for metric, found in errors.items()}
        if "peak_memory" in summary:
            kinds = grouped(self.rows, "peak_memory_kind", with_excluded=with_excluded)
            summary["peak_memory"]["by_kind"] = kinds["peak_memory"]
        if by is not None:
            for metric, groups in grouped(self.rows, by).items():
                summary[metric][f"by_{by}"] = groups
        out_of_memory, found_sweeps = outcomes(self.rows), sweeps(self.runs)
        if out_of_memory is not None:
            summary["oom"] = out_of_memory
        if found_sweeps:
            summary["ranking"] = dict(ranking_summary(found_sweeps))
            summary["ranking"]["by_sweep"] = [sweep.as_dict() for sweep in found_sweeps]
        return summary

    def as_dict(self, by: str | None = None) -> dict[str, Any]:
        """The report as JSON fields; all errors, regrets and coverages are fractions."""
        return {
            "rows": [row.as_dict() for row in self.rows],
            "summary": self.summary(by),
            "with_excluded": self.summary(with_excluded=True) if self._excludes() else None,
            "coverage": coverage(self.rows),
            "intervals": interval_statistics(self.rows),
            "defaults": [
                {"column": d.column, "meaning": d.meaning, "why": d.why, "rows": self.defaults[d.column]}
                for d in DEFAULTS
                if self.defaults[d.column]
            ],
            "passed_over": self.passed_over,
            "bounds_exceeded": [
                {"file": b.file, "metric": b.metric, "statistic": b.statistic, "most": b.most, "found": found}
                for b, found in self.exceeded()
            ],
        }

    def _excludes(self) -> bool:
        return any(row.status == "excluded" for row in self.rows)


def validate(
    paths: Sequence[str | Path], *, operators: bool = False, bounds: str | Path | None = None
) -> Report:
    """Scores predictions against the rows of files; the header tells each file's kind.

    Args:
        paths: CSV files.
        operators: score kernels and collectives instead of training runs.
        bounds: a file of recorded bounds; None takes the shipped one.

    Raises:
        SpecError: a file cannot be read, or none of them is of the kind that is asked for.
    """
    tables = [(path, read_table(path, any_kind=True)) for path in paths]
    wanted = tuple(_OPERATORS) if operators else ("training", "serving")
    report = Report(bounds=read_bounds(bounds))
    excluded = read_exclusions()
    for path, table in tables:
        if table.kind not in wanted:
            report.passed_over[str(path)] = table.kind
        elif operators:
            report.rows += _scorer(table.kind)(path)
        elif table.kind == "serving":
            from planner.validation.serving import score_serving

            served = score_serving(table)
            report.rows += served.rows
            report.runs += served.runs
            report.defaults.update(served.defaults)
        else:
            scores = score_training(table, excluded)
            report.rows += scores.rows
            report.runs += scores.runs
            report.priced += scores.priced
            report.defaults.update(scores.defaults)
    if len(report.passed_over) == len(tables):
        expected = "a table of kernels or collectives" if operators else "a table of training or serving runs"
        raise SpecError(
            [
                Problem(str(path), f"holds {_SAID[table.kind]}", expected, _hint(table, operators))
                for path, table in tables
            ]
        )
    return report


def _hint(table: Table, operators: bool) -> str:
    """What to do about a file of another kind."""
    if table.kind != "unknown":
        return "" if operators else "Give --operators for kernels and collectives."
    lacks = sorted(TRAINING_COLUMNS - set(table.columns))
    if operators or len(lacks) > len(TRAINING_COLUMNS) / 2:
        return ""
    return f"A table of training runs has these columns too: {', '.join(lacks)}."


_SAID: Mapping[str, str] = {
    "training": "training runs",
    "serving": "serving runs",
    "kernels": "kernels",
    "collectives": "collectives",
    "unknown": "columns of no known kind",
}


def _scorer(kind: str) -> Callable[[str | Path], list[ScoredRow]]:
    """What scores a table of operators; imported when there is one."""
    module, name = _OPERATORS[kind]
    scorer: Callable[[str | Path], list[ScoredRow]] = getattr(
        import_module(f"planner.validation.{module}"), name
    )
    return scorer
