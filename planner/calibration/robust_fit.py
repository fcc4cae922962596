"""Robust fit of a few positive constants to measured seconds or bytes, with what it gets wrong on what was left out.

``fit`` knows nothing of devices: it takes a function that predicts all rows from named constants. It minimises the soft-L1 loss
of the log error, so that a row counts by its ratio and an outlier only linearly, over the logarithms of the constants within
their bounds. What it says of itself:

- the *left-out error*: every group of rows is predicted by constants that were fitted to other groups. Rows that resemble
  each other (one shape in several libraries, one curve over sizes, the runs of one model) belong in one group, or the error
  is flattering;
- a 95 % *interval* of each constant from the Jacobian, with the errors of a group taken as dependent;
- what it *kept*: there is at most one constant per ``rows_per_constant`` rows, counted over all rows and over those that
  depend on the constant, and none that the rows do not determine. The others keep their prior.

Sources: soft-L1 loss, B. Triggs et al., "Bundle Adjustment: A Modern Synthesis", 2000, as in scipy.optimize.least_squares;
intervals, K.-Y. Liang, S. L. Zeger, "Longitudinal data analysis using generalized linear models", Biometrika 73(1), 1986.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.errors import Problem, SpecError

__all__ = ["Constant", "Errors", "Fit", "Fitted", "Kept", "errors_of", "fit"]

Array: TypeAlias = NDArray[np.float64]
Predict: TypeAlias = Callable[[Mapping[str, float]], Any]

_SCALE = 0.1  # log error from which a row counts linearly: what careful kernel models miss by (10 %)
_DEPENDS = 0.01  # a row depends on a constant that moves its prediction by this fraction ...
_NUDGE = 4.0  # ... when the constant moves by this factor: priors may be far off
_STEP = 1e-4  # relative step of numerical derivatives
_WIDEST = 4.0  # high / low of an interval beyond which the rows do not determine a constant


@dataclass(frozen=True, slots=True)
class Constant:
    """A positive constant between ``low`` and ``high``; ``prior`` is its start, and its value where it is not fitted."""

    name: str
    prior: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted constant: its 95 % interval, how many rows depend on it, and whether it ended at one of its bounds."""

    name: str
    prior: float
    value: float
    low: float
    high: float
    rows: int
    at_bound: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """A constant that keeps its prior, and why."""

    name: str
    prior: float
    reason: str


@dataclass(frozen=True, slots=True)
class Errors:
    """Absolute percentage errors (fractions of the measured value) of ``n`` rows, and their bias (median signed error)."""

    n: int
    median: float
    mean: float
    p90: float
    bias: float


@dataclass(frozen=True, slots=True)
class Fit:
    """The outcome of :func:`fit`.

    Attributes:
        fitted, kept: the constants.
        rows, groups, folds: how many rows and groups of rows there were, and into how many parts the groups were dealt.
        before: errors with all constants at their priors.
        within: errors of the rows that the constants were fitted to.
        left_out: errors of every row by constants that were fitted without its group; None where there is one group.
        predicted: of every row, by the fitted constants.
        left_out_predicted: of every row, by constants fitted without its group (not a number where there are none).
        spread: half the width of the central 80 % of the left-out (else: all) log errors: a prediction's 80 % interval, ±.
    """

    fitted: tuple[Fitted, ...]
    kept: tuple[Kept, ...]
    rows: int
    groups: int
    folds: int
    before: Errors
    within: Errors
    left_out: Errors | None
    predicted: Array
    left_out_predicted: Array
    spread: float

    @property
    def values(self) -> dict[str, float]:
        """Every constant's value, fitted or kept."""
        return {c.name: c.prior for c in self.kept} | {c.name: c.value for c in self.fitted}


