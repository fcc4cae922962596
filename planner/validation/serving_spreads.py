"""How far predictions of serving are off where something is new to the constants: fitted, and verified on sources left out.

A run of a new source is wrong in two independent ways: as runs of models left out are, whose source the constants know, and by
what sets sources apart (engines' releases, how a benchmark drove them, the machine). A new engine and a new device are more of
the latter, and so are requests that do not wait for answers: constants are fitted to clients that do, for the most part. The
first is the half-width that holds 80 % of the runs of models left out, by quantity and kind of run. The second is what must be
added to it, as independent errors add, so that 80 % of the runs of sources that no constant knows are held: those that are left
out of the fit, and held-out ones, which alone say what a new engine or device does, and to which nothing but widths is fitted.
Sources count alike, however many runs each has, since the next run comes from another source (hierarchical conformal
prediction, Lee, Barber and Willett 2023, arXiv:2306.06342; its weight for the source to come, which makes 80 % a bound from
below, is left out).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.ledger import Array
from planner.uncertainty.residuals import COVERAGE
from planner.uncertainty.serving import LOADS, NOVELTIES

__all__ = ["ServingResidual", "fit_serving_spreads", "held_of_sources"]


@dataclass(frozen=True, slots=True)
class ServingResidual:
    """log(measured/predicted) of one run, by constants fitted without its model, and without its source.

    Attributes:
        quantity: a key of :func:`~planner.uncertainty.serving.serving_interval`.
        kind: of runs whose errors are alike (:func:`~planner.uncertainty.serving.kind_of`).
        source: who measured it.
        without_model: not a number where its model is alone on its engine, and of held-out runs.
        without_source: not a number where there is no prediction.
        load: how its requests came, of :data:`~planner.uncertainty.serving.LOADS`.
        novelty: what of it is new to constants without its source.
        held_out: no constant was ever fitted to it.
    """

    quantity: str
    kind: str
    source: str
    without_model: float
    without_source: float
    load: str = LOADS[0]
    novelty: str = NOVELTIES[0]
    held_out: bool = False


def fit_serving_spreads(residuals: Sequence[ServingResidual]) -> dict[str, dict[str, Any]]:
    """By quantity: ``between`` sources by load and what is new, ``within`` them by kind; and rows and sources behind them."""
    found = {}
    for quantity in dict.fromkeys(r.quantity for r in residuals):
        own = [r for r in residuals if r.quantity == quantity]
        within = _within(own)
        told = [r for r in own if np.isfinite(r.without_source) and r.kind in within]
        needed = np.array(
            [
                [
                    _between([r for r in told if (r.load, r.novelty) == (load, new)], within)
                    for new in NOVELTIES
                ]
                for load in LOADS
            ]
        )
        # What is more than new is no nearer, and what comes whenever it does is no better known.
        wider = np.maximum.accumulate(np.maximum.accumulate(needed, axis=1), axis=0)
        found[quantity] = {
            "between": {
                load: dict(zip(NOVELTIES, row.tolist(), strict=True))
                for load, row in zip(LOADS, wider, strict=True)
            },
            "within": within,
            "rows": len(told),
            "sources": len({r.source for r in told}),
        }
    return found


def held_of_sources(residuals: Sequence[ServingResidual]) -> dict[str, dict[str, dict[str, float]]]:
    """Whether intervals hold runs of sources that they were fitted without, by quantity, of ``published`` and ``held out`` runs.

    Returns:
        ``held``, the share of a source's runs inside, mean over sources, and ``held_rows``, that of all runs; ``half_width``, the
        median of those intervals' half-widths, a logarithm; ``sources``.
    """
    inside: dict[tuple[str, str], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    widths: dict[tuple[str, str], list[float]] = defaultdict(list)
    for source in dict.fromkeys(r.source for r in residuals):
        fitted = fit_serving_spreads([r for r in residuals if r.source != source])
        for r in residuals:
            spread = fitted.get(r.quantity)
            if r.source != source or spread is None or r.kind not in spread["within"]:
                continue
            if np.isfinite(r.without_source):
                half = np.hypot(spread["within"][r.kind], spread["between"][r.load][r.novelty])
                which = r.quantity, "held out" if r.held_out else "published"
                inside[which][source].append(bool(abs(r.without_source) <= half))
                widths[which].append(float(half))
    found: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (quantity, name), by_source in inside.items():
        found[quantity][name] = {
            "held": float(np.mean([np.mean(each) for each in by_source.values()])),
            "held_rows": float(np.mean(np.concatenate([*by_source.values()]))),
            "half_width": float(np.median(widths[quantity, name])),
            "sources": len(by_source),
        }
    return dict(found)


def _within(residuals: Sequence[ServingResidual]) -> dict[str, float]:
    errors: dict[str, list[float]] = defaultdict(list)
    for r in residuals:
        if np.isfinite(r.without_model):
            errors[r.kind].append(abs(r.without_model))
    return {kind: float(np.quantile(each, COVERAGE)) for kind, each in errors.items()}


def _between(told: Sequence[ServingResidual], within: dict[str, float]) -> float:
    """What just holds 80 % of the runs beside the spread within sources, every source counted once; 0 where nothing is told."""
    if not told:
        return 0.0
    known: Array = np.array([within[r.kind] for r in told])
    needed = np.sqrt(np.maximum(np.square([r.without_source for r in told]) - known**2, 0.0))
    rows = Counter(r.source for r in told)
    weights = np.array([1.0 / rows[r.source] for r in told])
    order = np.argsort(needed)
    reached = np.cumsum(weights[order]) >= COVERAGE * len(rows) - 1e-9
    return float(needed[order][np.argmax(reached)])
