"""Recompute and swaps, where plain branches do not fit: best bounds first, in waves that lower the bar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.costs.arrays import distinct
from planner.ledger import Array
from planner.solve.candidates import Pending
from planner.solve.expansion import Expansion
from planner.solve.ranking import Ranking

__all__ = ["try_leftovers"]

Index = NDArray[np.intp]
_Pairs: TypeAlias = list[
    tuple[Pending, Index, Array]
]  # pending pairs, which of them, and what none of them is faster than

_WAVE = 32


def try_leftovers(pending: Sequence[Pending], ranking: Ranking) -> list[Expansion]:
    """Scores what is left of pairs that were scored plain; returns the expansions that did it.

    Every branch is scored, or counted as excluded or rejected.
    """
    left = [p.expansion.open_pairs(p, ranking.bar) for p in pending]
    pairs = [(p, at, p.floor_s[at]) for p, at in zip(pending, left, strict=True) if len(at)]
    if not pairs:
        return [p.expansion for p in pending]
    levels = pairs[0][0].expansion.branches.levels
    bounds, begin, size = _sorted(pairs), -np.inf, _WAVE
    while begin < np.inf and ranking.bar == np.inf:  # any plan is better than none
        end = float(bounds[size]) if size < len(bounds) else np.inf
        few = _narrow(_between(pairs, begin, end))
        _try(few, levels, ranking)
        begin, size = end, 4 * size
    # Pairs that are late by now are only counted; the others get tables of their own, of no more rows than they need.
    _try(_between(pairs, max(begin, ranking.bar), np.inf), levels, ranking)
    rest = _narrow(_between(pairs, begin, ranking.bar))
    bounds = _sorted(rest)
    begin, size = -np.inf, _WAVE
    while begin < np.inf:
        end = float(bounds[size]) if size < len(bounds) and begin < ranking.bar else np.inf
        for tried in filter(len, (levels[:1], levels[1:])):
            _try(_between(rest, begin, end), tried, ranking)
        begin, size = end, 5 * size
    return [p.expansion for p, *_ in (*pairs, *rest)]


def _try(pairs: _Pairs, levels: Sequence[Sequence[int]], ranking: Ranking) -> None:
    """Tries other branches of some pairs, all at one bar."""
    bar = ranking.bar
    for pending, at, _ in pairs:
        for swaps in levels:
            for batch in pending.expansion.rest(pending, at, swaps, bar):
                ranking.add(batch)
        _ = ranking.bar  # ends a search whose time is over
    ranking.settle()


def _sorted(pairs: _Pairs) -> Array:
    """All bounds."""
    return np.sort(np.concatenate([floor_s for *_, floor_s in pairs] or [np.zeros(0)]))


def _between(pairs: _Pairs, low: float, high: float) -> _Pairs:
    """Pairs whose bound lies in [low, high)."""
    found = []
    for pending, at, floor_s in pairs:
        inside = (floor_s >= low) & (floor_s < high)
        if inside.any():
            found.append((pending, at[inside], floor_s[inside]))
    return found


def _narrow(pairs: _Pairs) -> _Pairs:
    """The same pairs; where an expansion has many more rows than they need, with one of those rows alone."""
    found: _Pairs = []
    for work in {id(pending.expansion): pending.expansion for pending, *_ in pairs}.values():
        mine = [pair for pair in pairs if pair[0].expansion is work]
        rows = distinct(np.concatenate([pending.jobs.rows[at] for pending, at, _ in mine]))
        if len(work) < 2 * len(rows):
            found += mine
            continue
        few = work.narrow(rows)
        for pending, at, floor_s in mine:
            jobs = pending.jobs.take(at)
            jobs = jobs._replace(rows=np.searchsorted(rows, jobs.rows))
            bounds_s, fits = pending.bounds_s[:, :, at], pending.fits[:, :, at]
            alone = Pending(few, jobs, bounds_s, fits, pending.overfull[at], pending.saving_s[at])
            found.append((alone, np.arange(len(at)), floor_s))
    return found
