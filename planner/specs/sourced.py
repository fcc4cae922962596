"""Reads a number with its origin: ``{ value = 3.35e12, kind = "datasheet", source = "a-key" }``."""

from __future__ import annotations

from planner.specs.device import KINDS, Sourced
from planner.specs.reader import Reader

__all__ = ["read_optional", "read_sourced"]


def read_sourced(reader: Reader, key: str, *, maximum: float = 1e30, positive: bool = True) -> Sourced:
    """The number at ``key``: a table of value, kind, source and, if fitted, spread, or a plain number.

    A plain number, as people write in files of their own, is ``assumed`` and its source is the file. Problems
    are noted on the reader.
    """
    if isinstance(reader.data.get(key), int | float):
        return Sourced(reader.number(key, positive=positive, maximum=maximum), "assumed", reader.where)
    table: Reader = reader.table(key)
    if not table.data:  # missing or no table: the reader has noted it
        return Sourced(1.0, "assumed", reader.where)
    number = Sourced(
        table.number("value", positive=positive, maximum=maximum),
        table.text("kind", choices=KINDS),
        table.text("source"),
        table.number("spread", positive=True) if table.has("spread") else None,
    )
    table.finish()
    return number


def read_optional(reader: Reader, key: str, *, maximum: float = 1e30) -> Sourced | None:
    """As :func:`read_sourced`, or ``None`` where the key is absent."""
    reader.ignore(key)
    return read_sourced(reader, key, maximum=maximum) if reader.has(key) else None
