"""How far predictions of serving are off where something is new to the constants: fitted, and verified on sources left out.

A run of a new source is wrong in two independent ways: as runs of models left out are, whose source the constants know, and by
what sets sources apart (engines' releases, how a benchmark drove them, the machine). A new engine and a new device are more of
the latter: what is left out for these is all runs of an engine, or of a generation of devices together with what was measured of
its kernels. The first is the half-width that holds 80 %
of the runs of models left out, by quantity and kind of run. The second is what must be added to it, as independent errors add,
so that 80 % of the runs of sources left out are held: sources count alike, however many runs each has, since the next run comes
from another source (hierarchical conformal prediction, Lee, Barber and Willett 2023, arXiv:2306.06342; its weight for the source
to come, which makes 80 % a bound from below, is left out: with seven sources it holds 87 to 89 % of those left out, at twice the
width and more).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.ledger import Array
from planner.uncertainty.residuals import COVERAGE
from planner.uncertainty.serving import NOVELTIES

__all__ = ["ServingResidual", "fit_serving_spreads", "held_of_sources"]


@dataclass(frozen=True, slots=True)
class ServingResidual:
    """log(measured/predicted) of one run, by constants fitted without its model, and without its source.

    Attributes:
        quantity: a key of :func:`~planner.uncertainty.serving.serving_interval`.
        kind: of runs whose errors are alike (:func:`~planner.uncertainty.serving.kind_of`).
        source: who measured it.
        without_model: not a number where its model is alone on its engine.
        without_source: not a number where there is no prediction.
        without_engine, without_device: the same by constants fitted without its engine, and without its generation of devices, as
            if no kernel had been measured on it.
    """

    quantity: str
    kind: str
    source: str
    without_model: float
    without_source: float
    without_engine: float = np.nan
    without_device: float = np.nan


def fit_serving_spreads(residuals: Sequence[ServingResidual]) -> dict[str, dict[str, Any]]:
    """By quantity: ``between`` sources by what is new, ``within`` them by kind, logarithms; and rows and sources behind them."""
    found = {}
    for quantity in dict.fromkeys(r.quantity for r in residuals):
        own = [r for r in residuals if r.quantity == quantity]
        within = _within(own)
        told = [r for r in own if np.isfinite(r.without_source) and r.kind in within]
        # What is more than new is no nearer.
        wider = np.maximum.accumulate([_between(told, within, f"without_{novelty}") for novelty in NOVELTIES])
        found[quantity] = {
            "between": dict(zip(NOVELTIES, wider.tolist(), strict=True)),
            "within": within,
            "rows": len(told),
            "sources": len({r.source for r in told}),
        }
    return found


def held_of_sources(residuals: Sequence[ServingResidual]) -> dict[str, dict[str, float]]:
    """By quantity: ``held``, the share of a source's runs inside intervals that were fitted without any run of it, mean over
    sources; ``half_width``, the median of those intervals' half-widths, a logarithm; ``sources``."""
    shares: dict[str, list[float]] = defaultdict(list)
    widths: dict[str, list[float]] = defaultdict(list)
    for source in dict.fromkeys(r.source for r in residuals):
        fitted = fit_serving_spreads([r for r in residuals if r.source != source])
        own = [r for r in residuals if r.source == source and np.isfinite(r.without_source)]
        for quantity, spread in fitted.items():
            rows = [r for r in own if r.quantity == quantity and r.kind in spread["within"]]
            if rows:
                half = np.hypot([spread["within"][r.kind] for r in rows], spread["between"][NOVELTIES[0]])
                shares[quantity].append(float(np.mean(_size(rows, "without_source") <= half)))
                widths[quantity] += half.tolist()
    return {
        quantity: {
            "held": float(np.mean(each)),
            "half_width": float(np.median(widths[quantity])),
            "sources": len(each),
        }
        for quantity, each in shares.items()
    }


def _within(residuals: Sequence[ServingResidual]) -> dict[str, float]:
    errors: dict[str, list[float]] = defaultdict(list)
    for r in residuals:
        if np.isfinite(r.without_model):
            errors[r.kind].append(abs(r.without_model))
    return {kind: float(np.quantile(each, COVERAGE)) for kind, each in errors.items()}


def _between(residuals: Sequence[ServingResidual], within: dict[str, float], error: str) -> float:
    """What just holds 80 % of the runs beside the spread within sources, every source counted once; 0 where nothing is told."""
    told = [r for r in residuals if np.isfinite(getattr(r, error))]
    if not told:
        return 0.0
    known = np.array([within[r.kind] for r in told])
    needed = np.sqrt(np.maximum(_size(told, error) ** 2 - known**2, 0.0))
    rows = Counter(r.source for r in told)
    weights = np.array([1.0 / rows[r.source] for r in told])
    order = np.argsort(needed)
    reached = np.cumsum(weights[order]) >= COVERAGE * len(rows) - 1e-9
    return float(needed[order][np.argmax(reached)])


def _size(residuals: Sequence[ServingResidual], error: str) -> Array:
    return np.abs([getattr(r, error) for r in residuals])
