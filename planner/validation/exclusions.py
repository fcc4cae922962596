"""Rows that contradict themselves at their source: they are predicted and shown, but not counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from planner.specs.reader import Reader, read_file

__all__ = ["Exclusion", "read_exclusions"]


@dataclass(frozen=True, slots=True)
class Exclusion:
    """What is wrong with a row: the contradiction, and the metrics that it spoils (none named: all of them)."""

    contradiction: str
    metrics: tuple[str, ...] = ()

    def reason(self, metric: str) -> str:
        """The contradiction where it concerns a metric; else nothing."""
        return self.contradiction if not self.metrics or metric in self.metrics else ""


def read_exclusions(path: str | Path | None = None) -> Mapping[str, Exclusion]:
    """The shipped exclusions, or those of a file, by row id.

    Raises:
        SpecError: the file is missing or wrong.
    """
    path = str(files("planner.validation").joinpath("exclusions.toml")) if path is None else str(path)
    reader = Reader(read_file(path), path)
    found, ids = {}, reader.keys()
    for row_id in ids:
        entry: Reader = reader.table(row_id)
        found[row_id] = Exclusion(entry.text("contradiction"), entry.texts("metrics", ()))
        entry.finish()
    reader.raise_if_any()
    return found