def fit(
    predict: Predict,
    measured: Any,
    constants: Sequence[Constant],
    groups: Sequence[Hashable],
    *,
    folds: int = 5,
    rows_per_constant: int = 20,
    weights: Any = None,
) -> Fit:
    """Fits constants to measured values, the most important constants first.

    Args:
        predict: values of constants by name → predictions of all rows, positive, in their order.
        measured: what was measured, per row, positive.
        constants: in the order in which they are given up last to first where rows are too few.
        groups: per row, what it must be left out together with.
        folds: into how many parts groups are dealt for the left-out error.
        rows_per_constant: rows that a constant must rest on.
        weights: per row; a family of many rows may be kept from outvoting a small one. None: all alike.

    Raises:
        SpecError: there are no rows, a value is not positive and finite, or lengths differ.

    >>> x = np.linspace(1.0, 9.0, 60)
    >>> found = fit(lambda c: c["rate"] * x, 3.0 * x, [Constant("rate", 1.0, 0.1, 10.0)], groups=range(60))
    >>> round(found.values["rate"], 6), found.left_out.n
    (3.0, 60)
    """
    rows = _Rows(predict, _checked(measured, constants, groups), _weights(weights, len(groups)))
    keys = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    members = np.array([keys[group] for group in groups])
    free, kept, depends = _selection(rows, constants, rows_per_constant)
    everything = np.arange(members.size)
    while True:
        values = _solve(rows, free, constants, everything)
        intervals = _intervals(rows, free, values, members)
        worst = max(free, key=lambda c: _width(*intervals[c.name]), default=None)
        if worst is None or _width(*intervals[worst.name]) <= _WIDEST:
            break
        free = [c for c in free if c is not worst]
        kept.append(Kept(worst.name, worst.prior, "the rows do not determine it"))
    fitted = tuple(
        Fitted(c.name, c.prior, values[c.name], *intervals[c.name], depends[c.name], _at_bound(values[c.name], c))
        for c in free
    )  # fmt: skip
    parts = min(folds, len(keys))
    left_out = _left_out(rows, free, constants, members, parts)
    predicted = rows.predict(values)
    known = np.isfinite(left_out)
    residuals = np.log((left_out if known.all() else predicted) / rows.measured)
    low, high = np.quantile(residuals, (0.1, 0.9))
    return Fit(
        fitted=fitted,
        kept=tuple(kept),
        rows=rows.measured.size,
        groups=len(keys),
        folds=parts,
        before=errors_of(rows.predict({c.name: c.prior for c in constants}), rows.measured),
        within=errors_of(predicted, rows.measured),
        left_out=errors_of(left_out, rows.measured) if known.all() else None,
        predicted=predicted,
        left_out_predicted=left_out,
        spread=float(high - low) / 2.0,
    )


