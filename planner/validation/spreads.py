"""Fits the spread of measurements around predictions, and verifies it on rows that the fit did not see.

A residual is held against how uncertain its prediction was, as independent errors: a floor, which all predictions have; what its
own constants bring (``planner.uncertainty.constants``); and, where no measured run is near the job, what far ones err by beside
that. Quantiles of residuals relative to it are those of normalised conformal prediction (Lei et al. 2018, arXiv:1604.04173,
section 5.2). A run counts as predicted by constants that were fitted without its model, and again without its source where others
know its software; a held-out run, which no constant saw, once. Runs whose source alone knows their software say how uncertain
unknown software is. What is counted exactly is uncertain by the floor alone, which is then its.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.ledger import Array
from planner.uncertainty.residuals import COVERAGE, PROBABILITIES, Spreads, scale

__all__ = ["Coverage", "Residual", "fit_spreads", "left_out"]

_LOW, _HIGH = (PROBABILITIES.index(p) for p in (0.1, 0.9))
_FLOORS = np.geomspace(1e-3, 0.3, 100)
_TINY = 1e-12
_Z = 1.2816  # deviations of a normal distribution within which 80 % lie
_FEWEST = 5  # residuals that an error of their own is taken from


@dataclass(frozen=True, slots=True)
class Residual:
    """log(measured/predicted) of one run, by constants fitted without its model, and without its source.

    ``model`` is a name inside the source; ``uncertain_…`` is how uncertain that prediction was by what it rests on, ``share`` how
    much it moves with an error of all constants, ``experts`` whether the model is a mixture of them, ``far`` whether no
    measured run is near it, ``held_out`` whether constants were never fitted to it, ``counted`` whether what was measured is
    counted exactly, and uncertain by nothing.
    """

    source: str
    model: str
    stack: str
    generation: str
    without_model: float
    without_source: float
    uncertain_without_model: float = 0.0
    uncertain_without_source: float = 0.0
    share: float = 0.0
    experts: bool = False
    far: bool = False
    held_out: bool = False
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
    """The spreads of one quantity.

    Args:
        residuals: at least one.
    """
    again = [r for r, alone in zip(residuals, _alone(residuals), strict=True) if not (alone or r.held_out)]
    errors, uncertain = (
        np.concatenate(both)
        for both in zip(_arrays(residuals, "model"), _arrays(again, "source"), strict=True)
    )
    experts, far, counted, share = (
        np.array([getattr(r, name) for r in (*residuals, *again)])
        for name in ("experts", "far", "counted", "share")
    )
    near = ~far if not far.all() else far
    if counted.any() and not counted.all():
        floor = _floor_of_counted(errors[counted], errors[~counted], uncertain[~counted])
    else:
        floor = _floor(errors[near], uncertain[near])
    reach = _reach(errors[near], uncertain[near], floor)
    beside = far & (share > 0.0)  # far from what constants were fitted to
    dense, mixed = (
        _beside(errors[k], uncertain[k], floor, reach) for k in (beside & ~experts, beside & experts)
    )
    spreads = Spreads(
        (), floor, len(residuals), len({(r.source, r.model) for r in residuals}), tuple(sorted({r.source for r in residuals})),
        frozenset((r.stack, r.generation) for r in residuals), far=dense or 0.0, experts=mixed or dense or 0.0,
    )  # fmt: skip
    quantiles = _quantiles(errors / _scale(spreads, uncertain, far, experts))
    spreads = spreads._replace(quantiles=tuple(float(quantile) for quantile in quantiles))
    return spreads._replace(between=_between(residuals, spreads))


def left_out(residuals: Sequence[Residual], by: str, among: Sequence[bool] | None = None) -> Coverage:
    """How intervals do that are fitted without one model, or one source, on the runs of that one.

    Args:
        residuals: of one quantity.
        by: ``model`` or ``source``.
        among: which of the runs are counted; all, unless given.
    """
    errors, uncertain = _arrays(residuals, by)
    experts, far, share = (
        np.array([getattr(r, name) for r in residuals]) for name in ("experts", "far", "share")
    )
    unknown = np.array(_alone(residuals)) & (by == "source")
    folds = np.array([f"{r.source} {r.model}" if by == "model" else r.source for r in residuals])
    low, high = np.zeros(len(residuals)), np.zeros(len(residuals))
    for fold in np.unique(folds):
        out = folds == fold
        kept = [r for r, is_out in zip(residuals, out, strict=True) if not is_out]
        if kept:
            fitted = fit_spreads(kept)
            known = np.where(unknown, share * fitted.between, uncertain)
            scales = _scale(fitted, known, far | unknown, experts)[out]
            low[out], high[out] = fitted.quantiles[_LOW] * scales, fitted.quantiles[_HIGH] * scales
    counted = np.ones(len(residuals), dtype=bool) if among is None else np.array(among)
    inside = (low <= errors) & (errors <= high)
    return Coverage(
        by,
        int(counted.sum()),
        float(inside[counted].mean()),
        float(np.median((np.exp(high) - np.exp(low))[counted])),
        float(np.median(np.abs(np.expm1(-errors[counted])))),
    )


def _arrays(residuals: Sequence[Residual], by: str) -> tuple[Array, Array]:
    """Errors without the model, or the source, and how uncertain they were."""
    errors = np.array([getattr(r, f"without_{by}") for r in residuals])
    return errors, np.array([getattr(r, f"uncertain_without_{by}") for r in residuals])


def _scale(spreads: Spreads, uncertain: Array, far: Array, experts: Array) -> Array:
    """What residuals are held against, of each."""
    return scale(spreads.floor, uncertain, np.where(experts, spreads.experts, spreads.far) * far)


def _alone(residuals: Sequence[Residual]) -> list[bool]:
    """Whether no other source that constants are fitted to knows a run's software on its generation of accelerators."""
    knows: dict[tuple[str, str], set[str]] = defaultdict(set)
    for r in residuals:
        if not r.held_out:
            knows[r.stack, r.generation].add(r.source)
    return [not r.held_out and r.share > 0.0 and len(knows[r.stack, r.generation]) == 1 for r in residuals]


