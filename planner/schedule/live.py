"""Which activations a device holds at once, straight from its order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.schedule.order import ORDERS, Op, Shape, micro_batch_group

__all__ = ["live_vectors"]


def live_vectors(
    schedule: str, p: int, m: int, v: int, device: int, chunks: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Blocks of each kind whose activations are alive at once on a device: the maximal combinations, (combinations, kinds).

    An activation lives from the start of its forward to the end of its last backward operation. A device runs its list
    serially, so the combinations follow from the order alone; dominated ones are left out. The device's peak is the
    largest product of a combination with the kinds' activation bytes.

    Args:
        chunks: (v, kinds) blocks in each of the device's chunks.

    >>> live_vectors("1f1b", 4, 8, 1, 0, np.array([[3.0]]))  # 4 micro-batches of 3 blocks
    array([[12.]])
    """
    generator = ORDERS[schedule]
    kind, stage, _ = generator.device_ops(Shape(p, m, v, micro_batch_group(p, m)), device)
    blocks = chunks[stage // p]
    started = (kind == Op.F)[:, None] * blocks
    ended = (kind == (Op.W if generator.splits_backward else Op.B))[:, None] * blocks
    # During an operation: all forwards started so far, less all backwards ended before it.
    alive = np.cumsum(started, axis=0) - (np.cumsum(ended, axis=0) - ended)
    alive = np.unique(alive[kind == Op.F], axis=0)
    at_least = np.all(alive[:, None, :] >= alive[None, :, :], axis=2)
    return np.ascontiguousarray(alive[at_least.sum(axis=0) == 1])
