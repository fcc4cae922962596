"""Fits the spread of measurements around predictions, group by group, and verifies it on rows that the fit did not see.

A group's quantiles are its own and those of all rows, weighted as ``models : 5``: few models say little of the next one. Rows
of one model are alike, so ``n`` of them weigh as ``√n``. What quantiles of the past promise for the next run is checked by
leaving out one model at a time: their distances from the median are stretched by one factor, such that the 80 % interval holds
80 % of what was left out (conformal prediction by normalised residuals: Lei et al. 2018, arXiv:1604.04173, section 5.2). The
factor is a group's own where it has rows and models enough (Mondrian conformal prediction: Vovk et al. 2005, "Algorithmic
Learning in a Random World", section 4.5), else that of groups of its kind, the last part of its name: software whose errors jump
from model to model does not widen the intervals of software whose errors do not. A group that was never measured takes the
quantiles of all rows, stretched by what it took to hold the runs of sources that alone know their group, and at least until
they are as far apart as those of half of the groups: what nobody has measured is no surer than what somebody has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.ledger import Array
from planner.uncertainty.residuals import COVERAGE, PROBABILITIES, Spread, Spreads

__all__ = ["Coverage", "Residual", "fit_spreads", "left_out"]

_POOL_MODELS = 5.0  # models that a group needs to count as much as everything else
_FEWEST, _FEWEST_MODELS = 20, 3  # rows, and models of a group, that a stretch factor is taken from
_LOW, _MIDDLE, _HIGH = (PROBABILITIES.index(p) for p in (0.1, 0.5, 0.9))
_NARROWEST = (
    1e-3  # least distance of an outer quantile from the median: measurements are printed with three digits
)


@dataclass(frozen=True, slots=True)
class Residual:
    """log(measured/predicted) of one run, by constants fitted without its model, and without its source.

    ``model`` is a name inside the source; ``group`` is what the shipped intervals are looked up by.
    """

    source: str
    model: str
    group: tuple[str, ...]
    without_model: float
    without_source: float


@dataclass(frozen=True, slots=True)
class Coverage:
    """Intervals of runs that were left out of the fit.

    Attributes:
        left_out: what was left out at a time, ``model`` or ``source``.
        rows: how many runs.
        held: share of them whose measurement lies inside.
        median_width: of the intervals, relative to the prediction.
        median_error: of the predictions' absolute errors, relative to the measurement.
    """

    left_out: str
    rows: int
    held: float
    median_width: float
    median_error: float

    @property
    def widths_per_error(self) -> float:
        """Median width over median error; 3.8 for a normal distribution of known spread."""
        return self.median_width / self.median_error

    def as_dict(self) -> dict[str, object]:
        """The coverage as JSON fields."""
        return {name: getattr(self, name) for name in self.__slots__} | {
            "widths_per_error": self.widths_per_error
        }


def fit_spreads(residuals: Sequence[Residual]) -> Spreads:
    """The spread of every group, and of a group that was never measured.

    Args:
        residuals: of one quantity, at least one.
    """
    sample = _Sample(residuals)
    everything = np.ones(len(residuals), dtype=bool)
    known, new = sample.stretches(everything)
    wide = sample.quantiles(everything, everything)
    groups = {
        group: sample.spread(everything & (sample.groups == index), everything, wide, known[index])
        for index, group in enumerate(sample.names)
    }
    pooled = _stretched(wide, new)
    return Spreads(sample.described(pooled, everything), dict(sorted(groups.items())))


def left_out(residuals: Sequence[Residual], by: str) -> Coverage:
    """How intervals do that are fitted without one model, or one source, on the runs of that one.

    Args:
        residuals: of one quantity.
        by: ``model`` or ``source``.
    """
    sample = _Sample(residuals)
    folds = sample.models if by == "model" else sample.sources
    errors = sample.without[by]
    low, high = np.zeros(len(residuals)), np.zeros(len(residuals))
    for fold in np.unique(folds):
        kept, out = folds != fold, np.flatnonzero(folds == fold)
        if kept.any():
            known, new = sample.stretches(kept)
            low[out], high[out] = sample.intervals(out, kept, known, new)
    inside = (low <= errors) & (errors <= high)
    return Coverage(
        by,
        len(residuals),
        float(inside.mean()),
        float(np.median(np.exp(high) - np.exp(low))),
        float(np.median(np.abs(np.expm1(-errors)))),
    )


class _Sample:
    """Residuals as arrays."""

    def __init__(self, residuals: Sequence[Residual]) -> None:
        self.residuals = residuals
        self.names = sorted({r.group for r in residuals})
        self.groups = np.array([self.names.index(r.group) for r in residuals])
        self.models = _numbered([(r.source, r.model) for r in residuals])
        self.sources = _numbered([r.source for r in residuals])
        self.without = {
            "model": np.array([r.without_model for r in residuals]),
            "source": np.array([r.without_source for r in residuals]),
        }
        count = Counter(self.models.tolist())
        self.weights = np.array([count[model] ** -0.5 for model in self.models.tolist()])
        self.order = np.argsort(self.without["model"], kind="stable")

    def quantiles(self, mask: Array, kept: Array) -> Array:
        """Weighted quantiles of the rows that are in both masks."""
        chosen = self.order[(mask & kept)[self.order]]
        weight = self.weights[chosen]
        reached = (np.cumsum(weight) - 0.5 * weight) / weight.sum()
        found: Array = np.interp(PROBABILITIES, reached, self.without["model"][chosen])
        return found

    def group_quantiles(self, group: int, kept: Array, wide: Array) -> Array:
        """A group's quantiles, drawn to those of everything."""
        mask = (self.groups == group) & kept
        models = len(np.unique(self.models[mask]))
        own = self.quantiles(mask, kept)
        drawn: Array = (models * own + _POOL_MODELS * wide) / (models + _POOL_MODELS)
        return drawn

    def spread(self, mask: Array, kept: Array, wide: Array, stretch: float) -> Spread:
        """The spread of one group."""
        group = int(self.groups[mask][0])
        return self.described(_stretched(self.group_quantiles(group, kept, wide), stretch), mask)

    def described(self, quantiles: Array, mask: Array) -> Spread:
        """Quantiles with where they come from."""
        models = len(np.unique(self.models[mask]))
        sources = tuple(sorted({r.source for r, inside in zip(self.residuals, mask, strict=True) if inside}))
        return Spread(tuple(float(q) for q in quantiles), int(mask.sum()), models, sources)

    def stretches(self, kept: Array) -> tuple[Array, float]:
        """By how much quantiles have to be stretched: of every group where it was measured, and of those that were not."""
        scores, known = self._scores(kept, "model")
        groups, models = self.groups[kept], self.models[kept]
        pooled = _needed(scores[known] if known.sum() >= _FEWEST else scores)
        measured = np.full(len(self.names), pooled)
        own = [known & (groups == group) for group in range(len(self.names))]
        telling = [
            group
            for group, mine in enumerate(own)
            if mine.sum() >= _FEWEST and len(np.unique(models[mine])) >= _FEWEST_MODELS
        ]
        kinds = np.array([name[-1] for name in self.names])
        for kind in np.unique(kinds):
            alike = known & ~np.isin(groups, telling) & (kinds[groups] == kind)
            if alike.sum() >= _FEWEST:
                measured[kinds == kind] = _needed(scores[alike])
        for group in telling:
            measured[group] = _needed(scores[own[group]])
        scores, known = self._scores(kept, "source")
        new = _needed(scores[~known]) if (~known).sum() >= _FEWEST else pooled
        wide = self.quantiles(kept, kept)
        widths = sorted(
            float(measured[group]) * _width(self.group_quantiles(int(group), kept, wide))
            for group in np.unique(groups)
        )
        return measured, max(new, widths[len(widths) // 2] / max(_width(wide), _NARROWEST))

    def intervals(self, rows: Array, kept: Array, known: Array, new: float) -> tuple[Array, Array]:
        """Ends of the intervals of some rows, from the kept ones."""
        wide = self.quantiles(kept, kept)
        low, high = np.zeros(len(rows)), np.zeros(len(rows))
        for group in np.unique(self.groups[rows]):
            mine = self.groups[rows] == group
            quantiles, is_known = self._of_group(int(group), kept, wide)
            quantiles = _stretched(quantiles, known[group] if is_known else new)
            low[mine], high[mine] = quantiles[_LOW], quantiles[_HIGH]
        return low, high

    def _of_group(self, group: int, kept: Array, wide: Array) -> tuple[Array, bool]:
        if not np.any(kept & (self.groups == group)):
            return wide, False
        return self.group_quantiles(group, kept, wide), True

    def _scores(self, kept: Array, by: str) -> tuple[Array, Array]:
        """How far out each kept row lies when its model (or source) is left out, and whether its group is known then.

        A distance of 1 is an end of the 80 % interval.
        """
        folds = self.models if by == "model" else self.sources
        rows = np.flatnonzero(kept)
        scores, known = np.zeros(len(kept)), np.zeros(len(kept), dtype=bool)
        for fold in np.unique(folds[rows]):
            rest = kept & (folds != fold)
            out = np.flatnonzero(kept & (folds == fold))
            if not rest.any():
                rest = kept
            wide = self.quantiles(rest, rest)
            for group in np.unique(self.groups[out]):
                mine = out[self.groups[out] == group]
                quantiles, known[mine] = self._of_group(int(group), rest, wide)
                scores[mine] = _distance(self.without[by][mine], quantiles)
        return scores[rows], known[rows]


def _numbered(keys: Sequence[object]) -> Array:
    order = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    return np.array([order[key] for key in keys])


def _distance(residuals: Array, quantiles: Array) -> Array:
    """Distance from the median, in distances of the interval's end on that side."""
    away = residuals - quantiles[_MIDDLE]
    above = max(quantiles[_HIGH] - quantiles[_MIDDLE], _NARROWEST)
    below = max(quantiles[_MIDDLE] - quantiles[_LOW], _NARROWEST)
    distance: Array = np.where(away > 0.0, away / above, -away / below)
    return distance


def _width(quantiles: Array) -> float:
    """Distance of the interval's ends, in logarithms."""
    return float(quantiles[_HIGH] - quantiles[_LOW])


def _needed(scores: Array) -> float:
    """The stretch that holds 80 % of the scores, and of the next one: the ⌈0.8 (n + 1)⌉-th smallest."""
    rank = min(int(np.ceil(COVERAGE * (len(scores) + 1))), len(scores))
    return float(np.sort(scores)[rank - 1])


def _stretched(quantiles: Array, factor: float) -> Array:
    middle = quantiles[_MIDDLE]
    stretched: Array = middle + factor * (quantiles - middle)
    least = _NARROWEST * (np.arange(len(quantiles)) - _MIDDLE) / (_HIGH - _MIDDLE)
    outer: Array = np.where(
        least > 0, np.maximum(stretched - middle, least), np.minimum(stretched - middle, least)
    )
    moved: Array = middle + outer
    return moved
