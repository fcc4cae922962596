"""What published runs measured, relative to what was predicted of them: the residuals behind every interval.

``residuals.json`` is written by ``planner validate --residuals``, never by hand. It holds, of step times and of peak memory,
quantiles of log(measured/predicted) relative to how uncertain each prediction was, the least that a prediction is uncertain, and
what its terms add.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from planner.ledger import Array
from planner.specs.reader import Reader, read_file

__all__ = [
    "COVERAGE",
    "FILE",
    "PROBABILITIES",
    "QUANTITIES",
    "Residuals",
    "Spread",
    "Spreads",
    "load_residuals",
    "read_residuals",
    "scale",
]

COVERAGE = 0.8
"""Share of measurements that an interval is meant to hold."""
PROBABILITIES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
QUANTITIES = ("step_time", "peak")
FILE = Path(__file__).with_name("residuals.json")

_SCORES = (-1.6449, -1.2816, -0.6745, 0.0, 0.6745, 1.2816, 1.6449)  # of a standard normal, at PROBABILITIES
_LOW, _MEDIAN, _HIGH = (PROBABILITIES.index(p) for p in (0.1, 0.5, 0.9))
_LEAST = 1e-4  # between neighbouring quantiles; a spread of zero would claim more than any measurement can


class Spread(NamedTuple):
    """How the measurement may spread around one prediction.

    Attributes:
        quantiles: of log(measured/predicted), at :data:`PROBABILITIES`.
        tail: beyond the outermost of them, the chance of more falls as this power of the distance from the median, as large
            errors do (Hill 1975); infinite: as a normal distribution's.
    """

    quantiles: tuple[float, ...]
    tail: float = math.inf

    def interval(self, predicted: float) -> tuple[float, float]:
        """What holds 80 % of measurements, in the unit of the prediction.

        >>> low, high = Spread((-0.2, -0.1, 0.0, 0.0, 0.1, 0.2, 0.3)).interval(10.0)
        >>> round(low, 2), round(high, 2)
        (9.05, 12.21)
        """
        return predicted * math.exp(self.quantiles[_LOW]), predicted * math.exp(self.quantiles[_HIGH])

    def probability_above(self, predicted: float, limit: float) -> float:
        """How likely the measurement exceeds a limit: interpolated between quantiles, with a tail beyond them.

        >>> spread = Spread((-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2), tail=2.0)
        >>> spread.probability_above(80.0, 80.0)
        0.5
        >>> round(spread.probability_above(1.0, math.exp(0.4)), 4)  # twice as far as 5 % reach: a quarter of them
        0.0125
        """
        residual = math.log(limit / predicted)
        middle = self.quantiles[_MEDIAN]
        end = self.quantiles[0] if residual < middle else self.quantiles[-1]
        beyond = (residual - middle) / (end - middle) if end != middle else 0.0
        if beyond > 1.0 and math.isfinite(self.tail):
            chance: float = PROBABILITIES[0] * beyond**-self.tail
            return chance if residual > middle else 1.0 - chance
        return 0.5 * math.erfc(self._score(residual) / math.sqrt(2.0))

    def _score(self, residual: float) -> float:
        """The normal score that a residual has in this spread."""
        known = list(zip(self.quantiles, _SCORES, strict=True))
        segment = next((i for i in range(1, len(known) - 1) if residual <= known[i][0]), len(known) - 1)
        (low, low_score), (high, high_score) = known[segment - 1], known[segment]
        return low_score + (residual - low) / max(high - low, _LEAST) * (high_score - low_score)


class Spreads(NamedTuple):
    """How measurements of one quantity spread, relative to how uncertain their predictions were.

    Attributes:
        quantiles: of log(measured/predicted) over :func:`scale`, at :data:`PROBABILITIES`.
        floor: what every prediction is uncertain by, whatever it rests on; a logarithm.
        rows, models: how many measurements of how many models they come from.
        sources: files of the measurements.
        measured: stacks and generations of accelerators that they were on.
        between: how far a constant of software that was never measured may lie from what stands in for it; a logarithm.
        far: what a job is uncertain by beside that where no measured run is near it; a logarithm.
        experts: the same of a mixture of experts.
        process: what a process is uncertain by beside what is counted of it; a logarithm.
        tail: of every spread.
        terms: deviation of each term's logarithm (:mod:`planner.uncertainty.terms`).
    """

    quantiles: tuple[float, ...]
    floor: float
    rows: int = 0
    models: int = 0
    sources: tuple[str, ...] = ()
    measured: frozenset[tuple[str, str]] = frozenset()
    between: float = 0.0
    far: float = 0.0
    experts: float = 0.0
    process: float = 0.0
    tail: float = math.inf
    terms: Mapping[str, float] = MappingProxyType({})

    def at(
        self, uncertain: float, *, far: bool = False, experts: bool = False, counted: bool = False
    ) -> Spread:
        """The spread of a prediction that is so uncertain by its terms, or by the software that it rests on.

        ``far``: no measured run is near its job (:mod:`planner.uncertainty.nearest`); ``experts``: it is a mixture of experts;
        ``counted``: of what is predicted, every byte is counted, and nothing is a process's own.

        >>> quantiles = (-1.6, -1.3, -0.7, 0.0, 0.7, 1.3, 1.6)
        >>> low, high = Spreads(quantiles, floor=0.03).at(0.04).interval(1.0)
        >>> round(low, 3), round(high, 3)
        (0.937, 1.067)
        """
        beside = (self.experts if experts else self.far) if far else 0.0
        factor = float(scale(self.floor, uncertain, beside, 0.0 if counted else self.process))
        return Spread(tuple(factor * quantile for quantile in self.quantiles), self.tail)


def scale(*errors: Array | float) -> Array:
    """What residuals are held against: ways to be wrong that are independent."""
    return np.sqrt(sum(np.square(error) for error in errors))


class Residuals(NamedTuple):
    """What the shipped intervals rest on.

    Attributes:
        step_time: spreads of step times; uncertain by their terms.
        peak: spreads of peak memory; uncertain by the share that software holds beside states and activations.
        pair_distances, pair_noises: up to which ratio the order of two plans is a coin's toss, by how unlike they are.
    """

    step_time: Spreads
    peak: Spreads
    pair_distances: tuple[float, ...] = ()
    pair_noises: tuple[float, ...] = ()


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
    step_time, peak = (_spreads(reader.table(name)) for name in QUANTITIES)
    pairs: Reader = reader.table("pairs")
    found = Residuals(step_time, peak, pairs.numbers("distances"), pairs.numbers("noises"))
    pairs.ignore("rows", "sweeps")
    reader.ignore("about", "sources")
    for part in (pairs, reader):
        part.finish()
    reader.raise_if_any()
    return found


def _spreads(reader: Reader) -> Spreads:
    quantiles = reader.numbers("quantiles")
    if len(quantiles) != len(PROBABILITIES) or list(quantiles) != sorted(quantiles):
        reader.problem("quantiles", repr(quantiles)[:80], f"{len(PROBABILITIES)} numbers that do not fall")
        quantiles = (0.0,) * len(PROBABILITIES)
    measured = (text.partition(" on ") for text in reader.texts("measured", ()))
    table: Reader = reader.table("terms")
    terms = {name: table.number(name) for name in table.keys()}  # noqa: SIM118 (a Reader is no mapping)
    table.finish()
    spreads = Spreads(
        quantiles, reader.number("floor", positive=True), reader.integer("rows"), reader.integer("models"),
        reader.texts("sources", ()), frozenset((stack, generation) for stack, _, generation in measured),
        reader.number("between", 0.0), reader.number("far", 0.0), reader.number("experts", 0.0), reader.number("process", 0.0),
        reader.number("tail", math.inf), terms,
    )  # fmt: skip
    reader.finish()
    return spreads
