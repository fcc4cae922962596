"""What a prediction is judged by: one row and one metric, and the error statistics of many of them.

All errors are fractions of the measured value. A *source* is the file that a row comes from: statistics are given per source
and as their mean over sources (``macro``), so that a long table does not drown a short one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = [
    "STATUSES",
    "ErrorSummary",
    "ScoredRow",
    "coverage",
    "error_statistics",
    "grouped",
    "interval_statistics",
    "summarise",
]

WITHOUT_ERRORS = ("oom", "ranking")
STATUSES = ("scored", "skipped", "unsupported", "excluded")


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """One row of a file, judged by one metric.

    Attributes:
        row_id: the row's own name, or ``file:line``.
        file: name of the file, without its folder: the source.
        metric: what is compared, e.g. ``tokens_per_s_per_device``, ``peak_memory``, ``gemm``, ``collective_large``.
        status: ``scored``; ``skipped``: the row does not ask for this metric; ``unsupported``: it does, and the planner cannot
            predict it; ``excluded``: the row contradicts itself at its source.
        reason: why the row is not scored; empty where it is.
        measured: in the metric's SI unit; None where the row does not tell.
        predicted: in the same unit; None where there is none. An excluded row may have both.
        groups: what rows may be grouped by: family, accelerator, source, model and others.
        interval: what was expected to hold the measured value in 80 % of rows; None where no residuals are known.
    """

    row_id: str
    file: str
    metric: str
    status: str
    reason: str = ""
    measured: float | None = None
    predicted: float | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        assert self.status in STATUSES, self.status

    @property
    def error(self) -> float | None:
        """Signed error, ``predicted / measured - 1``; None unless both are there and the measured value is positive.

        >>> ScoredRow("a", "f.csv", "gemm", "scored", measured=2.0, predicted=2.5).error
        0.25
        """
        if self.measured is None or self.predicted is None or not self.measured > 0.0:
            return None
        return self.predicted / self.measured - 1.0

    def as_dict(self) -> dict[str, object]:
        """The row as JSON fields."""
        return {
            "row_id": self.row_id,
            "file": self.file,
            "metric": self.metric,
            "status": self.status,
            "reason": self.reason,
            "measured": self.measured,
            "predicted": self.predicted,
            "error": self.error,
            "interval": None if self.interval is None else list(self.interval),
        }


@dataclass(frozen=True, slots=True)
class ErrorSummary:
    """Error statistics of the scored rows of one metric.

    Attributes:
        pooled: n, median_ape, mape, p90_ape, max_ape and bias of all rows (see :func:`error_statistics`).
        macro_median_ape: mean over sources of each source's median.
        macro_p90_ape: mean over sources of each source's 90th percentile.
        by_source: file → the same statistics as ``pooled``.
    """

    pooled: Mapping[str, float]
    macro_median_ape: float
    macro_p90_ape: float
    by_source: Mapping[str, Mapping[str, float]]

    def as_dict(self) -> dict[str, object]:
        """The summary as JSON fields."""
        return {
            **self.pooled,
            "macro_median_ape": self.macro_median_ape,
            "macro_p90_ape": self.macro_p90_ape,
            "by_source": {name: dict(values) for name, values in self.by_source.items()},
        }


def error_statistics(errors: Sequence[float]) -> dict[str, float]:
    """Statistics of signed errors.

    Args:
        errors: ``predicted / measured - 1``, at least one.

    Returns:
        ``n``; ``median_ape``, ``mape`` (mean), ``p90_ape`` (90th percentile, linear between the two nearest) and ``max_ape`` of
        the absolute errors; ``bias``, the mean of the signed ones.

    >>> error_statistics([0.1, -0.2, 0.3])["median_ape"]
    0.2
    """
    signed = np.asarray(errors, dtype=np.float64)
    absolute = np.abs(signed)
    return {
        "n": len(signed),
        "median_ape": float(np.median(absolute)),
        "mape": float(absolute.mean()),
        "p90_ape": float(np.percentile(absolute, 90.0)),
        "max_ape": float(absolute.max()),
        "bias": float(signed.mean()),
    }


def summarise(rows: Iterable[ScoredRow], *, with_excluded: bool = False) -> dict[str, ErrorSummary]:
    """Error statistics by metric; a metric without a scored row is left out.

    Args:
        rows: rows of any metrics and sources.
        with_excluded: whether rows that contradict themselves count, where they have a prediction.
    """
    errors: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row, error in _judged(rows, with_excluded):
        errors[row.metric][row.file].append(error)
    found = {}
    for metric, sources in errors.items():
        by_source = {name: error_statistics(values) for name, values in sorted(sources.items())}
        macro_median, macro_p90 = (
            float(np.mean([s[key] for s in by_source.values()])) for key in ("median_ape", "p90_ape")
        )
        pooled = error_statistics([error for values in sources.values() for error in values])
        found[metric] = ErrorSummary(pooled, macro_median, macro_p90, by_source)
    return found


def grouped(
    rows: Iterable[ScoredRow], by: str, *, with_excluded: bool = False
) -> dict[str, dict[str, dict[str, float]]]:
    """Error statistics by metric and group: ``by`` is a key of :attr:`ScoredRow.groups`; rows without it form the group ``-``."""
    errors: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row, error in _judged(rows, with_excluded):
        errors[row.metric][row.groups.get(by) or "-"].append(error)
    return {
        metric: {name: error_statistics(values) for name, values in sorted(groups.items())}
        for metric, groups in errors.items()
    }


def _judged(rows: Iterable[ScoredRow], with_excluded: bool = False) -> Iterator[tuple[ScoredRow, float]]:
    """Rows that count, with their errors. Outcomes and rankings have scores of their own."""
    wanted = ("scored", "excluded") if with_excluded else ("scored",)
    for row in rows:
        if row.status in wanted and row.metric not in WITHOUT_ERRORS and (error := row.error) is not None:
            yield row, error


def coverage(rows: Iterable[ScoredRow]) -> dict[str, float]:
    """Scored rows as a fraction of the rows that ask for a metric, by metric; excluded rows do not count.

    >>> asked = [ScoredRow("a", "f.csv", "gemm", "scored"), ScoredRow("b", "f.csv", "gemm", "unsupported", "no such dtype")]
    >>> coverage(asked)
    {'gemm': 0.5}
    """
    scored: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    for row in rows:
        if row.status in ("scored", "unsupported"):
            asked[row.metric] += 1
            scored[row.metric] += row.status == "scored"
    return {metric: scored[metric] / number for metric, number in asked.items()}


def interval_statistics(rows: Iterable[ScoredRow]) -> dict[str, dict[str, float]]:
    """How intervals did, by metric: rows that have one, the share of them that ``held``, and the median width.

    Widths are relative to the prediction.

    >>> row = ScoredRow("a", "f.csv", "gemm", "scored", measured=2.0, predicted=2.5, interval=(2.25, 3.0))
    >>> interval_statistics([row])
    {'gemm': {'n': 1, 'held': 0.0, 'median_width': 0.3}}
    """
    found: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    for row, _ in _judged(rows):
        if row.interval is not None and row.measured and row.predicted:
            low, high = row.interval
            found[row.metric].append((low <= row.measured <= high, (high - low) / row.predicted))
    return {
        metric: {
            "n": len(cases),
            "held": float(np.mean([held for held, _ in cases])),
            "median_width": float(np.median([width for _, width in cases])),
        }
        for metric, cases in found.items()
    }
