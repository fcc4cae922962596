"""How many layers of each kind take each strategy: the inner problem of a stage, and its exact answer.

Layers of one kind are exchangeable where a stage's time and bytes are sums, so the question is *how many* of them take each
strategy, not which. With ``x`` layers of group ``g`` under strategy ``s``:

    minimise   max_f (offset_f + Σ x_gs·cost_f,gs) + switch·(classes in use − 1)
    subject to Σ_s x_gs = n_g,   Σ x_gs·held_d,gs ≤ budget_d,   x ≥ 0 and whole.

Several costs whose largest counts are a convex objective (traffic that work hides, or does not). Memory is never rounded.

:func:`solve` is a branch and bound by reduced costs. The duals of the linear relaxation (:mod:`planner.solve.layerwise.linear`),
weights ``μ`` of the costs and prices ``λ`` of the budgets, give a lower bound ``L``, and a layer that does not take the strategy
of its group with the smallest ``μ·cost + λ·held`` adds at least the difference, its reduced cost, to ``L``. So all that can beat
an incumbent ``U`` has ``Σ x·reduced < U − L``, which leaves few counts to try.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil, floor
from typing import TypeAlias

import numpy as np

from planner.ledger import Array
from planner.solve.layerwise.linear import relaxed
from planner.solve.layerwise.rounding import repaired

__all__ = [
    "SLACK",
    "CountProblem",
    "Counts",
    "Group",
    "OutOfNodesError",
    "bound",
    "hull",
    "solve",
    "unbeaten",
]

Counts: TypeAlias = tuple[tuple[int, ...], ...]  # per group, layers under each of its strategies
_Column: TypeAlias = tuple[float, list[float], list[float]]  # a strategy's reduced cost, costs and bytes

_MOST_NODES = 20_000  # of one branch and bound: random problems with one budget take some dozens

_FEW_NODES = 1500  # where the best need not be found to the last digit

SLACK = 1e-12
"""Relative excess of a budget that counts as rounding."""


class OutOfNodesError(Exception):
    """The branch and bound has grown too large; another solver may do better.

    Attributes:
        best: the best counts so far and their value, if there are any.
        bound: what the relaxation proves.
    """

    def __init__(self, best: tuple[float, Counts] | None, bound: float) -> None:
        super().__init__("too many nodes")
        self.best, self.bound = best, bound


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """``size`` exchangeable layers; ``cost`` (functions, strategies) and ``held`` (budgets, strategies) of one of them.

    ``classes``: strategies of different classes are unlike neighbours, between which a transition is paid.
    """

    size: int
    cost: Array
    held: Array
    classes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class CountProblem:
    """Groups under common budgets; ``offset`` is what is paid in any case, ``switch`` what a change of class costs."""

    groups: tuple[Group, ...]
    budget: Array
    offset: Array
    switch: float = 0.0

    def value(self, counts: Counts) -> float:
        """The objective of some counts, whether they fit or not."""
        total = self.offset.astype(float)
        used: set[int] = set()
        for group, taken in zip(self.groups, counts, strict=True):
            total = total + group.cost @ np.asarray(taken, dtype=float)
            used |= {group.classes[s] for s, n in enumerate(taken) if n and group.classes}
        return float(total.max()) + self.switch * max(len(used) - 1, 0)

    def fits(self, counts: Counts) -> bool:
        """Whether the counts keep every budget."""
        held = sum(g.held @ np.asarray(x, dtype=float) for g, x in zip(self.groups, counts, strict=True))
        return bool(np.all(held <= self.budget + SLACK * np.abs(self.budget)))


def solve(
    problem: CountProblem, under: float = np.inf, tolerance: float = 0.0
) -> tuple[float, Counts] | None:
    """The best counts and their value; None where none fits (or none is below ``under``).

    With a ``tolerance``, counts that no others undercut by more than this fraction.

    Raises:
        OutOfNodesError: several budgets that bind at once can take more nodes than are worth it.

    >>> fast, small = [3.0, 4.0], [10.0, 4.0]  # seconds and bytes of two strategies
    >>> layers = Group(5, np.array([fast]), np.array([small]))
    >>> solve(CountProblem((layers,), np.array([36.0]), np.zeros(1)))  # two of the fast ones: 2·10 + 3·4 = 32
    (18.0, ((2, 3),))
    """
    best: tuple[float, Counts] | None = None
    sets = _class_sets(problem)
    least = bound(problem) if len(sets) > 1 else -np.inf  # whatever the classes
    for classes in sets:
        paid = problem.switch * (len(classes) - 1) if classes else 0.0
        if least + paid >= (under if best is None else best[0]):
            continue
        kept = [_kept(group, classes) for group in problem.groups]
        if not all(kept):
            continue
        limit = (under if best is None else best[0]) - paid
        found = _Search(problem, kept, tolerance).run(limit)
        if found is not None:
            best = (found[0] + paid, found[1])
    return best


def bound(problem: CountProblem) -> float:
    """What the linear relaxation proves: no counts that fit have a smaller value (infinite: none fits)."""
    kept = [_kept(group, None) for group in problem.groups]
    return _Search(problem, kept, 0.0).bound


# -- details ---------------------------------------------------------------------------------------------------------


def _class_sets(problem: CountProblem) -> list[frozenset[int] | None]:
    """Which classes may be in use: all at no cost, or every subset, small ones first."""
    present = sorted({c for group in problem.groups for c in group.classes})
    if not problem.switch or len(present) < 2:
        return [None]
    return [frozenset(some) for n in range(1, len(present) + 1) for some in combinations(present, n)]


def _kept(group: Group, classes: frozenset[int] | None) -> list[int]:
    """Strategies of some classes."""
    return [s for s in range(group.cost.shape[1]) if classes is None or group.classes[s] in classes]


class _Search:
    """Branch and bound over the counts of one problem, some strategies left out."""

    def __init__(self, problem: CountProblem, kept: Sequence[Sequence[int]], tolerance: float) -> None:
        self.problem, self.kept, self.tolerance = problem, kept, tolerance
        self.sizes = [group.size for group in problem.groups]
        self.cost = [group.cost[:, k] for group, k in zip(problem.groups, kept, strict=True)]
        self.held = [group.held[:, k] for group, k in zip(problem.groups, kept, strict=True)]
        self.room = problem.budget + SLACK * np.abs(problem.budget)
        self.relaxed = relaxed(self.sizes, self.cost, self.held, problem.offset, self.room)
        self.bound = self.relaxed.bound

    def run(self, limit: float) -> tuple[float, Counts] | None:
        """The best counts below a limit."""
        if self.bound >= limit:
            return None
        self.best: tuple[float, list[list[int]]] | None = None
        self.nodes = 0
        self._lower(limit)
        counts = [_rounded(n, shares) for n, shares in zip(self.sizes, self.relaxed.shares, strict=True)]
        self._offer(counts)
        weights = self.relaxed.weights
        if self.best is None or self.best[0] - self.bound > self.tolerance * abs(self.bound):
            near = repaired(counts, [weights @ c for c in self.cost], self.held, self.room)
            if near is not None:
                self._offer(near)
        if self.bound < self.limit and self._order():
            self._descend(0, 0, self.sizes[0], self.bound, self.offsets, self.rooms, [])
        return None if self.best is None else (self.best[0], self._whole(self.best[1]))

    def _lower(self, limit: float) -> None:
        """Sets what counts have to be below, the tolerance taken off."""
        self.limit = limit - self.tolerance * abs(limit) if limit < np.inf else limit

    def _whole(self, counts: Sequence[Sequence[int]]) -> Counts:
        """Counts over all strategies of every group, those that were left out included."""
        whole = []
        for group, kept, taken in zip(self.problem.groups, self.kept, counts, strict=True):
            row = [0] * group.cost.shape[1]
            for s, n in zip(kept, taken, strict=True):
                row[s] = n
            whole.append(tuple(row))
        return tuple(whole)

    # -- the tree --------------------------------------------------------------------------------------------------------

    def _order(self) -> bool:
        """Strategies of each group with the largest reduced cost first: the cheapest takes whatever layers are left.

        Without those that one layer can no more afford, or that another beats; false where a group has none left, so that
        nothing is better.
        """
        weights, prices = self.relaxed.weights, self.relaxed.prices
        self.ranks, self.columns = [], []
        for cost, held in zip(self.cost, self.held, strict=True):
            priced = weights @ cost + prices @ held
            reduced = priced - priced.min()
            open_ = np.flatnonzero(self.bound + reduced < self.limit)
            if not len(open_):
                return False
            open_ = open_[unbeaten(np.concatenate([cost, held])[:, open_].T)]
            ranks = open_[np.argsort(-reduced[open_], kind="stable")]
            self.ranks.append(ranks.tolist())
            self.columns.append(
                list(
                    zip(
                        reduced[ranks].tolist(),
                        cost[:, ranks].T.tolist(),
                        held[:, ranks].T.tolist(),
                        strict=True,
                    )
                )
            )
        # What the groups from here on hold at least, per budget.
        least = [
            n * h[:, ranks].min(axis=1) for n, h, ranks in zip(self.sizes, self.held, self.ranks, strict=True)
        ]
        self.after = np.cumsum([np.zeros(len(self.room)), *least[::-1]], axis=0)[::-1].tolist()
        # And the strategies of a group from here on, per layer.
        self.least_from = [
            np.minimum.accumulate(h[:, ranks[::-1]], axis=1).T[::-1].tolist()
            for h, ranks in zip(self.held, self.ranks, strict=True)
        ]
        self.likely = [
            shares[ranks].tolist() for shares, ranks in zip(self.relaxed.shares, self.ranks, strict=True)
        ]
        self.offsets, self.rooms = self.problem.offset.tolist(), self.room.tolist()
        return True

    def _descend(
        self, g: int, i: int, left: int, bound: float, costs: list[float], rooms: list[float], taken: list[int]
    ) -> None:  # fmt: skip
        """Tries counts of the i-th strategy of group g, ``left`` of whose layers are open."""
        if g == len(self.sizes):
            value = max(costs)
            if value < self.limit:
                self.best = (value, self._unranked(taken))
                self._lower(value)
            return
        self.nodes += 1
        if self.nodes > (_MOST_NODES if self.tolerance == 0.0 else _FEW_NODES):
            found = None if self.best is None else (self.best[0], self._whole(self.best[1]))
            raise OutOfNodesError(found, self.bound)
        columns = self.columns[g]
        left_for = self.sizes[g + 1] if g + 1 < len(self.sizes) else 0
        if i >= len(columns) - 2:
            one, other = columns[i], columns[-1]
            for n in self._shares(g, left, one, other, costs, rooms) if one is not other else (left,):
                rest = left - n
                now = bound + n * one[0] + rest * other[0]
                if now >= self.limit:
                    continue
                room = [r - n * x - rest * y for r, x, y in zip(rooms, one[2], other[2], strict=True)]
                if all(r >= x for r, x in zip(room, self.after[g + 1], strict=True)):
                    total = [c + n * x + rest * y for c, x, y in zip(costs, one[1], other[1], strict=True)]
                    row = [n, rest] if one is not other else [left]
                    self._descend(g + 1, 0, left_for, now, total, room, taken + row)
            return
        extra, cost, held = columns[i]
        later, least = self.after[g + 1], self.least_from[g][i + 1]
        for n in self._near(g, i, left, extra, bound):
            now = bound + n * extra
            if now >= self.limit:
                continue
            room = [r - n * h for r, h in zip(rooms, held, strict=True)]
            if all(r >= x + (left - n) * y for r, x, y in zip(room, later, least, strict=True)):
                total = [c + n * x for c, x in zip(costs, cost, strict=True)]
                self._descend(g, i + 1, left - n, now, total, room, [*taken, n])

    def _near(self, g: int, i: int, left: int, extra: float, bound: float) -> Sequence[int]:
        """Numbers of layers that the i-th strategy of group g may take, those close to the relaxation's share first."""
        spare = self.limit - bound
        most = left if extra * left < spare else floor(spare / extra)
        share = self.likely[g][i]
        return range(most + 1) if share == 0.0 else sorted(range(most + 1), key=lambda n: abs(n - share))

    def _shares(
        self, g: int, left: int, one: _Column, other: _Column, costs: list[float], rooms: list[float]
    ) -> Sequence[int]:
        """How many of ``left`` layers may take the first of a group's last two strategies; few candidates in the last group.

        Each budget leaves an interval. In the last group the objective is the largest of linear functions of the number, so that
        its minimum lies at an end of the interval or beside where two of them cross.
        """
        low, high = 0.0, float(left)
        for room, later, x, y in zip(rooms, self.after[g + 1], one[2], other[2], strict=True):
            spare, slope = room - later - left * y, x - y
            if slope > 0.0:
                high = min(high, spare / slope)
            elif slope < 0.0:
                low = max(low, spare / slope)
            elif spare < 0.0:
                return ()
        first, last = ceil(low - 1e-9), floor(high + 1e-9)
        if first > last:
            return ()
        if g + 1 < len(self.sizes):
            return range(first, last + 1)
        lines = [(c + left * y, x - y) for c, x, y in zip(costs, one[1], other[1], strict=True)]
        found = {first, last}
        for (a, s), (b, t) in combinations(lines, 2):
            if s != t and first < (cross := (b - a) / (s - t)) < last:
                found |= {floor(cross), ceil(cross)}
        return sorted(found)

    def _unranked(self, taken: list[int]) -> list[list[int]]:
        """Counts in the order of the tree as counts per group and strategy."""
        counts, start = [], 0
        for ranks, held in zip(self.ranks, self.held, strict=True):
            row = [0] * held.shape[1]
            for s, n in zip(ranks, taken[start : start + len(ranks)], strict=True):
                row[s] = n
            counts.append(row)
            start += len(ranks)
        return counts

    def _offer(self, counts: list[list[int]]) -> None:
        """Takes counts as the incumbent, if they fit and are better."""
        held = sum(h @ np.array(x) for h, x in zip(self.held, counts, strict=True))
        if np.any(held > self.room):
            return
        total = self.problem.offset + sum(c @ np.array(x) for c, x in zip(self.cost, counts, strict=True))
        value = float(total.max())
        if value < self.limit:
            self.best = (value, [list(row) for row in counts])
            self._lower(value)


