"""Which rank runs on which node, where bandwidths between nodes differ.

Ranks talk in groups. A phase is a set of groups that talk at the same time, and ends with the slowest; a step is a sum of
phases. A ``ring`` passes its bytes from each member to the next and round, all at once (an all-reduce of n members passes
2(n − 1)/n of its tensor), so its slowest link decides; a ``chain`` passes them from the first to the last, link after link
(the hops of a pipeline). Groups of two are single pairs: a quadratic assignment problem is a sum of phases of one pair each.

Exchanges of two ranks from deterministic starts and, above ten nodes, annealing of every phase's slow links find maps; limits
on the slowest link of every phase, split until nothing keeps them, find better ones and bound what is left
(:mod:`planner.solve.combinatorial.rank_limits`). Small problems go on to depth-first branch and bound: ranks are placed in
order, and every group's unplaced links are taken at the best rate that is left.

Source: J. Yim et al. 2024 (Pipette, arXiv:2405.18093) §V, which anneals alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.errors import Problem, SpecError
from planner.solve.combinatorial.certificate import Certificate, Clock, certify
from planner.solve.combinatorial.rank_limits import Limits

__all__ = ["Group", "RankMap", "RankProblem", "in_order", "map_ranks", "pipeline_phases"]

Floats: TypeAlias = NDArray[np.float64]

_EXACT_RANKS = 10  # so many are searched to the end unless time runs out
_STARTS = 8
_MOVES = 100_000  # of annealing
_POWER = 12.0  # of the mean that stands for the largest of a phase's links
_HOT = 0.1  # of the seconds, at which worse maps are taken at first
_COOLING = 1e-2 ** (1.0 / _MOVES)  # to a hundredth at the end


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that talk: ``kind`` is ring or chain, and ``n_bytes`` pass over every link."""

    ranks: tuple[int, ...]
    n_bytes: float
    kind: str = "ring"

    @property
    def links(self) -> tuple[tuple[int, int], ...]:
        """Neighbours, in order; a ring of more than two closes."""
        pairs = list(zip(self.ranks, self.ranks[1:], strict=False))
        if self.kind == "ring" and len(self.ranks) > 2:
            pairs.append((self.ranks[-1], self.ranks[0]))
        return tuple(pairs)


@dataclass(frozen=True, slots=True, eq=False)
class RankProblem:
    """Bandwidth between every pair of nodes, and the phases of a step.

    Attributes:
        bytes_per_s: from every node to every other one; the diagonal is not used.
        phases: groups that talk at the same time.
        latency_s: per message.
    """

    bytes_per_s: Floats
    phases: tuple[tuple[Group, ...], ...]
    latency_s: float = 0.0

    def seconds(self, node: Sequence[int]) -> float:
        """Seconds that a step's messages take where rank i runs on ``node[i]``."""
        return float(
            sum(max((self._group_s(group, node) for group in phase), default=0.0) for phase in self.phases)
        )

    def _group_s(self, group: Group, node: Sequence[int]) -> float:
        links = [
            self.latency_s + group.n_bytes / float(self.bytes_per_s[node[a], node[b]]) for a, b in group.links
        ]
        return (max(links, default=0.0)) if group.kind == "ring" else sum(links)


@dataclass(frozen=True, slots=True, eq=False)
class RankMap:
    """The node of every rank, and what is proved of the seconds."""

    node: tuple[int, ...]
    time_s: float
    certificate: Certificate


def pipeline_phases(
    stages: int, replicas: int, activation_bytes: float, gradient_bytes: float, micro_batches: int = 1
) -> tuple[tuple[Group, ...], ...]:
    """The phases of a step of pipelines of nodes: rank ``stage·replicas + replica``.

    The hops of a pipeline stand on the critical path of 1F1B on the way in and on the way out, and once per further micro-batch
    where the slowest pair of stages passes them (2(p − 1) + 2(m − 1) messages of which the path has one chain each way);
    gradients are summed over the replicas of every stage at the end.
    """
    hops = tuple(
        Group(tuple(stage * replicas + replica for stage in range(stages)), 2.0 * activation_bytes, "chain")
        for replica in range(replicas)
    )
    further = tuple(
        Group(
            (stage * replicas + replica, (stage + 1) * replicas + replica),
            2.0 * (micro_batches - 1) * activation_bytes,
        )
        for stage in range(stages - 1)
        for replica in range(replicas)
    )
    sums = tuple(
        Group(
            tuple(stage * replicas + replica for replica in range(replicas)),
            2.0 * gradient_bytes * (replicas - 1) / replicas,
        )
        for stage in range(stages)
    )
    phases = (
        hops if stages > 1 else (),
        further if stages > 1 and micro_batches > 1 else (),
        sums if replicas > 1 else (),
    )
    return tuple(phase for phase in phases if phase)


