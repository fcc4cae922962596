"""Fits the spread of measurements around predictions, and verifies it on rows that the fit did not see.

A residual is held against how uncertain its prediction was, as independent errors. Of a step: each of its terms, by its share
(``planner.validation.term_fit``); and, where no measured run is near the job, what far ones err by beside that. Of a peak
(``planner.validation.peak_fit``): what is counted exactly; what a process takes beside it; and the share that software holds.
Quantiles of residuals relative to that are those of normalised conformal prediction (Lei et al. 2018, arXiv:1604.04173, section
5.2). A run counts as predicted by constants that were fitted without its model; a held-out run is one that no constant saw. Runs
whose source alone knows their software say how uncertain unknown software is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from planner.ledger import Array
from planner.uncertainty.residuals import COVERAGE, PROBABILITIES, Spreads, scale
from planner.uncertainty.terms import OUTSIDE, TIME_TERMS
from planner.validation.peak_fit import Outcome, fit_peaks
from planner.validation.quantiles import quantiles_of, tail_of
from planner.validation.term_fit import fit_deviations, squared_shares

__all__ = ["Coverage", "Intervals", "Residual", "fit_spreads", "left_out"]

_LOW, _HIGH = (PROBABILITIES.index(p) for p in (0.1, 0.9))
_FAR, _FAR_EXPERTS = "far", "far experts"
_NAMES = (*(term.name for term in TIME_TERMS), _FAR, _FAR_EXPERTS)


@dataclass(frozen=True, slots=True)
class Residual:
    """log(measured/predicted) of one run, by constants fitted without its model, and without its source.

    ``model`` is a name inside the source; ``shares`` of the prediction by term, ``share`` how much it moves with an error of all
    constants, ``experts`` whether the model is a mixture of them, ``far`` whether no measured run is near it, ``far_elsewhere``
    whether none of another source is, whatever its software, ``held_out`` whether constants were never fitted to it, ``software``
    the share of a peak that software holds, and ``counted`` whether what was measured of it is counted exactly.
    """

    source: str
    model: str
    stack: str
    generation: str
    without_model: float
    without_source: float
    shares: Mapping[str, float] = field(default_factory=dict)
    share: float = 0.0
    experts: bool = False
    far: bool = False
    far_elsewhere: bool = False
    held_out: bool = False
    software: float = 0.0
    counted: bool = False


@dataclass(frozen=True, slots=True)
class Coverage:
    """Intervals of runs that were left out of the fit.

    Attributes:
        left_out: what was left out at a time, ``model`` or ``source``.
        rows: how many runs.
        held: share of them whose measurement lies inside.
        median_width: of the intervals, relative to the prediction.
        median_error: of the predictions' absolute errors, relative to the measurement.
        one_width: of the narrowest interval around every prediction, the same of all, that holds 80 % of these very runs: what
            nothing but their errors would tell.
    """

    left_out: str
    rows: int
    held: float
    median_width: float
    median_error: float
    one_width: float

    @property
    def widths_per_error(self) -> float:
        """Median width over median error; 3.8 for a normal distribution of known spread."""
        return self.median_width / self.median_error

    def as_dict(self) -> dict[str, object]:
        """The coverage as JSON fields."""
        return {name: getattr(self, name) for name in self.__slots__} | {
            "widths_per_error": self.widths_per_error
        }


@dataclass(frozen=True, slots=True)
class Intervals:
    """Ends of the intervals of runs that were left out of their fit, and what they were off by; logarithms."""

    left_out: str
    errors: Array
    low: Array
    high: Array

    def coverage(self, among: Sequence[bool] | None = None) -> Coverage:
        """How they do.

        Args:
            among: which of the runs are counted; all, unless given.
        """
        counted = np.ones(len(self.errors), dtype=bool) if among is None else np.array(among)
        errors, low, high = (ends[counted] for ends in (self.errors, self.low, self.high))
        ordered, within = np.sort(errors), int(np.ceil(COVERAGE * len(errors)))
        ends = np.exp(ordered)
        return Coverage(
            self.left_out,
            len(errors),
            float(np.mean((low <= errors) & (errors <= high))),
            float(np.median(np.exp(high) - np.exp(low))),
            float(np.median(np.abs(np.expm1(-errors)))),
            float(np.min(ends[within - 1 :] - ends[: len(errors) - within + 1])),
        )


def fit_spreads(residuals: Sequence[Residual], outcomes: Sequence[Outcome] | None = None) -> Spreads:
    """The spreads of one quantity.

    Args:
        residuals: at least one.
        outcomes: of peak memory, runs that ran out of it or did not, and were not read; None: it is a step time.
    """
    return _fit(_Rows.of(residuals), outcomes)


def left_out(residuals: Sequence[Residual], by: str, outcomes: Sequence[Outcome] | None = None) -> Intervals:
    """Intervals that are fitted without one model, or one source, on the runs of that one.

    Args:
        residuals: of one quantity.
        by: ``model`` or ``source``.
        outcomes: see :func:`fit_spreads`.
    """
    rows = _Rows.of(residuals)
    errors = rows.without_model if by == "model" else rows.without_source
    unknown = rows.alone & (by == "source")
    folds, their_folds = (
        np.array([f"{r.source} {r.model}" if by == "model" else r.source for r in those])
        for those in (residuals, outcomes or ())
    )
    low, high = np.zeros(len(errors)), np.zeros(len(errors))
    for fold in np.unique(folds):
        out = folds == fold
        if out.all():
            continue
        kept = (
            None
            if outcomes is None
            else [one for one, f in zip(outcomes, their_folds, strict=True) if f != fold]
        )
        fitted = _fit(rows.take(~out), kept)
        scales = _scale(fitted, rows.take(out), unknown[out])
        low[out], high[out] = fitted.quantiles[_LOW] * scales, fitted.quantiles[_HIGH] * scales
    return Intervals(by, errors, low, high)


# -- details ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rows:
    """Residuals as arrays; ``squares`` of the shares by term, ``alone`` whether their source alone knows their software."""

    residuals: tuple[Residual, ...]
    without_model: Array
    without_source: Array
    squares: Array
    share: Array
    experts: Array
    far: Array
    far_elsewhere: Array
    software: Array
    counted: Array
    alone: Array

    @classmethod
    def of(cls, residuals: Sequence[Residual]) -> _Rows:
        """All of them."""
        columns = {
            name: np.array([getattr(r, name) for r in residuals])
            for name in cls.__slots__
            if name not in ("residuals", "squares", "alone")
        }
        squares = squared_shares([{**r.shares, OUTSIDE: 1.0} for r in residuals], _NAMES)
        return cls(tuple(residuals), squares=squares, alone=np.array(_alone(residuals)), **columns)

    def take(self, which: Array) -> _Rows:
        """Some of them."""
        some = tuple(r for r, is_taken in zip(self.residuals, which, strict=True) if is_taken)
        rest = (getattr(self, name)[which] for name in self.__slots__ if name != "residuals")
        return type(self)(some, *rest)


def _fit(rows: _Rows, outcomes: Sequence[Outcome] | None) -> Spreads:
    residuals = rows.residuals
    spreads = Spreads(
        (), 0.0, len(residuals), len({(r.source, r.model) for r in residuals}), tuple(sorted({r.source for r in residuals})),
        frozenset((r.stack, r.generation) for r in residuals),
    )  # fmt: skip
    if outcomes is not None:
        return fit_peaks(spreads, rows.without_model, rows.software, rows.counted, outcomes)
    return _fit_steps(spreads, rows)


def _fit_steps(spreads: Spreads, rows: _Rows) -> Spreads:
    """Deviations of a step's terms, and what far jobs err by beside them."""
    squares, errors = rows.squares.copy(), rows.without_model
    for name, far in ((_FAR, rows.far & ~rows.experts), (_FAR_EXPERTS, rows.far & rows.experts)):
        squares[:, _NAMES.index(name)] = far
    found = fit_deviations(squares, errors, np.ones(len(errors)), _NAMES)
    terms = {name: float(deviation) for name, deviation in zip(_NAMES, found, strict=True)}
    spreads = spreads._replace(
        far=terms.pop(_FAR), experts=terms.pop(_FAR_EXPERTS), terms=terms, floor=terms[OUTSIDE]
    )
    scores = errors / _scale(spreads, rows)
    quantiles = quantiles_of(scores)
    spreads = spreads._replace(quantiles=quantiles, tail=tail_of(scores, quantiles))
    return spreads._replace(between=_between(spreads, rows))


