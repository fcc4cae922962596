"""Which activations a device holds at once, straight from its order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.schedule.order import Generator, Op, Shape, generator_of, micro_batch_group

__all__ = ["live_vectors"]


def live_vectors(
    schedule: Generator | str, p: int, m: int, v: int, device: int, chunks: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Blocks of each kind whose activations are alive at once on a device: the maximal combinations, (combinations, kinds).

    An activation lives from the start of its forward to the end of its backward operation. A device runs its list serially, so
    the combinations follow from the order alone; dominated ones are left out. The device's peak is the largest product of a
    combination with the kinds' activation bytes. Where the schedule splits the backward, there are as many columns again:
    blocks between their backward and the end of their weight gradient.

    Args:
        chunks: (v, kinds) blocks in each of the device's chunks.

    >>> live_vectors("1f1b", 4, 8, 1, 0, np.array([[3.0]]))  # 4 micro-batches of 3 blocks
    array([[12.]])
    """
    generator = generator_of(schedule)
    kind, stage, _ = generator.device_ops(Shape(p, m, v, micro_batch_group(p, m)), device)
    blocks = chunks[np.asarray(stage) // p]
    started, done, wrote = (np.cumsum((kind == op)[:, None] * blocks, axis=0) for op in Op)
    # During an operation: what has started so far, less what ended before it.
    alive = started - (done - (kind == Op.B)[:, None] * blocks)
    if generator.splits_backward:
        waiting = done - (wrote - (kind == Op.W)[:, None] * blocks)
        alive = np.concatenate([alive, waiting - (kind == Op.B)[:, None] * blocks], axis=1)
    else:
        alive = alive[kind == Op.F]
    alive = alive[np.argsort(-alive.sum(axis=1), kind="stable")]
    maximal = []
    while len(alive):  # nothing dominates the largest sum; what it dominates goes with it
        maximal.append(alive[0])
        alive = alive[np.any(alive > alive[0], axis=1)]
    return np.stack(maximal)