def _floor(errors: Array, uncertain: Array) -> float:
    """What predictions are uncertain by beside what they rest on: the likeliest under Laplace's, which bears outliers.

    Where they rest on nothing that is uncertain it is the deviation of a normal distribution that holds as many.
    """
    if not uncertain.any():
        return max(float(np.quantile(np.abs(errors), COVERAGE)) / _Z, _TINY)

    def unlikely(floor: float) -> float:
        scales = scale(floor, uncertain)
        return float(np.log(np.mean(np.abs(errors) / scales) + _TINY) + np.mean(np.log(scales)))

    return float(min(_FLOORS, key=unlikely))


def _floor_of_counted(counted: Array, errors: Array, uncertain: Array) -> float:
    """What is counted exactly errs by that much, and by as much the part of everything else that software does not hold.

    As many errors of what is counted lie as far out as of everything else; of few, none farther.

    Args:
        counted: errors of what is counted.
        errors, uncertain: of everything else.
    """
    found = np.abs(counted)
    needed = float(np.quantile(found, COVERAGE) if len(found) >= _FEWEST else found.max())
    return float(min(_FLOORS, key=lambda floor: abs(floor * _reach(errors, uncertain, floor) - needed)))


def _beside(errors: Array, uncertain: Array, floor: float, reach: float) -> float | None:
    """What some predictions are uncertain by beside that, so that as many of them lie as far out as of the near ones.

    Args:
        errors, uncertain: theirs.
        floor: of all.
        reach: scales within which 80 % of the near ones lie.
    """
    if len(errors) < _FEWEST:
        return None
    needed = (errors / reach) ** 2 - floor**2 - uncertain**2
    return float(np.quantile(np.sqrt(np.maximum(needed, 0.0)), COVERAGE))


def _reach(errors: Array, uncertain: Array, floor: float) -> float:
    """Scales within which 80 % of residuals lie; 1 where there are none."""
    return float(np.quantile(np.abs(errors) / scale(floor, uncertain), COVERAGE)) if len(errors) else 1.0


def _between(residuals: Sequence[Residual], spreads: Spreads) -> float:
    """How uncertain constants of unknown software are: so that 80 % of the runs are held whose source alone knows their software.

    They are taken as an unknown stack's would be, with their source left out; 0 where there are none.
    """
    alone = [r for r, only in zip(residuals, _alone(residuals), strict=True) if only]
    if not alone:
        return 0.0
    errors, shares = np.array([r.without_source for r in alone]), np.array([r.share for r in alone])
    far = np.array([spreads.experts if r.experts else spreads.far for r in alone])
    # The scale that just holds each.
    needed = np.where(errors > 0.0, errors / spreads.quantiles[_HIGH], errors / spreads.quantiles[_LOW])
    between = np.sqrt(np.maximum(needed**2 - spreads.floor**2 - far**2, 0.0)) / shares
    return float(np.quantile(between, COVERAGE))


def _quantiles(scores: Array) -> Array:
    """Quantiles that hold for the next score too: ranks of ``n + 1``, rounded away from the median."""
    ordered, n = np.sort(scores), len(scores)
    ranks = np.array([np.floor(p * (n + 1)) if p < 0.5 else np.ceil(p * (n + 1)) for p in PROBABILITIES])
    found: Array = ordered[np.clip(ranks.astype(int) - 1, 0, n - 1)]
    found[PROBABILITIES.index(0.5)] = np.median(ordered)
    return found
