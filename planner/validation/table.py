"""Measurement files: what kind of table a header tells, and rows whose cells are read strictly.

A file that cannot be read is the user's mistake (:class:`~planner.errors.SpecError`); a cell that cannot be read concerns its row
alone (:class:`Unsupported`).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from planner.errors import Problem, SpecError

__all__ = ["KINDS", "TRAINING_COLUMNS", "Row", "Table", "Unsupported", "read_table", "table_kind"]

TRAINING_COLUMNS = frozenset(
    {"n_layers", "hidden", "n_heads", "seq_len", "n_devices", "tp", "pp", "micro_batch", "global_batch", "accelerator"}
)  # fmt: skip
_COLLECTIVE_COLUMNS = frozenset(
    {"collective", "allreduce_dtype", "dispatch_avg_t_us", "dispatch_transmit_us", "moe_ep_size"}
)
_EXPERT_KERNEL = (
    "inter_size"  # a table of expert kernels also names the ranks that the experts are spread over
)
_TIMES = ("latency_ms", "latency_us", "latency_ns", "time_us")
_LARGEST = 10**15  # that any table counts: bytes of a message
_MOST_TOLD = 5  # mistakes of one kind in a file
KINDS = ("training", "serving", "kernels", "collectives", "unknown")


class Unsupported(Exception):
    """A row that asks for a prediction which the planner cannot make; the text says why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its place, and its cells by column, stripped."""

    file: str
    line: int
    cells: Mapping[str, str]

    @property
    def row_id(self) -> str:
        """The row's own name, or ``file:line``."""
        return self.cells.get("row_id") or f"{self.file}:{self.line}"

    def text(self, column: str) -> str:
        """The cell; empty where the file lacks the column."""
        return self.cells.get(column, "")

    def number(self, column: str) -> float | None:
        """A positive number; None where the cell is empty.

        Raises:
            Unsupported: the cell holds something else.
        """
        text = self.text(column)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0.0):
            raise Unsupported(f"{column} is {text!r}, no number from 0")
        return value

    def whole(self, column: str) -> int | None:
        """A whole number from 0; None where the cell is empty.

        Raises:
            Unsupported: the cell holds something else.
        """
        value = self.number(column)
        if value is not None and value != int(value):
            raise Unsupported(f"{column} is {self.text(column)!r}, no whole number")
        if value is not None and value > _LARGEST:
            raise Unsupported(f"{column} is {self.text(column)!r}, more than {_LARGEST:,}")
        return None if value is None else int(value)

    def truth(self, column: str) -> bool | None:
        """``true`` or ``false``; None where the cell is empty.

        Raises:
            Unsupported: the cell holds something else.
        """
        text = self.text(column).lower()
        if text not in ("", "true", "false"):
            raise Unsupported(f"{column} is {text!r}, neither true nor false")
        return {"true": True, "false": False}.get(text)


@dataclass(frozen=True, slots=True)
class Table:
    """A file: its name without folder, its kind, its columns and rows."""

    file: str
    kind: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def read_table(path: str | Path, *, any_kind: bool = False) -> Table:
    """Reads a CSV file whose first line names the columns.

    Args:
        path: the file.
        any_kind: take a file of no known kind as it is; its rows need not be those of a table.

    Raises:
        SpecError: there is no such file, it is no text, is empty, a column stands twice, or a row has more cells than there are
            columns.
    """
    path = Path(path)
    where = str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise SpecError(Problem(where, "no such file", "a CSV file", "Check the path.")) from None
    except UnicodeDecodeError as error:
        raise SpecError(Problem(where, f"is not UTF-8 text ({error.reason})", "a CSV file")) from None
    except (OSError, ValueError) as error:
        raise SpecError(Problem(where, f"cannot be read ({error})", "a CSV file")) from None
    lines = csv.reader(text.splitlines(keepends=True))
    try:
        columns = tuple(name.strip() for name in next(lines, ()))
        found = [(lines.line_num, cells) for cells in lines if any(cells)]
    except csv.Error as error:
        raise SpecError(Problem(f"{where}:{lines.line_num}", f"is no CSV ({error})", "a CSV file")) from None
    if not any(columns):
        raise SpecError(Problem(where, "is empty", "a header and rows"))
    kind = table_kind(columns)
    if kind != "unknown" or not any_kind:
        _check_cells(where, columns, found)
    rows = tuple(
        Row(path.name, line, {name: cell.strip() for name, cell in zip(columns, cells, strict=False)})
        for line, cells in found
    )
    return Table(path.name, kind, columns, rows)


def _check_cells(where: str, columns: tuple[str, ...], found: Sequence[tuple[int, list[str]]]) -> None:
    """Raises SpecError if a column stands twice, or a row has more cells than there are columns."""
    twice = [name for name in dict.fromkeys(columns) if name and columns.count(name) > 1]
    if twice:
        raise SpecError(
            Problem(f"{where}:1", f"columns that stand twice: {', '.join(twice)}", "each column once")
        )
    long = [
        Problem(f"{where}:{line}", f"{len(cells)} cells", f"{len(columns)}, as the header has")
        for line, cells in found
        if any(cells[len(columns) :])
    ]
    if len(long) > _MOST_TOLD:
        more = Problem(where, f"{len(long) - _MOST_TOLD} more rows like these", long[0].expected)
        raise SpecError([*long[:_MOST_TOLD], more])
    if long:
        raise SpecError(long)


def table_kind(columns: tuple[str, ...]) -> str:
    """What the rows of a table with these columns are; one of :data:`KINDS`.

    >>> table_kind(("accelerator", "m", "n", "k", "latency_ms"))
    'kernels'
    """
    names = set(columns)
    if names >= TRAINING_COLUMNS:
        return "training"
    if {"engine", "input_len"} <= names:
        return "serving"
    if names & _COLLECTIVE_COLUMNS and _EXPERT_KERNEL not in names:
        return "collectives"
    return "kernels" if "accelerator" in names and names & set(_TIMES) else "unknown"
