"""How far each term of a step or a peak is off on its own, from the errors of whole runs.

If terms err independently, a run's variance is the sum of its terms' squared shares times their variances. Errors follow
Laplace's distribution with that variance, which bears outliers. First all terms are taken to be equally uncertain; then each may
differ from that, by a factor of about three before it costs much: a term that hardly occurs stays as uncertain as the others.
What the model leaves out starts from what repeats of one run differ by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log, sqrt

import numpy as np

from planner.ledger import Array
from planner.uncertainty.terms import OUTSIDE

__all__ = ["fit_deviations", "fit_terms", "squared_shares"]

_FACTOR = log(3.0)  # standard deviation of a term's deviation around the common one, in logarithms
_FLAT = 1e-3  # gradient of the logarithm of the likelihood at which it is the greatest
_REPEATS = (
    0.02  # runs of one plan in one table: median of BLOOM's chronicles and of Megatron-Bridge's releases
)


def squared_shares(shares: Sequence[Mapping[str, float]], names: Sequence[str]) -> Array:
    """A row per run, a column per term."""
    return np.array([[row.get(name, 0.0) ** 2 for name in names] for row in shares])


def fit_terms(
    shares: Sequence[Mapping[str, float]], errors: Sequence[float], weights: Sequence[float]
) -> dict[str, float]:
    """Standard deviation of the logarithm of every term that occurs.

    Args:
        shares: of each run, its parts relative to the whole, by term.
        errors: of each run, log(measured/predicted).
        weights: of each run; those of one model together are 1.
    """
    names = sorted({name for row in shares for name in row})
    found = fit_deviations(squared_shares(shares, names), np.asarray(errors), np.asarray(weights), names)
    return {name: float(deviation) for name, deviation in zip(names, found, strict=True)}


def fit_deviations(squares: Array, errors: Array, weights: Array, names: Sequence[str]) -> Array:
    """The same of arrays: a deviation for each name.

    Args:
        squares: :func:`squared_shares`.
        errors, weights: of each run.
        names: of the columns.
    """
    from scipy.optimize import minimize, minimize_scalar  # type: ignore[import-untyped]

    outside = np.array([name == OUTSIDE for name in names])
    away, weight = sqrt(2.0) * np.abs(errors), np.asarray(weights, dtype=np.float64)

    def unlikely(logs: Array) -> tuple[float, Array]:
        """Negative logarithm of the likelihood of all deviations, and its gradient."""
        variances = np.exp(2.0 * logs)
        deviation = np.sqrt(squares @ variances)
        slope = weight * (1.0 - away / deviation) / deviation**2
        return float(np.sum(weight * (np.log(deviation) + away / deviation))), (slope @ squares) * variances

    def alike(common: float) -> Array:
        logs: Array = np.where(outside, log(_REPEATS), common)
        return logs

    start = alike(minimize_scalar(lambda common: unlikely(alike(common))[0], bounds=(log(0.01), log(3.0))).x)

    def loss(logs: Array) -> tuple[float, Array]:
        value, gradient = unlikely(logs)
        off = (logs - start) / _FACTOR
        return value + 0.5 * float(np.sum(off**2)), gradient + off / _FACTOR

    found: Array = np.exp(minimize(loss, start, jac=True, method="BFGS", options={"gtol": _FLAT}).x)
    return found
