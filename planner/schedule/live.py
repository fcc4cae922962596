"""Which activations a device holds at once, straight from its order."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from planner.schedule.order import ORDERS, Op, Shape

__all__ = ["live_vectors"]


@lru_cache(maxsize=16384)
def live_vectors(schedule: str, p: int, m: int, v: int, device: int) -> NDArray[np.float64]:
    """Activations of each chunk alive at once on a device: the maximal combinations, (combinations, v).

    An activation lives from the start of its forward to the end of its last backward operation. A device runs its list
    serially, so the combinations follow from the order alone; dominated ones are left out. The device's peak is the
    largest product of a combination with the chunks' activation bytes.

    >>> live_vectors("1f1b", 4, 8, 1, 0)
    array([[4.]])
    """
    generator = ORDERS[schedule]
    kind, stage, _ = generator.device_ops(Shape(p, m, v, p), device)
    chunk = stage // p
    last = Op.W if generator.splits_backward else Op.B
    ends = np.zeros((len(kind), v))
    ends[np.arange(len(kind)), chunk] = kind == last
    starts = np.zeros((len(kind), v))
    starts[np.arange(len(kind)), chunk] = kind == Op.F
    # During operation i: all forwards started so far, less all backwards ended before it.
    alive = np.cumsum(starts, axis=0) - (np.cumsum(ends, axis=0) - ends)
    alive = np.unique(alive[kind == Op.F], axis=0)
    if v == 1:
        return alive[-1:]
    covered = [bool(np.any(np.all(alive >= one, axis=1) & np.any(alive > one, axis=1))) for one in alive]
    return np.ascontiguousarray(alive[~np.array(covered)])