def map_ranks(problem: RankProblem, *, time_limit_s: float | None = None) -> RankMap:
    """The mapping of ranks to nodes with the least seconds.

    Raises:
        SpecError: the matrix is not square, has no rate where one is needed, or too few nodes.
    """
    clock = Clock(time_limit_s)
    ranks = _checked(problem)
    nodes = len(problem.bytes_per_s)
    best = _exchanged(problem, ranks, clock)
    value = problem.seconds(best)
    if nodes > _EXACT_RANKS:
        annealed = _annealed(problem, best, clock)
        best, value = min(((best, value), annealed), key=lambda found: found[1])
    limits = Limits(problem, ranks, clock)
    best, value, bound = limits.search(best, value)
    search = _Search(problem, ranks, value, best, clock)
    bound = max(bound, search.bound((), tuple(range(nodes))), _every_node_bound(problem, ranks))
    exact = value <= bound * (1.0 + 1e-12)
    solver = "exchanges and annealing, limits per phase"
    if not exact and nodes <= _EXACT_RANKS:
        exact = search.run()
        best, value, solver = search.best, search.value, "branch and bound"
    notes = {"placements": search.placements + limits.placed}
    return RankMap(
        tuple(best), value, certify(value, value if exact else min(bound, value), solver, clock, notes)
    )


def in_order(problem: RankProblem) -> tuple[int, ...]:
    """Rank i on node i: what a launcher does that knows no bandwidths."""
    return tuple(range(_checked(problem)))


# -- details -----------------------------------------------------------------------------------------------------------------


def _checked(problem: RankProblem) -> int:
    """How many ranks there are."""
    matrix = problem.bytes_per_s
    ranks = 1 + max((rank for phase in problem.phases for group in phase for rank in group.ranks), default=-1)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise SpecError(Problem("bytes_per_s", f"a shape of {matrix.shape}", "a square matrix"))
    if not np.all(matrix[~np.eye(len(matrix), dtype=bool)] > 0.0):
        raise SpecError(
            Problem("bytes_per_s", "a rate that is not positive", "positive rates off the diagonal")
        )
    if not 0 < ranks <= len(matrix):
        raise SpecError(
            Problem(
                "groups", f"{ranks} ranks on {len(matrix)} nodes", "at least one rank, and a node for each"
            )
        )
    return ranks


class _Search:
    """Depth-first branch and bound over the nodes of ranks in order."""

    def __init__(
        self, problem: RankProblem, ranks: int, value: float, best: Sequence[int], clock: Clock
    ) -> None:
        self.problem, self.ranks, self.value, self.best, self.clock = problem, ranks, value, list(best), clock
        self.placements = 0

    def run(self) -> bool:
        """Whether the search came to its end."""
        return self._place((), tuple(range(len(self.problem.bytes_per_s))))

    def bound(self, placed: tuple[int, ...], free: tuple[int, ...]) -> float:
        """No completion takes less: links of unplaced ranks run at the best rate that is left for them."""
        rates = self.problem.bytes_per_s
        n = len(placed)
        inner = max((float(rates[a, b]) for a in free for b in free if a != b), default=np.inf)
        out = [max((float(rates[a, b]) for b in free), default=np.inf) for a in placed]
        into = [max((float(rates[b, a]) for b in free), default=np.inf) for a in placed]
        total = 0.0
        for phase in self.problem.phases:
            slowest = 0.0
            for group in phase:
                seconds = 0.0
                for a, b in group.links:
                    if a < n and b < n:
                        rate = float(rates[placed[a], placed[b]])
                    else:
                        rate = out[a] if a < n else into[b] if b < n else inner
                    link = self.problem.latency_s + group.n_bytes / rate
                    seconds = max(seconds, link) if group.kind == "ring" else seconds + link
                slowest = max(slowest, seconds)
            total += slowest
        return total

    def _place(self, placed: tuple[int, ...], free: tuple[int, ...]) -> bool:
        if len(placed) == self.ranks:
            value = self.problem.seconds(placed)
            if value < self.value:
                self.value, self.best = value, list(placed)
            return True
        ends = []
        for node in free:
            rest = tuple(f for f in free if f != node)
            self.placements += 1
            ends.append((self.bound((*placed, node), rest), node, rest))
        for bound, node, rest in sorted(ends, key=lambda end: end[:2]):
            if bound >= self.value * (1.0 - 1e-12):
                break
            if self.clock.over or not self._place((*placed, node), rest):
                return False
        return True