def errors_of(predicted: Array, measured: Array) -> Errors:
    """Errors of predictions, relative to what was measured.

    >>> errors_of(np.array([1.1, 0.8]), np.array([1.0, 1.0])).mean  # 10 % and 20 %
    0.15
    """
    signed = predicted / measured - 1.0
    size = np.abs(signed)
    return Errors(
        int(size.size), *(round(float(x), 12) for x in (
            np.median(size), size.mean(), np.quantile(size, 0.9), np.median(signed))),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Rows:
    """What is fitted to."""

    function: Predict
    measured: Array
    weights: Array

    def predict(self, values: Mapping[str, float]) -> Array:
        predicted: Array = np.asarray(self.function(values), dtype=np.float64)
        assert predicted.shape == self.measured.shape, "a prediction per row"
        return predicted

    def log_errors(self, values: Mapping[str, float]) -> Array:
        """Log errors, bounded where a prediction is no positive number so that the solver walks away from there."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.log(self.predict(values) / self.measured)
        bounded: Array = np.clip(np.nan_to_num(ratio, nan=50.0, posinf=50.0, neginf=-50.0), -50.0, 50.0)
        return bounded


def _checked(measured: Any, constants: Sequence[Constant], groups: Sequence[Hashable]) -> Array:
    values = np.asarray(measured, dtype=np.float64)
    problems = []
    if values.size == 0:
        problems.append(Problem("measurements", "no rows", "one row or more"))
    elif not (np.isfinite(values) & (values > 0)).all():
        count = int((~(np.isfinite(values) & (values > 0))).sum())
        problems.append(
            Problem("measurements", f"{count} values are not positive numbers", "positive numbers")
        )
    if len(groups) != values.size:
        problems.append(Problem("groups", f"{len(groups)} for {values.size} rows", "one per row"))
    problems += [
        Problem(c.name, f"prior {c.prior:g} outside {c.low:g} to {c.high:g}", "bounds around the prior")
        for c in constants
        if not 0.0 < c.low <= c.prior <= c.high
    ]
    if problems:
        raise SpecError(problems)
    return values


def _weights(weights: Any, rows: int) -> Array:
    """Weights of mean 1."""
    values: Array = np.ones(rows) if weights is None else np.asarray(weights, dtype=np.float64)
    return np.asarray(values / values.mean()) if rows else values


def _selection(
    rows: _Rows, constants: Sequence[Constant], rows_per_constant: int
) -> tuple[list[Constant], list[Kept], dict[str, int]]:
    """Constants that there are rows enough for, those that keep their prior, and how many rows depend on each."""
    priors = {c.name: c.prior for c in constants}
    base = rows.log_errors(priors)
    depends = {
        c.name: int(
            np.any([np.abs(rows.log_errors(priors | {c.name: v}) - base) > _DEPENDS for v in _nudged(c)], axis=0).sum()
        )
        for c in constants
    }  # fmt: skip
    budget = rows.measured.size // rows_per_constant
    free: list[Constant] = []
    kept: list[Kept] = []
    for constant in constants:
        count = depends[constant.name]
        if count == 0:
            reason = "no row depends on it"
        elif count < rows_per_constant:
            reason = f"{count} rows depend on it, fewer than {rows_per_constant}"
        elif len(free) == budget:
            reason = f"{rows.measured.size} rows allow {budget} constants, one per {rows_per_constant}"
        else:
            free.append(constant)
            continue
        kept.append(Kept(constant.name, constant.prior, reason))
    return free, kept, depends


def _nudged(constant: Constant) -> tuple[float, float]:
    """The prior, moved down and up within the bounds."""
    return max(constant.prior / _NUDGE, constant.low), min(constant.prior * _NUDGE, constant.high)


def _solve(
    rows: _Rows, free: Sequence[Constant], constants: Sequence[Constant], chosen: NDArray[np.intp]
) -> dict[str, float]:
    """Values of all constants, the free ones fitted to the chosen rows."""
    from scipy.optimize import least_squares  # type: ignore[import-untyped]

    priors = {c.name: c.prior for c in constants}
    if not free:
        return priors
    root = np.sqrt(rows.weights[chosen])
    low, high = np.log([c.low for c in free]), np.log([c.high for c in free])

    def named(theta: Array) -> dict[str, float]:
        # exp(log(x)) may pass a bound by a rounding error.
        return priors | {
            c.name: float(min(max(np.exp(t), c.low), c.high)) for c, t in zip(free, theta, strict=True)
        }

    def residuals(theta: Array) -> Array:
        return root * rows.log_errors(named(theta))[chosen]

    start = np.clip(np.log([c.prior for c in free]), low + 1e-6 * (high - low), high - 1e-6 * (high - low))
    found = least_squares(
        residuals, start, bounds=(low, high), loss="soft_l1", f_scale=_SCALE, x_scale=0.1, diff_step=_STEP
    )
    return named(found.x)


def _intervals(
    rows: _Rows, free: Sequence[Constant], values: Mapping[str, float], members: NDArray[np.intp]
) -> dict[str, tuple[float, float]]:
    """95 % intervals: sandwich covariance of the weighted log errors, groups as clusters."""
    from scipy.stats import t  # type: ignore[import-untyped]

    if not free:
        return {}
    error = rows.log_errors(values)
    columns = []
    for constant in free:
        up = rows.log_errors({**values, constant.name: values[constant.name] * (1.0 + _STEP)})
        down = rows.log_errors({**values, constant.name: values[constant.name] / (1.0 + _STEP)})
        columns.append((up - down) / (2.0 * np.log1p(_STEP)))
    jacobian = np.stack(columns, axis=1)
    # Soft-L1 as a reweighted square: d(loss)/d(r²) = (1 + (r/scale)²)^(−1/2).
    influence = rows.weights / np.sqrt(1.0 + rows.weights * (error / _SCALE) ** 2)
    bread = np.linalg.pinv((jacobian * influence[:, None]).T @ jacobian)
    count = int(members.max()) + 1
    scores = np.zeros((count, len(free)))
    np.add.at(scores, members, jacobian * (influence * error)[:, None])
    inflation = count / max(count - 1, 1)
    covariance = bread @ (scores.T @ scores) @ bread * inflation
    reach = t.ppf(0.975, max(count - len(free), 1)) * np.sqrt(np.maximum(np.diag(covariance), 0.0))
    lost = ~np.any(np.abs(jacobian) > 1e-9, axis=0)  # nothing depends on it where the fit ended
    found = {}
    for constant, width, gone in zip(free, reach, lost, strict=True):
        factor = np.inf if gone else float(np.exp(min(width, 50.0)))
        found[constant.name] = (values[constant.name] / factor, values[constant.name] * factor)
    return found


def _left_out(
    rows: _Rows,
    free: Sequence[Constant],
    constants: Sequence[Constant],
    members: NDArray[np.intp],
    parts: int,
) -> Array:
    """Every row predicted by constants fitted without its group; groups are dealt by size, the largest first."""
    predicted = np.full(members.size, np.nan)
    if parts < 2:
        return predicted
    sizes = np.bincount(members)
    load = np.zeros(parts)
    part_of = np.zeros(sizes.size, dtype=np.intp)
    for group in np.argsort(-sizes, kind="stable"):
        part_of[group] = load.argmin()
        load[part_of[group]] += sizes[group]
    for part in range(parts):
        out = part_of[members] == part
        values = _solve(rows, free, constants, np.flatnonzero(~out))
        predicted[out] = rows.predict(values)[out]
    return predicted


def _width(low: float, high: float) -> float:
    """How many times its lower end the upper end of an interval is."""
    return high / low if low > 0.0 else np.inf


def _at_bound(value: float, constant: Constant) -> bool:
    return value <= constant.low * 1.001 or value >= constant.high * 0.999
