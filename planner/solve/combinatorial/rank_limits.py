"""Bounds and maps of many ranks: limits on the slowest link of every phase, split until no map keeps them or one is found.

A phase of rings (or single links) ends with its slowest link, so a map is judged by one number per phase. A *box* says between
which two limits the slowest link of every phase lies. Whether any map keeps the upper limits of a box is a question without
numbers: which node may stand next to which. It is answered by placing the rank with the fewest nodes left, and striking from
its neighbours' nodes what no link reaches (forward checking). Boxes whose upper limits nothing keeps are excluded; the others
are cut in half along their widest phase, smallest lower limits first, until what is left is no better than the best map. Chains
add the least that any links of theirs take together (an assignment).
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.solve.combinatorial.certificate import Clock

if TYPE_CHECKING:
    from planner.solve.combinatorial.ranks import Group, RankProblem

__all__ = ["Limits"]

Floats: TypeAlias = NDArray[np.float64]

_NODES = 6000  # ranks placed to answer one question; beyond them the answer is unknown
_BOXES = 150  # boxes that are looked at
_NEAR = 1e-9  # relative width of a box that is not cut


class Limits:
    """Boxes of limits of one problem.

    Args:
        problem: whose maps are sought.
        ranks: how many there are.
        clock: ends the search.
    """

    def __init__(self, problem: RankProblem, ranks: int, clock: Clock) -> None:
        self.problem, self.ranks, self.clock = problem, ranks, clock
        self.nodes = len(problem.bytes_per_s)
        self.phases = [phase for phase in problem.phases if all(group.kind == "ring" for group in phase)]
        self.links_s = [self._links_s(phase) for phase in self.phases]
        others = [phase for phase in problem.phases if any(group.kind != "ring" for group in phase)]
        self.chains_s = sum(self._chain_s(phase) for phase in others)
        self.levels = [
            np.unique(np.concatenate([each[np.isfinite(each)] for _, _, each in links]))
            for links in self.links_s
        ]
        self.placed = 0

    def search(self, best: Sequence[int], value: float) -> tuple[list[int], float, float]:
        """The best map that is found, its seconds, and a bound that no map beats; from a map that is known."""
        found = list(best)
        boxes: list[tuple[float, int, tuple[int, ...], tuple[int, ...]]] = []
        tops = tuple(len(levels) - 1 for levels in self.levels)
        heappush(boxes, (self._least((0,) * len(tops)), 0, (0,) * len(tops), tops))
        looked, bound = 0, value
        while boxes and boxes[0][0] < value * (1.0 - _NEAR):
            least, _, low, high = boxes[0]
            if looked >= _BOXES or self.clock.over:
                return found, value, min(bound, least)
            heappop(boxes)
            looked += 1
            high = self._capped(low, high, value)
            answer = self._kept(high)
            if answer is None:
                continue
            if answer:
                seconds = self.problem.seconds(answer)
                if seconds < value:
                    found, value = answer, seconds
            widths = [levels[b] - levels[a] for levels, a, b in zip(self.levels, low, high, strict=True)]
            if max(widths, default=0.0) <= _NEAR * value:
                bound = min(bound, least)  # what is left of it is how chains share what the limits allow
                continue
            at = int(np.argmax(widths))
            middle = (low[at] + high[at]) // 2
            lower = (*high[:at], middle, *high[at + 1 :])
            upper = (*low[:at], middle + 1, *low[at + 1 :])
            heappush(boxes, (least, looked, low, lower))
            heappush(boxes, (self._least(upper), -looked, upper, high))
        return found, value, min(bound, boxes[0][0] if boxes else value, value)

    # -- details -----------------------------------------------------------------------------------------------------

    def _links_s(self, phase: Sequence[Group]) -> list[tuple[int, int, Floats]]:
        """The links of a phase, each with its seconds between any two nodes."""
        problem = self.problem
        known: dict[float, Floats] = {}
        found = []
        for group in phase:
            if group.n_bytes not in known:
                with np.errstate(divide="ignore"):
                    seconds = problem.latency_s + group.n_bytes / problem.bytes_per_s.astype(float)
                np.fill_diagonal(seconds, np.inf)
                known[group.n_bytes] = seconds
            found += [(a, b, known[group.n_bytes]) for a, b in group.links]
        return found

    def _chain_s(self, phase: Sequence[Group]) -> float:
        """No map takes less for a phase of chains: their links leave and reach every node once at most, and the longest chain
        takes its share of them all at least."""
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

        links = self._links_s([group for group in phase if group.kind != "ring"])
        least = np.min([each for *_, each in links], axis=0)
        ends = [[link[side] for link in links] for side in (0, 1)]
        if any(len(set(side)) < len(side) for side in ends):
            return float(least.min() * max(len(group.links) for group in phase))
        idle = self.nodes - len(links)
        cost = np.zeros((self.nodes + idle, self.nodes + idle))
        cost[: self.nodes, : self.nodes] = np.where(np.isfinite(least), least, 1e9)
        cost[self.nodes :, self.nodes :] = 1e9
        row, column = linear_sum_assignment(cost)
        return float(cost[row, column].sum()) / len(phase)

    def _least(self, low: Sequence[int]) -> float:
        """What maps with these limits or larger ones take at least."""
        return self.chains_s + sum(float(levels[a]) for levels, a in zip(self.levels, low, strict=True))

    def _capped(self, low: Sequence[int], high: Sequence[int], value: float) -> tuple[int, ...]:
        """Upper limits that a map below a value keeps."""
        spare = value - self._least(low)
        return tuple(
            min(b, max(a, int(np.searchsorted(levels, levels[a] + spare, side="left")) - 1))
            for levels, a, b in zip(self.levels, low, high, strict=True)
        )

    def _kept(self, high: Sequence[int]) -> list[int] | None:
        """A map that keeps upper limits: None where there is none, and an empty one where that is not known."""
        self._neighbours: list[list[tuple[int, list[int]]]] = [[] for _ in range(self.ranks)]
        masks: dict[tuple[int, float, bool], list[int]] = {}
        for links, levels, limit in zip(self.links_s, self.levels, high, strict=True):
            for a, b, seconds in links:
                for one, other, turned in ((a, b, False), (b, a, True)):
                    key = id(seconds), float(levels[limit]), turned
                    if key not in masks:
                        allowed = (seconds.T if turned else seconds) <= levels[limit]
                        masks[key] = [sum(1 << int(n) for n in np.flatnonzero(row)) for row in allowed]
                    self._neighbours[one].append((other, masks[key]))
        self._left = _NODES
        every = (1 << self.nodes) - 1
        domains = self._consistent([every] * self.ranks)
        if domains is None:
            return None
        placed: list[int] = [-1] * self.ranks
        answer = self._place(placed, domains, every)
        return placed if answer else ([] if answer is None else None)

    def _consistent(self, domains: list[int]) -> list[int] | None:
        """Nodes of every rank that have a node for each of its neighbours; None where a rank has none left."""
        changed = True
        while changed:
            changed = False
            for rank, domain in enumerate(domains):
                for other, mask in self._neighbours[rank]:
                    for node in _bits(domain):
                        if not mask[node] & domains[other]:
                            domain &= ~(1 << node)
                if domain != domains[rank]:
                    domains[rank], changed = domain, True
                if not domain:
                    return None
        return domains

    def _place(self, placed: list[int], domains: list[int], free: int) -> bool | None:
        """Whether the ranks that are left can be placed; None where that is not known."""
        open_ = [rank for rank, node in enumerate(placed) if node < 0]
        if not open_:
            return True
        rank = min(open_, key=lambda r: ((domains[r] & free).bit_count(), -len(self._neighbours[r]), r))
        known = True
        for node in _bits(domains[rank] & free):
            if not self._left or self.clock.over:
                return None
            self._left -= 1
            self.placed += 1
            placed[rank] = node
            rest = free & ~(1 << node)
            narrowed = list(domains)
            for other, mask in self._neighbours[rank]:
                narrowed[other] &= mask[node]
            if all(narrowed[r] & rest for r in open_ if r != rank):
                answer = self._place(placed, narrowed, rest)
                if answer:
                    return True
                known = known and answer is False
            placed[rank] = -1
        return False if known else None


def _bits(mask: int) -> list[int]:
    """Numbers of the bits that are set."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found
