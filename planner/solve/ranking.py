"""The best plans so far: scored candidates go through the schedule engine in the order of their bounds, as far as they matter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np

from planner.costs.arrays import distinct
from planner.engine.block_table import BlockTable
from planner.pipeline.composer import tight_bound
from planner.schedule.order import Generator
from planner.solve.candidates import Batch, Scored

__all__ = ["Ranking"]

_BATCH = 8  # candidates that are looked at before the bar is asked for again
_POOR = 1.1  # a list is poor while its last plan takes this much longer than its first
_SLACK = 1.03  # how far above the best plan the bar stays meanwhile


class Ranking:
    """The ``top`` best plans by exact step time, and the scored candidates that may still join them.

    Only what may be the best plan is priced at once: that sets the bar. The company for it waits until the search is done.

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
        self._waiting: list[Scored] = []  # best bounds first

    @property
    def bar(self) -> float:
        """What a candidate's bound has to beat: the best step time, or a little more while the list is poor.

        A bound that is no better than the best step time cannot be the best plan's. But a list whose last plan is far behind
        still wants company for the best.
        """
        if not self.best:
            return np.inf
        best_s = self.best[0][0]
        times = sorted([step_s for step_s, _ in self.best] + [scored.bound_s for scored in self._waiting])
        return best_s if self._full and times[self.top - 1] <= _POOR * best_s else _SLACK * best_s

    def add(self, batch: Batch) -> None:
        """Remembers scored candidates."""
        if len(batch.fitting):
            self._open.append(batch)

    def settle(self) -> None:
        """Sets the bar: looks at new candidates, best bounds first, until none is under it and the list can be filled."""
        if not self._open:
            return
        bounds = np.concatenate([batch.bound_s[batch.fitting] for batch in self._open])
        owner = np.repeat(np.arange(len(self._open)), [len(batch.fitting) for batch in self._open])
        index = np.concatenate([batch.fitting for batch in self._open])
        order = np.argsort(bounds, kind="stable")
        size = max(_BATCH, self.top)
        for some in (order[begin : begin + size] for begin in range(0, len(order), size)):
            if bounds[some[0]] >= self.bar and self._full:
                break
            new: list[Scored] = []
            for number in distinct(owner[some]).tolist():
                new += self._open[number].scored(index[some[owner[some] == number]])
            tight = self._tightened(new)
            for begin in range(0, len(tight), _BATCH):
                self._admit(tight[begin : begin + _BATCH])
        self._open = []

    def complete(self) -> list[tuple[float, Scored]]:
        """The list, filled from what waits, best bounds first, while a bound is under its last step time."""
        while self._waiting:
            missing = self.top - len(self.best)
            if missing <= 0 and self._waiting[0].bound_s >= self.best[-1][0]:
                break
            self._price(self._waiting[: max(missing, 1)])
        self._waiting = []
        return self.best

    @property
    def _full(self) -> bool:
        """Whether there are as many plans as are to be kept, those that wait for their price among them."""
        return len(self.best) + len(self._waiting) >= self.top

    def _admit(self, candidates: list[Scored]) -> None:
        """Lets those wait that are under the bar, or that the list has room for; prices what may be the best of them."""
        bar = self.bar
        self._waiting += [scored for scored in candidates if scored.bound_s < bar or not self._full]
        self._waiting.sort(key=_bound_s)
        while self._waiting and not (self.best and self._waiting[0].bound_s >= self.best[0][0]):
            first = self._deal(self._waiting[0])
            # Those of one order are priced together: the schedule engine takes no longer for a few than for one.
            self._price([scored for scored in self._waiting if self._deal(scored) == first])
        # Where no bound knows the order's own cycles, it says too little of the list's last plan, which the bar goes by.
        if loose := [scored for scored in self._waiting if scored.schedule.bound_s is None]:
            self._price(loose)

    def _price(self, candidates: list[Scored]) -> None:
        """Exact prices of candidates that wait."""
        self.repriced += len(candidates)
        self.best += zip(self.reprice(candidates), candidates, strict=True)
        self.best.sort(key=lambda pair: pair[0])
        del self.best[self.top :]
        priced = set(map(id, candidates))
        self._waiting = [scored for scored in self._waiting if id(scored) not in priced]

    def _deal(self, scored: Scored) -> tuple[int, Generator, int]:
        """What candidates of one order share."""
        return id(scored.layout), scored.schedule, scored.micro_batches(self.global_batch_size)

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
        return sorted(tight, key=_bound_s)


def _bound_s(scored: Scored) -> float:
    return scored.bound_s
