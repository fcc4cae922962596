"""What no strategies undercut, of all devices of a pipeline at once: duals of their linear relaxations.

The blocks of a device that may take the same strategies at the same cost are a *cell*. For every price ``λ ≥ 0`` of a byte,

    Σ_cells n·min_s (cost_s + λ·held_s) − λ·room

bounds the device's cost from below, whichever strategies keep its memory (weak duality), and its largest value over ``λ`` is
what the linear relaxation costs: mixtures on the lower convex hull of (held, cost). It is concave and made of lines in ``λ``, so
that a few tangents find it, for all devices side by side. Rooms are taken with the excess that counts as rounding, which is more
than rounding makes of ``λ·held − λ·room``, however steep the price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.ledger import Array
from planner.solve.layerwise.counts import SLACK

__all__ = ["Cells", "dual_s"]

_TANGENTS = 30  # at most: a handful is enough for most devices, and any price bounds
_PRECISION = 1e-12


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

    @staticmethod
    def joined(several: Sequence[Cells], starts: NDArray[np.intp]) -> Cells:
        """Those of several layouts side by side, whose devices begin at some numbers."""
        device = np.concatenate([cells.device + start for cells, start in zip(several, starts, strict=True)])
        names = ("kind", "number", "flights", "forwards", "backwards")
        return Cells(device, *(np.concatenate([getattr(cells, name) for cells in several]) for name in names))

    def key(self) -> bytes:
        """Equal for cells that are."""
        parts = (self.device, self.kind, self.number, self.flights, self.forwards, self.backwards)
        return b"".join(x.tobytes() for x in parts)

    def take(self, index: NDArray[np.intp]) -> Cells:
        """Some of the cells."""
        parts = (self.device, self.kind, self.number, self.flights, self.forwards, self.backwards)
        return Cells(*(x[index] for x in parts))


def dual_s(cost: Array, held: Array, cells: Cells, room: Array) -> tuple[Array, Array]:
    """What each device costs at least, infinite where nothing keeps its room, and the price of a byte that proves it.

    Two lines bound the dual from above: its tangents at a price where the cheapest strategies exceed the room, and at one where
    they keep it. Where they meet, the next tangent replaces one of them, until it meets both: then it is the largest value.

    Args:
        cost, held: (strategies, cells) seconds and bytes of one block; infinite cost where a strategy is not allowed.
        cells: at least one of every device.
        room: (devices,) bytes.

    >>> one = np.ones((1, 1))
    >>> cells = Cells.of(5.0 * one[None], one, one, one)
    >>> seconds, price = dual_s(np.array([[3.0], [4.0]]), np.array([[10.0], [4.0]]), cells, np.array([35.0]))
    >>> seconds.round(9).tolist(), price.round(9).tolist()  # half of the layers each way; 6 bytes are worth a second
    ([17.5], [0.166666667])
    """
    room = _with_slack(room)
    every = cells.number, room, _starts(cells.device, len(room))
    over_s, over = _cheapest(cost, cost, held, *every)
    smallest = np.where(np.isfinite(cost), held, np.inf)
    kept_s, kept = _cheapest(np.where(smallest == smallest.min(axis=0), cost, np.inf), cost, held, *every)
    fits = np.isfinite(over_s) & (kept <= 0.0)
    best, prices = np.where(fits, over_s, np.inf), np.where(fits, 0.0, np.inf)  # without a price
    tight = np.flatnonzero(fits & (over > 0.0))
    if len(tight):
        place = np.full(len(room), -1)
        place[tight] = np.arange(len(tight))
        mine = np.flatnonzero(place[cells.device] >= 0)
        lines = over_s[tight], over[tight], kept_s[tight], kept[tight]
        best[tight], prices[tight] = _tangents(
            cost[:, mine], held[:, mine], place[cells.device[mine]], cells.number[mine], room[tight], *lines
        )
    return best, prices


def _tangents(
    cost: Array, held: Array, device: NDArray[np.intp], number: Array, room: Array,
    over_s: Array, over: Array, kept_s: Array, kept: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """The dual's largest value of devices that exceed their room at no price and can keep it, and the price that proves it;
    between the lines of the strategies that cost and that hold least."""
    best, prices, met = over_s, np.zeros_like(over_s), np.zeros(len(room), dtype=bool)
    every = number, room, _starts(device, len(room))
    for _ in range(_TANGENTS):
        price = (kept_s - over_s) / (over - kept)
        seconds, beyond = _cheapest(cost + price[device] * held, cost, held, *every)
        value, up = seconds + price * beyond, beyond > 0.0
        better = value > best
        best, prices = np.where(better, value, best), np.where(better, price, prices)
        met |= value >= (over_s + price * over) * (1.0 - _PRECISION)
        if met.all():
            break
        over_s, over = np.where(up, seconds, over_s), np.where(up, beyond, over)
        kept_s, kept = np.where(up, kept_s, seconds), np.where(up, kept, beyond)
    return best, prices


def _cheapest(
    priced: Array, cost: Array, held: Array, number: Array, room: Array, starts: NDArray[np.intp]
) -> tuple[Array, Array]:
    """Cost and bytes beyond the room of the strategies that are cheapest by some prices, per device."""
    taken = priced.argmin(axis=0), np.arange(len(number))
    seconds = np.add.reduceat(number * cost[taken], starts)
    return seconds, np.add.reduceat(number * held[taken], starts) - room


def _starts(device: NDArray[np.intp], devices: int) -> NDArray[np.intp]:
    """The first cell of every device."""
    return np.searchsorted(device, np.arange(devices))


def dual_at(
    cost: Array, held: Array, cells: Cells, room: Array, prices: Array, alike: NDArray[np.intp]
) -> Array:
    """What each device costs at least by some prices of a byte, whichever of them proves most: (devices,).

    Args:
        cost, held: (strategies, columns) seconds and bytes of one block.
        cells: of the devices.
        room: bytes of every device.
        prices: which.
        alike: the column of every cell.

    >>> one = np.ones((1, 1))
    >>> cells = Cells.of(5.0 * one[None], one, one, one)
    >>> cost, held = np.array([[3.0], [4.0]]), np.array([[10.0], [4.0]])
    >>> dual_at(cost, held, cells, 35.0, np.array([0.1, 0.2]), np.array([0])).round(9).tolist()  # 5·(4 + 0.2·4) − 0.2·35
    [17.0]
    """
    least = (cost + prices[:, None, None] * held).min(axis=1)
    starts = _starts(cells.device, int(cells.device[-1]) + 1)
    paid = prices[:, None] * _with_slack(room)
    found: Array = (np.add.reduceat(cells.number * least[:, alike], starts, axis=1) - paid).max(axis=0)
    return found


def _with_slack(room: Array) -> Array:
    """Bytes with the excess that counts as rounding."""
    with_slack: Array = room + SLACK * np.abs(room)
    return with_slack