def _rounded(size: int, shares: Array) -> list[int]:
    """Shares rounded down, and the layers that are left under the strategies with the largest remainders."""
    whole = np.floor(shares + 1e-9)
    left = size - int(whole.sum())
    if left > 0:
        whole[np.argsort(whole - shares, kind="stable")[:left]] += 1.0
    return whole.astype(int).tolist()  # type: ignore[no-any-return]


def unbeaten(columns: Array) -> Array:
    """Rows, in their order, that no other row is as small as everywhere; of equal ones the first."""
    order = np.lexsort(columns.T[::-1])
    rows = columns[order]
    # In this order a row can only be beaten by one before it, and equal ones are neighbours.
    first = np.concatenate([np.ones(min(len(rows), 1), dtype=bool), np.any(rows[1:] != rows[:-1], axis=1)])
    order, rows = order[first], rows[first]
    beaten = np.tri(len(order), k=-1, dtype=bool)
    for column in np.ascontiguousarray(rows.T):
        beaten &= column <= column[:, None]
    return np.sort(order[~beaten.any(axis=1)])


def hull(cost: Array, held: Array) -> list[int]:
    """Strategies on the lower convex hull of (held, cost), from the cheapest to the smallest."""
    order = sorted(range(len(cost)), key=lambda s: (cost[s], held[s]))
    chain = [order[0]]
    for s in order[1:]:
        if held[s] >= held[chain[-1]]:
            continue
        while len(chain) > 1:
            a, b = chain[-2], chain[-1]
            if (cost[b] - cost[a]) * (held[a] - held[s]) < (cost[s] - cost[a]) * (held[a] - held[b]):
                break
            chain.pop()
        chain.append(s)
    return chain
