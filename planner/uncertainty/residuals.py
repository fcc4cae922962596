"""What published runs measured, relative to what was predicted of them: the residuals behind every interval.

``residuals.json`` is written by ``planner validate --residuals``, never by hand. It holds quantiles of log(measured/predicted):
of step times by software stack, generation of accelerators and regime; of peak memory by stack and by whose memory was counted;
and of everything together, for what was never measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from planner.specs.reader import Reader, read_file

__all__ = [
    "COVERAGE",
    "FILE",
    "GROUPED_BY",
    "PROBABILITIES",
    "PROCESS",
    "Residuals",
    "Spread",
    "Spreads",
    "load_residuals",
    "read_residuals",
    "regime",
]

COVERAGE = 0.8
"""Share of measurements that an interval is meant to hold."""
PROBABILITIES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
PROCESS = "process"
"""Memory of a whole process, as ``nvidia-smi`` shows it and as the device runs out of it."""
GROUPED_BY = {"step_time": ("stack", "generation", "regime"), "peak": ("stack", "counted")}
"""What runs are grouped by, for each quantity."""
FILE = Path(__file__).with_name("residuals.json")

_SCORES = (-1.6449, -1.2816, -0.6745, 0.0, 0.6745, 1.2816, 1.6449)  # of a standard normal, at PROBABILITIES
_LOW, _HIGH = PROBABILITIES.index(0.1), PROBABILITIES.index(0.9)
_LEAST = 1e-4  # between neighbouring quantiles; a spread of zero would claim more than any measurement can


class Spread(NamedTuple):
    """How measurements spread around predictions.

    Attributes:
        quantiles: of log(measured/predicted), at :data:`PROBABILITIES`.
        rows, models: how many measurements of how many models they come from.
        sources: files of the measurements.
    """

    quantiles: tuple[float, ...]
    rows: int = 0
    models: int = 0
    sources: tuple[str, ...] = ()

    def interval(self, predicted: float) -> tuple[float, float]:
        """What holds 80 % of measurements, in the unit of the prediction.

        >>> low, high = Spread((-0.2, -0.1, 0.0, 0.0, 0.1, 0.2, 0.3)).interval(10.0)
        >>> round(low, 2), round(high, 2)
        (9.05, 12.21)
        """
        return predicted * math.exp(self.quantiles[_LOW]), predicted * math.exp(self.quantiles[_HIGH])

    def probability_above(self, predicted: float, limit: float) -> float:
        """How likely the measurement exceeds a limit: interpolated between quantiles, with normal tails beyond them.

        >>> Spread((-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2)).probability_above(80.0, 80.0)
        0.5
        """
        return 0.5 * math.erfc(self._score(math.log(limit / predicted)) / math.sqrt(2.0))

    def _score(self, residual: float) -> float:
        """The normal score that a residual has in this spread."""
        known = list(zip(self.quantiles, _SCORES, strict=True))
        segment = next((i for i in range(1, len(known) - 1) if residual <= known[i][0]), len(known) - 1)
        (low, low_score), (high, high_score) = known[segment - 1], known[segment]
        return low_score + (residual - low) / max(high - low, _LEAST) * (high_score - low_score)


class Spreads(NamedTuple):
    """Spreads of one quantity by group, and of everything together, for a group that was never measured."""

    pooled: Spread
    groups: Mapping[tuple[str, ...], Spread] = MappingProxyType({})

    def of(self, *group: str) -> Spread:
        """The group's own spread; the pooled one, which is wider, where there is none."""
        return self.groups.get(group, self.pooled)


class Residuals(NamedTuple):
    """What the shipped intervals rest on.

    Attributes:
        step_time: spreads of step times, by stack, generation of accelerators and :func:`regime`.
        peak: spreads of peak memory, by stack and what was counted (``allocator`` or :data:`PROCESS`).
        pair_distances, pair_noises: up to which ratio the order of two plans is a coin's toss, by how unlike they are.
        terms: by quantity, the deviation of each term's logarithm.
    """

    step_time: Spreads
    peak: Spreads
    pair_distances: tuple[float, ...] = ()
    pair_noises: tuple[float, ...] = ()
    terms: Mapping[str, Mapping[str, float]] = MappingProxyType({})


def regime(experts: bool, mesh: Mapping[str, int]) -> str:
    """What kind of work a plan is, as far as errors differ by it: with experts or without, cut by more than data or not.

    >>> regime(False, {"tp": 1, "cp": 1, "pp": 1, "ep": 1, "dp": 64})
    'dense, data-parallel'
    """
    cut = any(mesh[name] > 1 for name in ("tp", "cp", "pp", "ep"))
    return f"{'experts' if experts else 'dense'}, {'model' if cut else 'data'}-parallel"


@cache
def load_residuals() -> Residuals | None:
    """The shipped residuals; None where there are none (they are being made).

    Raises:
        SpecError: the file is wrong.
    """
    return read_residuals(FILE) if FILE.is_file() else None


def read_residuals(path: str | Path) -> Residuals:
    """The residuals of a file.

    Raises:
        SpecError: the file is missing or wrong.
    """
    reader = Reader(read_file(path), str(path))
    step_time, peak = (_spreads(reader.table(name), columns) for name, columns in GROUPED_BY.items())
    pairs: Reader = reader.table("pairs")
    found = Residuals(step_time, peak, pairs.numbers("distances"), pairs.numbers("noises"), _terms(reader))
    pairs.ignore("rows", "sweeps")
    reader.ignore("about", "sources")
    for part in (pairs, reader):
        part.finish()
    reader.raise_if_any()
    return found


def _terms(reader: Reader) -> dict[str, dict[str, float]]:
    table: Reader = reader.table("terms")
    found = {}
    for quantity in ("step_time", "peak"):
        terms: Reader = table.table(quantity)
        names = terms.keys()
        found[quantity] = {name: terms.number(name) for name in names}
        terms.finish()
    table.finish()
    return found


def _spreads(reader: Reader, columns: tuple[str, ...]) -> Spreads:
    pooled = _spread(reader.table("pooled"))
    groups = {}
    for row in reader.tables("group", []):
        group = tuple(row.text(column) for column in columns)
        groups[group] = _spread(row)
    reader.finish()
    return Spreads(pooled, groups)


def _spread(reader: Reader) -> Spread:
    quantiles = reader.numbers("quantiles")
    if len(quantiles) != len(PROBABILITIES) or list(quantiles) != sorted(quantiles):
        reader.problem("quantiles", repr(quantiles)[:80], f"{len(PROBABILITIES)} numbers that do not fall")
        quantiles = (0.0,) * len(PROBABILITIES)
    spread = Spread(quantiles, reader.integer("rows"), reader.integer("models"), reader.texts("sources", ()))
    reader.finish()
    return spread
