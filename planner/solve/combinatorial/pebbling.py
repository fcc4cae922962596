"""Shortest schedules of a graph in little memory, by best-first search over what is held: exact, without a program.

A state is the stage, the node computed last in it, and the set of results that are held. Computing a node costs its
seconds; dropping a result costs nothing, so nothing is dropped before there is no room, and then no more than there must
be. Two things bound what is left: results that are missing and still read are computed again, with everything missing
that they are computed from; and where more is read behind a stage than fits beside what it computes, some of that is
missing then (the cheapest per byte: a knapsack). The rules are those of the integer program in
:mod:`planner.solve.combinatorial.recompute`, and so are the answers. Search: P. Hart, N. Nilsson, B. Raphael, IEEE
Transactions on Systems Science and Cybernetics 4(2), 1968.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from planner.solve.combinatorial.certificate import Clock

__all__ = ["Path", "shortest_path"]

_CHECKED_EVERY = 256  # states between two looks at the clock
_SLACK = 1e-9  # relative: sizes that differ by less are equal


@dataclass(frozen=True, slots=True)
class Path:
    """What a search found: per stage the nodes computed and those held at its beginning (None: no schedule), and a bound."""

    stages: tuple[tuple[frozenset[int], frozenset[int]], ...] | None
    bound_s: float
    complete: bool
    states: int


def shortest_path(
    time_s: Sequence[float], size: Sequence[float], reads: Sequence[tuple[int, ...]], in_place: frozenset[int],
    boundary: int, budget: float, kept_limit: float, clock: Clock, greed: float = 1.0,
) -> Path:  # fmt: skip
    """The schedule with the least recomputation; ``bound_s`` is of its recomputation alone.

    Args:
        time_s: of every node.
        size: of what it leaves.
        reads: earlier nodes whose results it needs.
        in_place: nodes that may write over what they read.
        boundary: the stage at whose beginning ``kept_limit`` holds; 0: none.
        budget: held at once at most.
        kept_limit: held at the boundary at most.
        clock: ends the search.
        greed: weight of what is left; above 1 finds some schedule sooner, and no bound.
    """
    graph = _Graph(time_s, size, reads, in_place, boundary, budget, kept_limit)
    n = graph.n
    start = (0, -1, 0)
    best: dict[tuple[int, int, int], float] = {start: 0.0}
    origin: dict[tuple[int, int, int], tuple[tuple[int, int, int], int]] = {}
    # Of equal bounds the one that is furthest first; the counter keeps the order of equal ones.
    heap: list[tuple[float, int, int, float, tuple[int, int, int]]] = [(0.0, 0, 0, 0.0, start)]
    count, popped = 0, 0
    while heap:
        bound, _, _, spent, state = heappop(heap)
        if spent > best[state]:
            continue
        popped += 1
        stage, last, live = state
        if stage == n:
            return Path(_traced(origin, state, n), bound, greed == 1.0, popped)
        if popped % _CHECKED_EVERY == 0 and clock.over:
            return Path(None, bound if greed == 1.0 else 0.0, False, popped)
        for node in range(last + 1, stage + 1):
            if (
                graph.reads_mask[node] & ~live
                or (live >> node & 1)
                or (node < stage and graph.latest[node] < stage)
            ):
                continue
            cost = spent + (time_s[node] if node < stage else 0.0)
            for held in graph.with_node(node, live, budget, node in in_place):
                after = held & graph.useful[stage + 1] if node == stage else held
                next_stage, next_last = (stage + 1, -1) if node == stage else (stage, node)
                ends = [after]
                if node == stage and next_stage == boundary and boundary:
                    ends = list(graph.evictions(after, 0, graph.total(after) - kept_limit))
                for end in ends:
                    new = (next_stage, next_last, end)
                    if cost < best.get(new, float("inf")):
                        best[new], origin[new] = cost, (state, node)
                        count += 1
                        left = graph.left_s(next_stage, end)
                        if left < float("inf"):
                            heappush(heap, (cost + greed * left, -next_stage, count, cost, new))
    return Path(None, float("inf"), greed == 1.0, popped)


def _traced(
    origin: dict[tuple[int, int, int], tuple[tuple[int, int, int], int]], state: tuple[int, int, int], n: int
) -> tuple[tuple[frozenset[int], frozenset[int]], ...]:
    """Nodes computed in every stage, and held at its beginning."""
    computed: list[set[int]] = [set() for _ in range(n)]
    kept: list[int] = [0] * n
    while state in origin:
        before, node = origin[state]
        computed[before[0]].add(node)
        if before[1] == -1:
            kept[before[0]] = before[2]
        state = before
    # What was held at the beginning of a stage and neither read in it nor held behind it need not have been.
    return tuple(
        (frozenset(nodes), frozenset(i for i in range(n) if held >> i & 1))
        for nodes, held in zip(computed, kept, strict=True)
    )


class _Graph:
    """Bit masks of a graph; node i is bit i."""

    def __init__(
        self, time_s: Sequence[float], size: Sequence[float], reads: Sequence[tuple[int, ...]], in_place: frozenset[int],
        boundary: int, budget: float, kept_limit: float,
    ) -> None:  # fmt: skip
        n = self.n = len(reads)
        self.time_s, self.size = time_s, size
        self._totals: dict[int, float] = {}
        self._largest_first = sorted(range(n), key=lambda i: (-size[i], i))
        self.reads_mask = [sum(1 << i for i in sources) for sources in reads]
        self.latest = list(range(n))
        for j in reversed(range(n)):
            for i in reads[j]:
                self.latest[i] = max(self.latest[i], self.latest[j])
        stages = range(n + 1)
        self.useful = [sum(1 << i for i in range(n) if self.latest[i] >= t) for t in stages]
        # Per stage, what is computed before it and read in it or behind it.
        self._wanted = [
            sum(1 << i for i in range(t) if any(i in reads[j] for j in range(t, n))) for t in stages
        ]
        self._known: dict[tuple[int, int], float] = {}
        self._crowded: list[tuple[int, int, float, list[int]]] = []
        for s in range(n):
            read_later = self._wanted[s + 1] & ~(1 << s)
            beside = 0.0 if s in in_place else self.total(self.reads_mask[s] & ~read_later)
            self._crowd(s, read_later, budget - self.size[s] - beside)
        if boundary:
            self._crowd(boundary - 1, self._wanted[boundary], kept_limit)  # behind the stage before it

    def _crowd(self, stage: int, wanted: int, room: float) -> None:
        """Notes a stage in which less may be held than is read behind it: the cheapest to compute again, per byte, first."""
        excess = self.total(wanted) - room
        if excess > _SLACK * max(room, 0.0):
            nodes = [i for i in _bits(wanted) if self.size[i] > 0.0]
            nodes.sort(key=lambda i: (self.time_s[i] / self.size[i], i))
            self._crowded.append((stage, wanted, excess, nodes))

    def total(self, live: int) -> float:
        """Bytes of a set."""
        found = self._totals.get(live)
        if found is None:
            found = self._totals[live] = sum(self.size[i] for i in _bits(live))
        return found

    def left_s(self, stage: int, live: int) -> float:
        """Seconds that recomputation takes at least from here on: of what is missing, and of what has yet to go."""
        key = (stage, live)
        found = self._known.get(key)
        if found is None:
            to_go_s = max(
                (self._to_go_s(stage, live, *c[1:]) for c in self._crowded if c[0] >= stage), default=0.0
            )
            found = self._known[key] = self._missing_s(stage, live) + to_go_s
        return found

    def _missing_s(self, stage: int, live: int) -> float:
        """What is missing and still read, with all that is missing before it: each is computed once more."""
        todo, seen, total = self._wanted[stage] & ~live, 0, 0.0
        while todo:
            low = todo & -todo
            node = low.bit_length() - 1
            seen |= low
            total += self.time_s[node]
            todo = (todo | self.reads_mask[node] & ~live) & ~seen
        return total

    def _to_go_s(self, stage: int, live: int, wanted: int, excess: float, nodes: Sequence[int]) -> float:
        """What is held now, or computed before a crowded stage, must in part be gone in it, and be computed again behind it.

        The cheapest per byte go, the last of them in part: the bound of a knapsack. What is missing now may be missing then.
        """
        missing = wanted & ~live & ((1 << stage) - 1)
        excess -= self.total(missing)
        total = 0.0
        for node in nodes:
            if excess <= 0.0:
                return total
            if not missing >> node & 1:
                part = min(excess / self.size[node], 1.0)
                total, excess = total + part * self.time_s[node], excess - part * self.size[node]
        return total if excess <= _SLACK * self.total(wanted) else float("inf")

    def with_node(self, node: int, live: int, budget: float, in_place: bool) -> Iterator[int]:
        """The sets after a node is computed: everything, or the least that has to go."""
        more = self.total(live) + self.size[node] - budget
        pinned = 0 if in_place else self.reads_mask[node]
        for held in self.evictions(live, pinned, more):
            yield held | 1 << node

    def evictions(self, live: int, pinned: int, more: float) -> Iterator[int]:
        """What is left of a set when at least ``more`` has gone, and nothing that could have stayed; ``pinned`` stays."""
        slack = _SLACK * max(self.total(live), 1e-300)
        loose = live & ~pinned
        free = [i for i in self._largest_first if loose >> i & 1]
        rest = [0.0] * (len(free) + 1)
        for position in reversed(range(len(free))):
            rest[position] = rest[position + 1] + self.size[free[position]]

        def choose(position: int, need: float, gone: int, least: float) -> Iterator[int]:
            if need <= slack:
                if need + least > slack:  # none of those that went could have stayed
                    yield live & ~gone
                return
            if position == len(free) or rest[position] < need - slack:
                return
            item = free[position]
            if self.size[item] > 0.0:
                yield from choose(
                    position + 1, need - self.size[item], gone | 1 << item, min(least, self.size[item])
                )
            yield from choose(position + 1, need, gone, least)

        if more <= slack:
            yield live
        else:
            yield from choose(0, more, 0, float("inf"))


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
