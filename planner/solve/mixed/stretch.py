"""A stretch of stages on one node group: what any number of layers costs there at least, however they are dealt to its stages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from planner.ledger import Array
from planner.solve.mixed.members import Class, Members

__all__ = ["LEAVING", "TOGETHER", "Stretch"]

LEAVING = (0.0, 0.75, 1.0)
"""Shares of a path that leaves the first stage at once, in mixtures with one that stays there: strategies that update sooner make
the one short and the other long, and a mixture bounds both."""

TOGETHER = 8  # members of a class, the fastest first, that are priced together


class Stretch:
    """Equal stages of one group, side by side in a pipeline.

    Args:
        members: of the group.
        of: their class.
        pp: stages of the whole pipeline.
        flights: micro-batches in flight of each stage.
        ends: kinds of what each stage holds besides layers.
        priced: how many members are priced; the others are taken to have no limits of memory.

    Attributes:
        dearest_s: by number of layers, what the stage that takes longest takes in a step at least.
        work_s: what all stages together work on a micro-batch at least.
        dearest_work_s: what the stage that works most on a micro-batch works at least.
        opening_s: where the pipeline begins here, these stages' part of paths that end with the first one's update, by
            :data:`LEAVING`: of the path that passes them once each at that share, and at what is left of it of the one that, for
            m ≥ p, stays on the first (m − p + 1 micro-batches) and passes the others twice.
    """

    def __init__(
        self,
        members: Members,
        of: Class,
        pp: int,
        flights: Sequence[float],
        ends: Sequence[tuple[int, ...]],
        priced: int,
    ) -> None:
        self.members, self.of, self.pp, self.priced = members, of, pp, priced
        self._known: dict[tuple[float, tuple[int, ...], float, bool], tuple[Array, NDArray[np.bool_]]] = {}
        m = float(of[1])
        cost = [self._least(flight, end, m, update=True) for flight, end in zip(flights, ends, strict=True)]
        work = [
            self._least(flight, end, 1.0, update=False)[0] for flight, end in zip(flights, ends, strict=True)
        ]
        self._final = [final for _, final in cost]
        self.dearest_s, self._dealt = _folded([cost_s for cost_s, _ in cost], np.maximum)
        self.work_s, _ = _folded(work, np.add)
        self.dearest_work_s, _ = _folded(work, np.maximum)
        stays = max(m - pp + 1.0, 1.0)
        self.opening_s = np.stack(
            [
                _folded(
                    [
                        self._least(flights[0], ends[0], stays - share * (stays - 1.0), update=True)[0],
                        *((2.0 - share) * work_s for work_s in work[1:]),
                    ],
                    np.add,
                )[0]
                for share in LEAVING
            ]
        )

    def sizes(self, layers: int) -> list[int]:
        """Layers per stage such that none takes longer than it has to."""
        found = []
        for dealt in reversed(self._dealt):
            found.append(int(dealt[layers]))
            layers -= found[-1]
        return found[::-1]

    def final(self, layers: int) -> bool:
        """Whether more members would leave the bound of a number of layers as it is."""
        return all(final[n] for final, n in zip(self._final, self.sizes(layers), strict=True))

    def _least(
        self, flight: float, ends: tuple[int, ...], passes: float, *, update: bool
    ) -> tuple[Array, NDArray[np.bool_]]:
        """Seconds of a stage for some micro-batches, perhaps with the update, and whether they are final, by number of layers."""
        key = (flight, ends, passes, update)
        if key not in self._known:
            found_s, final = (self._mixed_s if self.members.mixing else self._alike_s)(
                flight, ends, passes, update
            )
            if not ends:  # no device is left without work
                found_s[0] = np.inf
            self._known[key] = found_s, final
        return self._known[key]

    def _alike_s(
        self, flight: float, ends: tuple[int, ...], passes: float, update: bool
    ) -> tuple[Array, NDArray[np.bool_]]:
        """Of stages that are cut as one member."""
        free_s = self.members.free_s(self.of, self.priced) * passes
        bundle = self.members.bundle(self.of, self.pp, self.priced) if self.priced else None
        found_s = np.full(len(free_s), np.inf)
        if bundle is not None:
            found_s = bundle.least(flight, ends, passes, update=update)
        return np.minimum(found_s, free_s), found_s <= free_s

    def _mixed_s(
        self, flight: float, ends: tuple[int, ...], passes: float, update: bool
    ) -> tuple[Array, NDArray[np.bool_]]:
        """Of stages whose layers are cut as any members."""
        final = self.priced >= len(self.members.classes[self.of])
        if not self.priced:
            found_s = self.members.freest_s(self.of) * passes
        else:
            bundle = self.members.mixture(self.of, self.pp, self.priced)
            found_s = np.full(len(self.members.uniform.order) + 1, np.inf if final else 0.0)
            if bundle is not None:
                found_s = bundle.least(flight, ends, passes, update=update)
        return found_s, np.full(len(found_s), final)


@lru_cache(maxsize=16)
def _left(n: int) -> NDArray[np.intp]:
    """Layers that are left of 0, 1, … when as many as the column says are dealt; n where these are too few."""
    left = np.subtract.outer(np.arange(n), np.arange(n))
    return np.where(left < 0, n, left)


def _folded(each: Sequence[Array], join: np.ufunc) -> tuple[Array, list[Array]]:
    """By number of layers, the least that stages come to together; and what the last of them gets, after every stage."""
    total, dealt = each[0], [np.arange(len(each[0]))]
    for stage in each[1:]:
        n = len(total)
        # Row L is what the stages before take with L, L − 1, … layers.
        joined = join(np.append(total, np.inf)[_left(n)], stage[None])
        best = joined.argmin(axis=1)
        total = joined[np.arange(n), best]
        dealt.append(best)
    return total, dealt
