"""When every operation of an order runs: the longest path once more, for one candidate and with nothing folded."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from planner.schedule.order import Order
from planner.schedule.program import messages

__all__ = ["operation_times"]

Floats = npt.NDArray[np.float64]


def operation_times(order: Order, seconds: npt.ArrayLike, hop_s: float = 0.0) -> tuple[Floats, Floats]:
    """Start and end of every operation, (p, n) each, as in ``order.kind``.

    Args:
        order: the order.
        seconds: (3, n_virtual) of forward, backward and weight gradient (of a full backward and zero, where it is not split), or
            (3, n_virtual, m) where micro-batches differ.
        hop_s: seconds from a device to the next one.

    >>> from planner.schedule.order import make_order
    >>> start, end = operation_times(make_order("1f1b", 2, 2), [[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]])
    >>> start.tolist(), float(end.max())
    ([[0.0, 1.0, 4.0, 7.0], [1.0, 2.0, 4.0, 5.0]], 9.0)
    >>> long = [[[1.0, 3.0]] * 2, [[2.0, 6.0]] * 2, [[0.0, 0.0]] * 2]  # the second micro-batch takes three times as long
    >>> float(operation_times(make_order("1f1b", 2, 2), long)[1].max())  # 1 + 3, and 3 + 6 + 6 behind it
    19.0
    """
    sender, sent, hop = messages(order)
    each = np.asarray(seconds, dtype=float)
    duration = (
        each[order.kind, order.stage] if each.ndim == 2 else each[order.kind, order.stage, order.micro_batch]
    )
    delay = np.where(hop < order.n_virtual, hop_s, 0.0)
    start, end = np.zeros_like(duration), np.full_like(duration, np.nan)
    p, n = duration.shape
    at, clock = [0] * p, [0.0] * p
    moved = True
    while moved:
        moved = False
        for device in range(p):
            while at[device] < n:
                i = at[device]
                arrival = 0.0
                if sent[device, i] >= 0:
                    arrival = float(end[sender[device, i], sent[device, i]] + delay[device, i])
                    if np.isnan(arrival):
                        break
                start[device, i] = max(clock[device], arrival)
                end[device, i] = clock[device] = start[device, i] + duration[device, i]
                at[device] += 1
                moved = True
    assert not np.isnan(end).any(), "the order deadlocks"
    return start, end