def _scale(spreads: Spreads, rows: _Rows, unknown: Array | None = None) -> Array:
    """What residuals are held against, of each; software is ``unknown`` where no source is left that knows it."""
    unknown = np.zeros_like(rows.far) if unknown is None else unknown
    far = np.where(unknown, rows.far_elsewhere, rows.far)
    return scale(
        spreads.floor,
        _of_terms(spreads, rows),
        np.where(rows.experts, spreads.experts, spreads.far) * far,
        rows.share * spreads.between * unknown,
        rows.software,
        np.where(rows.counted, 0.0, spreads.process),
    )


def _of_terms(spreads: Spreads, rows: _Rows) -> Array:
    deviations = [spreads.terms.get(name, 0.0) if name != OUTSIDE else 0.0 for name in _NAMES]
    found: Array = np.sqrt(rows.squares @ np.square(deviations))
    return found


def _alone(residuals: Sequence[Residual]) -> list[bool]:
    """Whether no other source that constants are fitted to knows a run's software on its generation of accelerators."""
    knows: dict[tuple[str, str], set[str]] = defaultdict(set)
    for r in residuals:
        if not r.held_out:
            knows[r.stack, r.generation].add(r.source)
    return [not r.held_out and r.share > 0.0 and len(knows[r.stack, r.generation]) == 1 for r in residuals]


def _between(spreads: Spreads, rows: _Rows) -> float:
    """How uncertain constants of unknown software are: so that 80 % of the runs are held whose source alone knows their software.

    They are taken as an unknown stack's would be, with their source left out; 0 where there are none.
    """
    if not rows.alone.any():
        return 0.0
    alone = rows.take(rows.alone)
    errors = alone.without_source
    known = _scale(spreads, alone, alone.alone)
    # The scale that just holds each.
    needed = np.where(errors > 0.0, errors / spreads.quantiles[_HIGH], errors / spreads.quantiles[_LOW])
    between = np.sqrt(np.maximum(needed**2 - known**2, 0.0)) / alone.share
    return float(np.quantile(between, COVERAGE))
