"""Stages of a pipeline: the smallest largest cost of contiguous parts of a chain of layers, exactly.

A stage may cost anything that does not shrink when a layer joins it, and each stage has a cost of its own (what it has in
flight, what stands before or behind its layers, which devices it runs on). For a limit ``z``, it is best that every stage in
turn takes as many layers as ``z`` allows: whatever another partition reaches within ``z``, this one reaches too, and a later
start makes no stage dearer. So a bisection over ``z`` finds the smallest one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from planner.ledger import Array

__all__ = ["Line", "cut", "cuts_within", "least_sum", "line_cost", "smallest_limit"]

Reach: TypeAlias = Callable[
    [int, int, float], int
]  # (stage, first layer, limit) -> end of the furthest layers within it

_PRECISION = 1e-7  # relative, of the bisection


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A lower bound of a stage's cost by its layers ``[a, b)``: ``min_j max_k (offset_jk + sums_jk[b] − sums_jk[a])``.

    ``sums`` (cases, lines, layers + 1) grow from left to right; ``offset`` (cases, lines).
    """

    offset: Array
    sums: Array

    def cost(self, a: int, b: int) -> float:
        """The bound of some layers."""
        return float((self.offset + self.sums[..., b] - self.sums[..., a]).max(axis=1).min())

    def reach(self, a: int, limit: float) -> int:
        """The furthest end of layers that begin at ``a`` and cost no more than a limit; ``a`` − 1 where not even none do."""
        room = limit - self.offset + self.sums[..., a]
        within = (self.sums[..., a:] <= room[..., None]).all(axis=1)
        return a + int(within.sum(axis=1).max()) - 1

    def ends(self, limit: float) -> list[int]:
        """For every first layer, the furthest end within a limit."""
        return [self.reach(a, limit) for a in range(self.sums.shape[-1])]


def least_sum(lines: Sequence[Line], ends: Sequence[Sequence[int]], weights: Array | None = None) -> float:
    """The least that contiguous stages take together, each at its weight; infinite where none keep their ends.

    Args:
        lines: of the stages.
        ends: of every stage and first layer, the furthest end that is allowed.
        weights: of the stages, 1 each where they are left out.

    >>> slow, fast = (Line(np.zeros((1, 1)), x * np.arange(6.0)[None, None]) for x in (2.0, 1.0))
    >>> least_sum([slow, fast], [[5] * 6, [min(a + 3, 5) for a in range(6)]])  # at most three layers on the fast one
    7.0
    """
    layers = lines[0].sums.shape[-1] - 1
    least = np.full(layers + 1, np.inf)
    least[0] = 0.0
    for line, furthest, weight in zip(
        lines, ends, np.ones(len(lines)) if weights is None else weights, strict=True
    ):
        following = np.full(layers + 1, np.inf)
        for a in np.flatnonzero(np.isfinite(least)).tolist():
            to = slice(a, furthest[a] + 1)
            if furthest[a] >= a:
                cost = (
                    (line.offset[..., None] + line.sums[..., to] - line.sums[..., a, None])
                    .max(axis=1)
                    .min(axis=0)
                )
                np.minimum(following[to], least[a] + weight * cost, out=following[to])
        least = following
    return float(least[layers])


def line_cost(lines: Sequence[Line]) -> Reach:
    """The reach of stages whose costs are lines."""
    return lambda stage, a, limit: lines[stage].reach(a, limit)


def cuts_within(reach: Reach, stages: int, layers: int, limit: float) -> list[int] | None:
    """Ends of the stages if every one takes as many layers as a limit allows; None where layers are left over."""
    ends: list[int] = []
    at = 0
    for stage in range(stages):
        at = min(reach(stage, at, limit), layers)
        if at < (ends[-1] if ends else 0):
            return None
        ends.append(at)
    return ends if at == layers else None


def smallest_limit(
    reach: Reach, stages: int, layers: int, low: float, high: float, precision: float = _PRECISION
) -> tuple[float, float] | None:
    """(below, limit): no partition keeps ``below``, one keeps ``limit``, and they are as close as ``precision`` (relative).

    None where none keeps ``high``.

    >>> ones = Line(np.zeros((1, 1)), np.arange(6.0)[None, None])  # five layers of cost 1
    >>> below, limit = smallest_limit(line_cost([ones, ones]), 2, 5, 0.0, 10.0)
    >>> round(limit, 6), cut(line_cost([ones, ones]), 2, 5, limit)
    (3.0, [3, 2])
    """
    if cuts_within(reach, stages, layers, high) is None:
        return None
    while high - low > precision * high:
        middle = (low + high) / 2.0
        if cuts_within(reach, stages, layers, middle) is None:
            low = middle
        else:
            high = middle
    return low, high


def cut(reach: Reach, stages: int, layers: int, limit: float) -> list[int]:
    """Layers per stage of the partition that takes as much as a limit allows from the left."""
    ends = cuts_within(reach, stages, layers, limit)
    assert ends is not None
    return [int(n) for n in np.diff([0, *ends])]
