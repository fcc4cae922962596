"""Recorded bounds: how large an error may become before ``planner validate`` fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from planner.specs.reader import Reader, read_file
from planner.validation.scores import ErrorSummary

__all__ = ["Bound", "exceeded", "read_bounds"]

_STATISTICS = ("median_ape", "mape", "p90_ape", "max_ape")


@dataclass(frozen=True, slots=True)
class Bound:
    """The most that a statistic of one file and metric may be."""

    file: str
    metric: str
    statistic: str
    most: float

    def __str__(self) -> str:
        return f"{self.file}: {self.metric} {self.statistic} at most {self.most:.1%}"


def read_bounds(path: str | Path | None = None) -> tuple[Bound, ...]:
    """The shipped bounds, or those of a file: ``["runs.csv".tokens_per_s_per_device]`` and, below it, ``mape = 0.04``.

    Raises:
        SpecError: the file is missing or wrong.
    """
    path = str(files("planner.validation").joinpath("bounds.toml")) if path is None else str(path)
    reader = Reader(read_file(path), path)
    found: list[Bound] = []
    sources, known = reader.keys(), set(_STATISTICS)
    for file in sources:
        table: Reader = reader.table(file)
        metrics = table.keys()
        for metric in metrics:
            entry: Reader = table.table(metric)
            names = [name for name in entry.keys() if name in known]  # noqa: SIM118
            found += [Bound(file, metric, name, entry.number(name)) for name in names]
            entry.ignore("reason")
            entry.finish()
    reader.raise_if_any()
    return tuple(found)


def exceeded(bounds: tuple[Bound, ...], summary: Mapping[str, ErrorSummary]) -> list[tuple[Bound, float]]:
    """Bounds that the scores of these files exceed, each with the value found; bounds of other files are passed over."""
    found = []
    for bound in bounds:
        statistics = summary[bound.metric].by_source.get(bound.file) if bound.metric in summary else None
        if statistics is not None and statistics[bound.statistic] > bound.most:
            found.append((bound, statistics[bound.statistic]))
    return found
