"""Fits the spread of measurements around predictions, and verifies it on rows that the fit did not see.

A residual is held against how uncertain its prediction was: a floor, which all predictions have, and what its own constants bring
(``planner.uncertainty.constants``), as two independent errors. Quantiles of residuals relative to that are those of normalised
conformal prediction (Lei et al. 2018, arXiv:1604.04173, section 5.2), of every run twice: by constants that were fitted without
its model, and without its source. Software that stays known is only uncertain by its spreads then; software that nothing else
tells of, by the prior of its constants. One set of quantiles serves both, because the scale knows the difference.
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


@dataclass(frozen=True, slots=True)
class Residual:
    """log(measured/predicted) of one run, by constants fitted without its model, and without its source.

    ``model`` is a name inside the source; ``uncertain_…`` is how uncertain that prediction was by what it rests on, ``share`` how
    much it moves with an error of all constants, ``experts`` whether the model is a mixture of them.
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
    both = [_arrays(residuals, by) for by in ("model", "source")]
    experts = np.array([r.experts for r in residuals])
    plain = ~experts if not experts.all() else experts
    floor = _floor([(errors[plain], uncertain[plain]) for errors, uncertain in both])
    more = _of_experts(both, floor, experts)
    scales = [scale(floor, uncertain, more * experts) for _, uncertain in both]
    scores = np.concatenate([errors / each for (errors, _), each in zip(both, scales, strict=True)])
    quantiles = _quantiles(scores)
    return Spreads(
        tuple(float(quantile) for quantile in quantiles),
        floor,
        len(residuals),
        len({(r.source, r.model) for r in residuals}),
        tuple(sorted({r.source for r in residuals})),
        frozenset((r.stack, r.generation) for r in residuals),
        _between(residuals, floor, more, quantiles),
        more,
    )  # fmt: skip


def left_out(residuals: Sequence[Residual], by: str, among: Sequence[bool] | None = None) -> Coverage:
    """How intervals do that are fitted without one model, or one source, on the runs of that one.

    Args:
        residuals: of one quantity.
        by: ``model`` or ``source``.
        among: which of the runs are counted; all, unless given.
    """
    errors, uncertain = _arrays(residuals, by)
    experts = np.array([r.experts for r in residuals])
    folds = np.array([f"{r.source} {r.model}" if by == "model" else r.source for r in residuals])
    low, high = np.zeros(len(residuals)), np.zeros(len(residuals))
    for fold in np.unique(folds):
        out = folds == fold
        kept = [r for r, is_out in zip(residuals, out, strict=True) if not is_out]
        if kept:
            fitted = fit_spreads(kept)
            scales = scale(fitted.floor, uncertain[out], fitted.experts * experts[out])
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


def _floor(both: Sequence[tuple[Array, Array]]) -> float:
    """What predictions are uncertain by beside what they rest on.

    Runs left out with their model rest on constants of their software, those left out with their source often do not: the floor
    is where both lie as far out. Where they are the same, as for memory, it is the likeliest, under Laplace's
    distribution, which bears outliers.
    """

    def apart(floor: float) -> float:
        known, new = (np.quantile(np.abs(e) / np.hypot(floor, u), COVERAGE) for e, u in both)
        return abs(float(np.log(max(known, _TINY) / max(new, _TINY))))

    def unlikely(floor: float) -> float:
        errors, uncertain = (np.concatenate(parts) for parts in zip(*both, strict=True))
        scales = np.hypot(floor, uncertain)
        return float(np.log(np.mean(np.abs(errors) / scales) + _TINY) + np.mean(np.log(scales)))

    return float(min(_FLOORS, key=lambda floor: (apart(floor), unlikely(floor))))


def _of_experts(both: Sequence[tuple[Array, Array]], floor: float, experts: Array) -> float:
    """What mixtures of experts are uncertain by beside that: so that as many of them lie as far out as of other models.

    Their kernels differ by release and by routing, for which no constant stands. 0 where there are none, or no others.
    """
    if experts.all() or not experts.any():
        return 0.0
    errors, uncertain = (np.concatenate(parts) for parts in zip(*both, strict=True))
    mixed = np.concatenate([experts] * len(both))

    def apart(more: float) -> float:
        far = np.abs(errors) / scale(floor, uncertain, more * mixed)
        there, elsewhere = (float(np.quantile(far[which], COVERAGE)) for which in (mixed, ~mixed))
        return abs(float(np.log(max(there, _TINY) / max(elsewhere, _TINY))))

    return float(min((0.0, *_FLOORS), key=apart))


def _between(residuals: Sequence[Residual], floor: float, more: float, quantiles: Array) -> float:
    """How uncertain constants of unknown software are: so that 80 % of the runs are held whose source alone knows their software.

    They are taken as an unknown stack's would be, with their source left out; 0 where there are none.
    """
    knows: dict[tuple[str, str], set[str]] = defaultdict(set)
    for r in residuals:
        knows[r.stack, r.generation].add(r.source)
    alone = [r for r in residuals if len(knows[r.stack, r.generation]) == 1 and r.share > 0.0]
    if not alone:
        return 0.0
    errors, shares = np.array([r.without_source for r in alone]), np.array([r.share for r in alone])
    needed = np.where(
        errors > 0.0, errors / quantiles[_HIGH], errors / quantiles[_LOW]
    )  # the scale that just holds each
    known = floor**2 + np.array([more * r.experts for r in alone]) ** 2
    between = np.sqrt(np.maximum(needed**2 - known, 0.0)) / shares
    return float(np.quantile(between, COVERAGE))


def _quantiles(scores: Array) -> Array:
    """Quantiles that hold for the next score too: ranks of ``n + 1``, rounded away from the median."""
    ordered, n = np.sort(scores), len(scores)
    ranks = np.array([np.floor(p * (n + 1)) if p < 0.5 else np.ceil(p * (n + 1)) for p in PROBABILITIES])
    found: Array = ordered[np.clip(ranks.astype(int) - 1, 0, n - 1)]
    found[PROBABILITIES.index(0.5)] = np.median(ordered)
    return found
