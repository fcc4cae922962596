"""The best plans so far: scored candidates go through the schedule engine in the order of their bounds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np

from planner.engine import BlockTable
from planner.pipeline import tight_bound
from planner.schedule.order import Generator
from planner.solve.candidates import Batch, Scored

__all__ = ["Ranking"]

_BATCH = 8  # candidates re-priced before the bar is looked at again
_POOR = 1.1  # a list is poor while its last plan takes this much longer than its first
_SLACK = 1.03  # how far above the best plan the bar stays meanwhile


class Ranking:
    """The ``top`` best plans by exact step time, and the scored candidates that may still join them.

    Args:
        top: plans to keep.
        global_batch_size: sequences per step.
        reprice: exact step times of candidates.
    """

    def __init__(
        self, top: int, global_batch_size: int, reprice: Callable[[list[Scored]], list[float]]
    ) -> None:
        self.top, self.global_batch_size, self.reprice = top, global_batch_size, reprice
        self.best: list[tuple[float, Scored]] = []
        self.repriced = 0
        self._open: list[Batch] = []

    @property
    def bar(self) -> float:
        """What a candidate's bound has to beat: the best step time, or a little more while the list is poor.

        A bound that is no better than the best step time cannot be the best plan's. But a list whose last plan is far behind
        still wants company for the best.
        """
        if not self.best:
            return np.inf
        best_s = self.best[0][0]
        return best_s if self._last <= _POOR * best_s else _SLACK * best_s

    def add(self, batch: Batch) -> None:
        """Remembers scored candidates."""
        if len(batch.fitting):
            self._open.append(batch)

    def settle(self) -> None:
        """Re-prices candidates, best bounds first, until no bound beats the best plan and the list is full."""
        if not self._open:
            return
        bounds = np.concatenate([batch.bound_s[batch.fitting] for batch in self._open])
        owner = np.repeat(np.arange(len(self._open)), [len(batch.fitting) for batch in self._open])
        index = np.concatenate([batch.fitting for batch in self._open])
        order = np.argsort(bounds, kind="stable")
        done = 0
        while done < len(order):
            least = bounds[order[done]]
            if least >= self.bar and (len(self.best) >= self.top or least >= self._last):
                break
            some = order[done : done + max(_BATCH, self.top)]
            done += len(some)
            self._price(self._tightened([self._open[owner[i]].scored(int(index[i])) for i in some]))
        left = np.zeros(len(order), dtype=bool)
        left[order[done:]] = True
        left &= bounds < max(self.bar, self._last)
        self._open = [
            batch._replace(fitting=index[left & (owner == number)])
            for number, batch in enumerate(self._open)
            if np.any(left & (owner == number))
        ]

    @property
    def _last(self) -> float:
        """Step time of the last plan of a full list."""
        return self.best[self.top - 1][0] if len(self.best) >= self.top else np.inf

    def _price(self, candidates: list[Scored]) -> None:
        """Exact prices of those that can win, or that the list still has room for."""
        for start in range(0, len(candidates), _BATCH):
            part = [
                scored
                for scored in candidates[start : start + _BATCH]
                if scored.bound_s < self.bar or len(self.best) < self.top
            ]
            if part:
                self.repriced += len(part)
                self.best += zip(self.reprice(part), part, strict=True)
                self.best.sort(key=lambda pair: pair[0])
        del self.best[self.top :]

    def _tightened(self, candidates: list[Scored]) -> list[Scored]:
        """The candidates with the tightest bound known for their schedule, sorted by it."""
        deals: dict[tuple[int, Generator], list[Scored]] = defaultdict(list)
        for scored in candidates:
            deals[id(scored.layout), scored.schedule].append(scored)
        tight: list[Scored] = []
        for (_, schedule), members in deals.items():
            values = np.concatenate([s.table.values for s in members], axis=2)
            table = BlockTable.compact(members[0].table.kinds, values)
            micro_batches = np.array([float(s.micro_batches(self.global_batch_size)) for s in members])
            layers = np.array([np.inf if s.recompute_layers is None else s.recompute_layers for s in members])
            bounds = tight_bound(table, members[0].layout, schedule, micro_batches, layers)
            tight += [
                s._replace(bound_s=max(s.bound_s, float(bound)))
                for s, bound in zip(members, bounds, strict=True)
            ]
        return sorted(tight, key=lambda scored: scored.bound_s)
