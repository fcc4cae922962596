"""Schedules that are drawn for p micro-batches, and repeated: units whose passes are merged by time, one interval apart.

The end of one unit leaves gaps that the beginning of the next one fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from planner.schedule.order import DeviceOps

__all__ = ["Timed", "merged"]

Timed: TypeAlias = tuple[float, int, int, int]
"""A pass of a unit: (start, operation, stage, micro-batch)."""


def merged(unit: Sequence[Timed], size: int, interval: float, m: int) -> DeviceOps:
    """A device's list over all units of ``size`` micro-batches that ``m`` make, the last one cut short.

    Of passes that start at the same time, backwards go first.

    >>> [x.tolist() for x in merged([(0, 0, 0, 0), (2, 1, 0, 0)], 1, 2, 2)]
    [[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]]
    """
    timed = sorted(
        (start + number * interval, -op, stage, k + number * size)
        for number in range(-(-m // size))
        for start, op, stage, k in unit
        if k + number * size < m
    )
    _, op, stage, micro_batch = np.array(timed).T
    return np.abs(op).astype(np.int64), stage.astype(np.int64), micro_batch.astype(np.int64)
