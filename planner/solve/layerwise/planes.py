"""What no strategies of some blocks undercut, under several budgets and ranges of the largest transient: planes of the dual.

Weights ``μ`` of the costs and prices ``λ`` of the budgets make a plane: ``n`` blocks of kind ``k`` in a range ``i`` cost at least

    Σ_k n_k·min_s (μ·cost_ks + λ·held_ks) − λ·room_i,    s among the strategies whose transients the range allows,

and the largest plane bounds (weak duality). The planes are those of the linear relaxation at some numbers of blocks, each in the
range that is cheapest so far, until the cheapest one has a plane of its own: there the bound is the relaxation's value.

Budgets are taken with the excess that counts as rounding: what rounding makes of ``λ·held − λ·room`` is smaller than that. A
range that allows no strategy of a kind is closed to its blocks by a plane of its own: sums in which a huge number stood for these
blocks would lose the last digits of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.ledger import Array
from planner.solve.layerwise.counts import SLACK
from planner.solve.layerwise.linear import relaxed

__all__ = ["Planes", "Ranges"]

_ROUNDS = 12  # planes for one number of blocks, at most
_DEARER = (1.0, 16.0, 256.0, 4096.0)  # prices of a byte, in seconds of all blocks per byte of the budget
_LONGEST_S = 1e7  # of a block of which a range allows no strategy


@dataclass(frozen=True, slots=True, eq=False)
class Ranges:
    """The blocks' strategies.

    Attributes:
        cost: (functions, strategies, kinds) of one block; the largest function counts.
        held: (budgets, strategies, kinds).
        transient: (strategies, kinds) bytes of a block at work.
        high: (ranges) the largest transient that a range allows.
        room: (budgets, ranges).
    """

    cost: Array
    held: Array
    transient: Array
    high: Array
    room: Array


class Planes:
    """Planes for some numbers of blocks.

    Attributes:
        least: (planes, ranges, kinds) seconds of one block with its bytes at their prices.
        paid: (planes, ranges) what the budgets are worth.

    Args:
        ranges: the strategies.
        numbers: (samples, kinds) blocks for which the bound is to be tight.
        steep: whether numbers that no strategies fit need a bound: prices that no plan pays.
        prices: of the budgets, that may prove much; those found beside them are added to :attr:`prices`.
        enough_s: a bound that need not be tighter.
    """

    def __init__(
        self, ranges: Ranges, numbers: Array, *, steep: bool, prices: Sequence[Array] = (), enough_s: float = np.inf
    ) -> None:  # fmt: skip
        self.ranges, self.enough_s = ranges, enough_s
        # With strategies in the order of their transients, those that a range allows are the first ones.
        self._order = np.argsort(ranges.transient, axis=0, kind="stable")
        self._kinds = np.arange(ranges.transient.shape[1])
        self._allowed = (ranges.transient <= ranges.high[:, None, None]).sum(axis=1)
        self._room = ranges.room + SLACK * np.abs(ranges.room)
        self.prices: list[Array] = list(prices)
        functions, budgets = len(ranges.cost), len(ranges.held)
        closed = self._allowed == 0
        none = int(closed.any())
        self.least = np.where(closed, _LONGEST_S, 0.0)[None][:none]
        self.paid = np.zeros((none, len(ranges.high)))
        first = [np.zeros(budgets), *prices]
        if steep:
            total_s = float((numbers.max(axis=0) * ranges.cost.max(axis=0).min(axis=0)).sum())
            for budget in range(budgets):
                unit = total_s / max(float(ranges.room[budget].max()), 1.0)
                first += [times * unit * (np.arange(budgets) == budget) for times in _DEARER]
        self._add(np.full(functions, 1.0 / functions), np.array(first))
        for number in numbers:
            self._tighten(number)

    def bound(self, number: Array) -> float:
        """What some blocks cost at least."""
        return float(self.of_ranges(number).min())

    def of_ranges(self, number: Array) -> Array:
        """The same under each range alone, (ranges,)."""
        value: Array = (self.least @ number - self.paid).max(axis=0)
        return value

    # -- details -------------------------------------------------------------------------------------------------------

    def _add(self, weights: Array, prices: Array) -> None:
        """Adds planes: weights of the costs, (planes, budgets) prices."""
        ranges = self.ranges
        priced = np.tensordot(weights, ranges.cost, 1) + np.tensordot(prices, ranges.held, 1)
        least = np.minimum.accumulate(priced[:, self._order, self._kinds], axis=1)
        least = least[:, np.maximum(self._allowed, 1) - 1, self._kinds]
        self.least = np.concatenate([self.least, np.where(self._allowed > 0, least, 0.0)])
        self.paid = np.concatenate([self.paid, prices @ self._room])

    def _tighten(self, number: Array) -> None:
        """Adds the relaxation's plane in the cheapest range, until that range has one."""
        kinds = np.flatnonzero(number)
        done: set[int] = set()
        for _ in range(_ROUNDS):
            each = self.of_ranges(number)
            which = int(np.argmin(each))
            if which in done or each[which] >= self.enough_s:
                return
            done.add(which)
            found = self._relaxed(which, kinds, number[kinds].astype(int).tolist())
            if found is None:
                return
            self._add(found[0], found[1][None])
            self.prices.append(found[1])

    def _relaxed(self, which: int, kinds: Array, sizes: Sequence[int]) -> tuple[Array, Array] | None:
        """The relaxation's weights and prices in one range; None where it allows no strategy of a kind."""
        ranges = self.ranges
        open_ = [self._order[: self._allowed[which, kind], kind] for kind in kinds]
        if not all(len(some) for some in open_):
            return None
        cost, held = (
            [x[:, some, kind] for some, kind in zip(open_, kinds, strict=True)]
            for x in (ranges.cost, ranges.held)
        )
        found = relaxed(sizes, cost, held, np.zeros(len(ranges.cost)), self._room[:, which])
        return found.weights, found.prices
