"""Quantiles of scores that hold for the next one too, and how fast the chance of more falls beyond them."""

from __future__ import annotations

import numpy as np

from planner.ledger import Array
from planner.uncertainty.residuals import PROBABILITIES

__all__ = ["TAILS", "beyond", "chances", "log_unlikely", "quantiles_of", "tail_of"]

TAILS = np.geomspace(8.0, 1.0, 25)
"""Powers that a tail may fall with: from one hardly told from a normal distribution's to one that just has a mean."""

_MEDIAN = PROBABILITIES.index(0.5)
_SURE = 1e-9


def quantiles_of(scores: Array) -> tuple[float, ...]:
    """Quantiles at ``PROBABILITIES``: ranks of ``n + 1``, rounded away from the median."""
    ordered, n = np.sort(scores), len(scores)
    ranks = np.array([np.floor(p * (n + 1)) if p < 0.5 else np.ceil(p * (n + 1)) for p in PROBABILITIES])
    found = ordered[np.clip(ranks.astype(int) - 1, 0, n - 1)]
    found[_MEDIAN] = np.median(ordered)
    return tuple(float(quantile) for quantile in found)


def beyond(scores: Array, quantiles: tuple[float, ...]) -> Array:
    """Distance from the median relative to that of the outermost quantile on the same side."""
    away = scores - quantiles[_MEDIAN]
    ends = np.where(away < 0.0, quantiles[0], quantiles[-1]) - quantiles[_MEDIAN]
    found: Array = np.divide(away, ends, out=np.zeros_like(away), where=ends != 0.0)
    return found


def log_unlikely(scores: Array, quantiles: tuple[float, ...], tail: float) -> float:
    """Negative logarithm of the likelihood of the scores that lie beyond the quantiles, by Pareto's distribution."""
    far = beyond(scores, quantiles)
    far = np.log(far[far > 1.0])
    return float((tail + 1.0) * far.sum() - len(far) * np.log(tail))


def tail_of(scores: Array, quantiles: tuple[float, ...]) -> float:
    """The power with which the chance of more falls beyond the outermost quantiles: the likeliest (Hill 1975)."""
    return float(min(TAILS, key=lambda tail: log_unlikely(scores, quantiles, tail)))


def chances(scores: Array, quantiles: tuple[float, ...], tail: float) -> Array:
    """Of each score, the chance of more: :meth:`~planner.uncertainty.residuals.Spread.probability_above` of arrays."""
    from scipy.special import ndtr, ndtri  # type: ignore[import-untyped]

    inside = ndtr(-np.interp(scores, quantiles, ndtri(PROBABILITIES)))
    far = beyond(scores, quantiles)
    outside = PROBABILITIES[0] * np.maximum(far, 1.0) ** -tail
    found = np.where(far > 1.0, np.where(scores < quantiles[_MEDIAN], 1.0 - outside, outside), inside)
    return np.clip(found, _SURE, 1.0 - _SURE)
