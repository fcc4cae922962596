"""What no strategies undercut, of all devices of a pipeline at once: duals of their linear relaxations.

The blocks of a device that may take the same strategies at the same cost are a *cell*. For every price ``λ ≥ 0`` of a byte,

    Σ_cells n·min_s (cost_s + λ·held_s) − λ·room

bounds the device's cost from below, whichever strategies keep its memory (weak duality), and its largest value over ``λ`` is
what the linear relaxation costs: mixtures on the lower convex hull of (held, cost). It is concave and made of lines in ``λ``, so
that a few tangents find it, for all devices side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.ledger import Array
from planner.solve.layerwise.counts import SLACK

__all__ = ["Cells", "dual_s", "duals"]

_TANGENTS = 30  # at most: a handful is enough for most devices, and any price bounds
_PRECISION = 1e-12

# Prices of a byte of a slower tier: first in seconds of a device per byte of its capacity, up to what no plan pays; then between
# the neighbours of the best.
_GRID = np.array([0.0, 0.01, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 4.0, 64.0])
_BETWEEN = np.array([0.2, 0.4, 0.5, 0.6, 0.8])
_CLOSER = 3


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Blocks that are alike; those of a device stand together, devices in order.

    Attributes:
        device, kind: where they are, and of which kind.
        number: how many.
        flights: micro-batches in flight of each.
        forwards, backwards: how often the path whose cost is bounded passes them.
    """

    device: NDArray[np.intp]
    kind: NDArray[np.intp]
    number: Array
    flights: Array
    forwards: Array
    backwards: Array

    @staticmethod
    def of(chunks: Array, flights: Array, forwards: Array, backwards: Array) -> Cells:
        """Cells of a layout.

        Args:
            chunks: (chunks, devices, kinds) blocks.
            flights, forwards, backwards: (chunks, devices) each.
        """
        chunk, device, kind = np.nonzero(chunks)
        parts = (x[chunk, device] for x in (flights, forwards, backwards))
        keys = np.stack([device, kind, *parts])
        order = np.lexsort(keys[::-1])
        keys, number = keys[:, order], chunks[chunk, device, kind][order]
        starts = np.flatnonzero(np.concatenate([[True], np.any(keys[:, 1:] != keys[:, :-1], axis=0)]))
        one = keys[:, starts]
        return Cells(
            one[0].astype(np.intp), one[1].astype(np.intp), np.add.reduceat(number, starts), one[2], one[3], one[4]
        )  # fmt: skip


def dual_s(cost: Array, held: Array, cells: Cells, room: Array) -> Array:
    """What each device costs at least, infinite where nothing keeps its room: (devices,).

    Args:
        cost, held: (strategies, cells) seconds and bytes of one block; infinite cost where a strategy is not allowed.
        cells: at least one of every device.
        room: (devices,) bytes.

    >>> one = np.ones((1, 1))
    >>> cells = Cells.of(5.0 * one[None], one, one, one)
    >>> dual_s(np.array([[3.0], [4.0]]), np.array([[10.0], [4.0]]), cells, np.array([35.0])).tolist()  # 2.5 of each
    [17.5]
    """
    return _dual(cost, held, cells, room)[0]


def duals(cost: Array, held: Array, cells: Cells, room: Array) -> tuple[Array, Array]:
    """The same under several budgets, the first of which is the device's own: what each device costs at least, and the prices
    that prove it, (devices,) and (budgets, devices).

    Any prices of the other budgets bound. They are looked for one budget after the other: on a grid in units of a device's
    seconds per byte of the budget, then beside the best of it, where a concave function is largest.

    Args:
        cost: as above.
        held: (budgets, strategies, cells).
        room: (budgets, devices).
    """
    least, own = _dual(cost, held[0], cells, room[0])
    prices = np.zeros_like(room)
    prices[0] = own
    for budget in range(1, len(room)):
        base = cost + (prices[1:, cells.device][:, None] * held[1:]).sum(axis=0)
        paid = (prices[1:] * room[1:]).sum(axis=0)
        unit = np.where(np.isfinite(least), least, 0.0) / np.maximum(room[budget], 1.0)
        grid = _GRID[:, None] * unit
        for _ in range(_CLOSER):
            tried, of_device = _along(base, held[[0, budget]], cells, room[[0, budget]], grid)
            value = tried - paid
            at, every = value.argmax(axis=0), np.arange(value.shape[1])
            better = value[at, every] > least
            least = np.where(better, value[at, every], least)
            prices[budget] = np.where(better, grid[at, every], prices[budget])
            prices[0] = np.where(better, of_device[at, every], prices[0])
            low, high = grid[np.maximum(at - 1, 0), every], grid[np.minimum(at + 1, len(grid) - 1), every]
            grid = low + (high - low) * _BETWEEN[:, None]
    return least, prices


# -- details ---------------------------------------------------------------------------------------------------------


def _along(cost: Array, held: Array, cells: Cells, room: Array, grid: Array) -> tuple[Array, Array]:
    """The dual under a budget for each of some prices of another one, and what the budget's own bytes cost: (prices, devices)."""
    many, devices = grid.shape
    every = replace(
        cells,
        device=(cells.device + devices * np.arange(many)[:, None]).ravel(),
        number=np.tile(cells.number, many),
    )
    costs = cost[:, None] + grid[:, cells.device] * held[1][:, None]
    value, price = _dual(costs.reshape(len(cost), -1), np.tile(held[0], many), every, np.tile(room[0], many))
    return value.reshape(many, devices) - grid * room[1], price.reshape(many, devices)


def _dual(cost: Array, held: Array, cells: Cells, room: Array) -> tuple[Array, Array]:
    """The largest value of each device's dual, and the price at which it is reached.

    Two lines bound the dual from above: its tangents at a price where the cheapest strategies exceed the room, and at one where
    they keep it. Where they meet, the next tangent replaces one of them, until it meets both: then it is the largest value.
    """
    starts = np.searchsorted(cells.device, np.arange(len(room)))
    place = np.arange(cost.shape[1])

    def at(priced: Array) -> tuple[Array, Array]:
        """Cost and bytes beyond the room of the strategies that are cheapest by some prices, per device."""
        taken = priced.argmin(axis=0), place
        seconds = np.add.reduceat(cells.number * cost[taken], starts)
        return seconds, np.add.reduceat(cells.number * held[taken], starts) - room

    over_s, over = at(cost)
    smallest = np.where(np.isfinite(cost), held, np.inf)
    kept_s, kept = at(np.where(smallest == smallest.min(axis=0), cost, np.inf))
    fits = np.isfinite(over_s) & (kept <= SLACK * np.abs(room))
    over_s, kept_s = np.where(fits, over_s, 0.0), np.where(fits, kept_s, 0.0)
    best, best_price = over_s.copy(), np.zeros_like(over_s)  # without a price
    open_ = fits & (over > 0.0)
    for _ in range(_TANGENTS):
        if not open_.any():
            break
        price = np.where(open_, (kept_s - over_s) / np.where(open_, over - kept, 1.0), 0.0)
        seconds, beyond = at(cost + price[cells.device] * held)
        value = seconds + price * beyond
        better = open_ & (value > best)
        best, best_price = np.where(better, value, best), np.where(better, price, best_price)
        open_ &= value < (over_s + price * over) * (1.0 - _PRECISION)
        up, down = open_ & (beyond > 0.0), open_ & (beyond <= 0.0)
        over_s, over = np.where(up, seconds, over_s), np.where(up, beyond, over)
        kept_s, kept = np.where(down, seconds, kept_s), np.where(down, beyond, kept)
    return np.where(fits, best, np.inf), best_price