def _every_node_bound(problem: RankProblem, ranks: int) -> float:
    """Where every node has a rank and every rank a link of a ring: the worst node's best link is one of them."""
    rates = np.where(np.eye(len(problem.bytes_per_s), dtype=bool), 0.0, problem.bytes_per_s)
    if ranks < len(rates):
        return 0.0
    worst = float(np.maximum(rates.max(axis=1), rates.max(axis=0)).min())
    total = 0.0
    for phase in problem.phases:
        rings = [group for group in phase if group.kind == "ring" and group.links]
        if {rank for group in rings for rank in group.ranks} == set(range(ranks)):
            total += problem.latency_s + min(group.n_bytes for group in rings) / worst
    return total


def _exchanged(problem: RankProblem, ranks: int, clock: Clock) -> list[int]:
    """The best of several starts, each improved by exchanges of two nodes until none helps."""
    nodes = len(problem.bytes_per_s)
    best: list[int] = list(range(nodes))
    value = problem.seconds(best)
    for start in range(_STARTS):
        now = list(np.random.default_rng(start).permutation(nodes)) if start else list(range(nodes))
        seconds, improved = problem.seconds(now), True
        while improved and not clock.over:
            improved = False
            for a, b in combinations(range(nodes), 2):
                if a >= ranks:
                    break
                now[a], now[b] = now[b], now[a]
                after = problem.seconds(now)
                if after < seconds * (1.0 - 1e-12):
                    seconds, improved = after, True
                else:
                    now[a], now[b] = now[b], now[a]
        if seconds < value:
            best, value = [int(node) for node in now], seconds
        if clock.over:
            break
    return best[:ranks]


def _annealed(problem: RankProblem, start: Sequence[int], clock: Clock) -> tuple[list[int], float]:
    """A map by annealing from another one, and its seconds; the same one every time.

    What is annealed is the sum over phases of a high power mean of their links' seconds, so that every slow link counts and not
    the slowest alone. The best map by the true seconds is kept.
    """
    rng = np.random.default_rng(0)
    nodes = len(problem.bytes_per_s)
    now = [*start, *(node for node in range(nodes) if node not in set(start))]
    links: list[
        tuple[int, int, int, list[list[float]]]
    ] = []  # phase, ranks, (seconds / scale)^power by nodes
    touching: list[list[int]] = [[] for _ in range(nodes)]
    scales: list[float] = []
    for number, phase in enumerate(problem.phases):
        scale = max((problem._group_s(group, now) for group in phase), default=0.0) or 1.0
        scales.append(scale)
        for group in phase:
            seconds = (problem.latency_s + group.n_bytes / problem.bytes_per_s) / scale
            power = (seconds**_POWER).tolist()
            for a, b in group.links:
                touching[a].append(len(links))
                touching[b].append(len(links))
                links.append((number, a, b, power))
    sums = [0.0] * len(scales)
    for number, a, b, power in links:
        sums[number] += power[now[a]][now[b]]

    def energy(totals: Sequence[float]) -> float:
        return sum(
            scale * float(total ** (1.0 / _POWER)) for scale, total in zip(scales, totals, strict=True)
        )

    best, value, held = list(now), problem.seconds(now), energy(sums)
    heat = _HOT * held
    swaps = rng.integers(0, nodes, (_MOVES, 2)).tolist()
    chances = np.log(rng.random(_MOVES)).tolist()
    for move, ((a, b), chance) in enumerate(zip(swaps, chances, strict=True)):
        if move % 256 == 0 and clock.over:
            break
        heat *= _COOLING
        if a == b:
            continue
        some = {*touching[a], *touching[b]}
        after = list(sums)
        for link in some:
            number, x, y, power = links[link]
            after[number] -= power[now[x]][now[y]]
        now[a], now[b] = now[b], now[a]
        for link in some:
            number, x, y, power = links[link]
            after[number] += power[now[x]][now[y]]
        there = energy([max(total, 0.0) for total in after])
        if there < held or (held - there) / heat > chance:
            sums, held = [max(total, 0.0) for total in after], there
            if (reached := problem.seconds(now)) < value:
                best, value = list(now), reached
        else:
            now[a], now[b] = now[b], now[a]
    ranks = len(start)
    return [int(node) for node in best[:ranks]], value
