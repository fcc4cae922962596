"""Rows and layouts that were bounded together: what the search may still have to price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.ledger import Array
from planner.pipeline.composer import step_bound
from planner.pipeline.layout import Layout, Layouts
from planner.solve.space import Choice, order_of

if TYPE_CHECKING:
    from planner.solve.expansion import Expansion

__all__ = ["Deal", "Dealing", "Pairs", "sift", "together"]

Index = NDArray[np.intp]


class Dealing:
    """Layouts of one schedule: those of every pipeline degree, side by side.

    Args:
        schedule: the schedule.
        each: pipeline degrees, and the layouts of each.
    """

    def __init__(self, schedule: Choice, each: Mapping[int, Sequence[Layout]]) -> None:
        degrees = sorted(each)
        self.schedule, self.order = schedule, order_of(schedule)
        self.layouts = Layouts([layout for pp in degrees for layout in each[pp]])
        self.layers = self.layouts.stacked("layers").astype(np.int64)
        self._degrees = np.array(degrees)
        self._counts = np.array([len(each[pp]) for pp in degrees])
        self._starts = np.cumsum(self._counts) - self._counts

    def pairs(self, pp: Array) -> tuple[Index, Index]:
        """Every row with every layout of its pipeline degree: places of rows, and of layouts."""
        place = np.minimum(np.searchsorted(self._degrees, pp), len(self._degrees) - 1)
        counts = np.where(self._degrees[place] == pp, self._counts[place], 0)
        rows = np.repeat(np.arange(len(pp)), counts)
        of = np.arange(len(rows)) - (np.cumsum(counts) - counts - self._starts[place])[rows]
        return rows, of


class Deal(NamedTuple):
    """Rows of a prefix with layouts of one schedule: bounds, and candidates of each pair."""

    dealing: Dealing
    prefix: int
    of: Index
    rows: Index
    bound_s: Array
    variants: NDArray[np.int64]
    likely: NDArray[np.bool_]


class Pairs(NamedTuple):
    """Rows of an expansion with layouts of one schedule, and of each pair its bound.

    ``open``: states that may still win, (states, pairs); ``each``: candidates of every state of a pair.
    """

    schedule: Choice
    layouts: Layouts
    of: Index
    rows: Index
    bound_s: Array
    each: NDArray[np.int64]
    open: NDArray[np.bool_]

    def take(self, index: Index) -> Pairs:
        """Some of the pairs."""
        return self._replace(
            of=self.of[index], rows=self.rows[index], bound_s=self.bound_s[index], each=self.each[index],
            open=self.open[:, index],
        )  # fmt: skip

    def candidates(self, lost: NDArray[np.bool_]) -> int:
        """How many candidates some of the pairs, or some of the states of each, stand for."""
        return int(np.sum(self.each * (self.open & lost)))


def together(deals: Sequence[tuple[Deal, Index, Index]], states: NDArray[np.bool_]) -> Pairs:
    """Deals of one dealing, each with its rows' places in an expansion, and which of its own these are.

    Args:
        deals: not empty.
        states: the expansion's active states, (states, rows).
    """
    of = np.concatenate([deal.of[at] for deal, _, at in deals])
    rows = np.concatenate([where for _, where, _ in deals])
    bound_s = np.concatenate([deal.bound_s[at] for deal, _, at in deals])
    open_ = states[:, rows]
    each = np.concatenate([deal.variants[at] for deal, _, at in deals]) // np.maximum(open_.sum(axis=0), 1)
    dealing = deals[0][0].dealing
    return Pairs(dealing.schedule, dealing.layouts, of, rows, bound_s, each, open_)


def sift(work: Expansion, parts: Sequence[Pairs], bar: float) -> tuple[list[Pairs], int]:
    """Bounds every state of every pair by its times alone: what is under the bar, and how many candidates are not.

    A schedule that edits the ledger may save what its state adds: its pairs are left as they are.
    """
    edited = [part for part in parts if part.schedule.technique is None or part.schedule.technique.edits]
    plain = [part for part in parts if not any(part is other for other in edited)]
    bounds_s = [np.full(part.open.shape, np.inf) for part in plain]
    for state in range(len(work.states)):
        times = work.columns.times(state)
        if work.branches.any_saves:  # updates may hide
            times["main_step_s"][:] = 0.0
        for part, bound_s in zip(plain, bounds_s, strict=True):
            at = np.flatnonzero(part.open[state])
            rows, layout, order = part.rows[at], part.layouts.deal(part.of[at]), order_of(part.schedule)
            bound_s[state, at] = step_bound(
                times.take(rows), layout, work.micro_batches[rows], schedule=order
            )
    left, lost = edited, 0
    for part, bound_s in zip(plain, bounds_s, strict=True):
        lost += part.candidates(bound_s >= bar)
        part = part._replace(open=part.open & (bound_s < bar), bound_s=bound_s.min(axis=0))
        left.append(part.take(np.flatnonzero(part.open.any(axis=0))))
    return [part for part in left if len(part.rows)], lost
