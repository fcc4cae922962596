"""What no plan of a shape is faster than, by the number of layers on each of its node groups."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from planner.ledger import Array
from planner.solve.layerwise.relaxation import path_factor
from planner.solve.mixed.ground import SCHEDULE, Ground
from planner.solve.mixed.shapes import Shape
from planner.solve.mixed.stretch import LEAVING, TOGETHER

__all__ = ["Bounds"]

_LEVELS = (
    0,
    TOGETHER,
    4 * TOGETHER,
    10**6,
)  # members of a class whose memory is looked at, one level after another


class Bounds:
    """Bounds of one shape, tighter from level to level.

    Attributes:
        shape_s: no plan of the shape is faster; infinite where none is possible.
        shares: (ways, groups) layers on each group.
        shares_s: no plan with these layers is faster.
        final: whether further levels would change nothing.
        level: members of a class whose memory has been looked at; −1 at first.
    """

    def __init__(self, shape: Shape, ground: Ground) -> None:
        self.shape, self.ground = shape, ground
        self.shape_s, self.final, self.level = shape.bound_s, False, -1
        self.shares: NDArray[np.int64] = np.zeros((0, len(shape.order)), dtype=np.int64)
        self.shares_s = np.zeros(0)

    def asked(self) -> int:
        """Members of a class that the next level looks at and that are not priced; 0 where all are."""
        level = next(n for n in _LEVELS if n > self.level)
        shape, ground = self.shape, self.ground
        known = all(ground.groups[g].knows(ground.class_of(shape, g), shape.pp, level) for g in shape.order)
        return 0 if known else level

    def tighten(self) -> None:
        """Goes to the next level."""
        self.level = next(n for n in _LEVELS if n > self.level)
        self.stretches = self.ground.stretches(self.shape, self.level)
        shares = _shares(len(self.ground.stack), len(self.stretches))
        work_s, dearest_s, dearest_work_s = (
            np.stack([getattr(x, name)[n] for x, n in zip(self.stretches, shares.T, strict=True)])
            for name in ("work_s", "dearest_s", "dearest_work_s")
        )
        possible = np.isfinite(work_s).all(axis=0)  # as many layers as groups have stages, at least
        self.shares = shares[possible]
        dearest_s = dearest_s[:, possible].max(axis=0)
        self.shares_s = np.maximum(dearest_s, self._paths_s(work_s[:, possible], dearest_work_s[:, possible]))
        if not len(self.shares):
            self.shape_s, self.final = np.inf, True
            return
        lowest = int(np.argmin(self.shares_s))
        self.shape_s = max(self.shape_s, float(self.shares_s[lowest]))
        self.final = all(
            x.final(n) for x, n in zip(self.stretches, self.shares[lowest].tolist(), strict=True)
        )

    def _paths_s(self, work_s: Array, z: Array) -> Array:
        """The longest path of 1F1B, per way; ``work_s`` is ``W`` of each group's stages and ``z`` of its dearest, (groups, ways).

        Of :mod:`planner.costs.pipeline_bounds`: the path through stage ``j`` takes ``S + Σ_{l>j} T_l + (m − p + j)·T_j`` for
        ``j > p − m``, with ``S`` the work of all stages. Where ``j`` is the dearest of its group, which has ``a`` stages before
        it, the group's stages behind ``j`` work ``W − (j − a + 1)·z`` or more: ``S + W_after + W + (m − p + a − 1)·z``. All of
        them end with the first stage's update; mixed with the path that stays on the first stage, they bound better. Besides,
        that stage takes ``m·z``, after the groups before it have passed on the first micro-batch and before they have the last
        one back; and see
        :func:`~planner.solve.layerwise.relaxation.path_factor`.
        """
        m, p = self.shape.micro_batches, self.shape.pp
        through_s, before_s = work_s.sum(axis=0), np.cumsum(work_s, axis=0) - work_s
        factor = float(path_factor(SCHEDULE, p, np.array([float(m)]))[0])
        longest_s: Array = np.maximum((before_s + m * z).max(axis=0), through_s * factor)
        of_first = self.stretches[0].opening_s[:, self.shares[:, 0]]  # (leaving, ways)
        staying_s = 2.0 * work_s[1:].sum(axis=0)
        if m >= p:
            longest_s = np.maximum(longest_s, of_first[0] + staying_s)
        for i, ahead in enumerate(accumulate(self.shape.stages[:-1], initial=0)):
            if m <= p - ahead:
                continue
            path_s = 2.0 * through_s - before_s[i] + (m - p + ahead - 1.0) * z[i]
            if not i:
                longest_s = np.maximum(longest_s, path_s)
                continue
            for leaving, first_s in zip(LEAVING, of_first, strict=True):
                if m >= p or leaving == 1.0:
                    mixed_s = first_s + leaving * (path_s - work_s[0]) + (1.0 - leaving) * staying_s
                    longest_s = np.maximum(longest_s, mixed_s)
        return longest_s


@lru_cache(maxsize=16)
def _shares(layers: int, groups: int) -> NDArray[np.int64]:
    """Every way to deal a number of layers to some groups, (ways, groups)."""
    grid = np.indices((layers + 1,) * (groups - 1)).reshape(groups - 1, (layers + 1) ** (groups - 1)).T
    last = layers - grid.sum(axis=1)
    kept: NDArray[np.int64] = np.concatenate([grid, last[:, None]], axis=1)[last >= 0]
    return kept
