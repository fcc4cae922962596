"""One shape: a tighter bound from its stages' budgets, then plans, priced by the schedule engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise
from math import comb

import numpy as np
from numpy.typing import NDArray

from planner.assemble import stage_seconds
from planner.assignment import UNEVEN, Assignment, Runs
from planner.engine import BlockTable
from planner.layout import Layout
from planner.ledger import Array
from planner.pipeline import saturated
from planner.place import Place, hops_s
from planner.schedule.engine import simulate
from planner.schedule.order import generator_of, make_order
from planner.solve.layerwise.devices import Device, Solved
from planner.solve.layerwise.settle import in_order
from planner.solve.layerwise.relaxation import path_factor
from planner.solve.mixed.members import Members, Option
from planner.solve.mixed.shapes import Shape
from planner.solve.mixed.stretch import TOGETHER, Stretch
from planner.specs.cluster import Cluster

__all__ = ["Found", "Hops", "Settler"]

_LEVELS = (
    0,
    TOGETHER,
    4 * TOGETHER,
    10**6,
)  # members of a class whose memory is looked at, one level after another
_MISSES = 8  # shares of the groups that are tried in vain before others are left to the gap
_FEW = 500  # partitions that are all tried
_ALIKE = 5e-3  # of a stage's time: no other member is tried for less
_MOVES = 4  # heaviest stages from which a layer is moved, and lightest stages to which


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A plan with its step time by the schedule engine, and what its stages work on a micro-batch."""

    step_s: float
    work_s: Array
    shape: Shape
    sizes: tuple[int, ...]
    assignment: Assignment
    layout: Layout


class Hops:
    """Seconds between places, remembered."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._known: dict[tuple[int, int], tuple[float, Place, Place]] = {}

    def __call__(self, stages: Sequence[Place]) -> Array:
        """As :func:`planner.place.hops_s`."""
        found = []
        for one, other in pairwise(stages):
            key = (id(one), id(other))
            if key not in self._known:
                self._known[key] = (float(hops_s(self.cluster, (one, other))[0]), one, other)
            found.append(self._known[key][0])
        return np.array(found)


class Settler:
    """Bounds and plans of one shape.

    Args:
        shape: the shape.
        groups: members of all node groups.
        order: kinds of the model's layers.
        schedule: name of the order.
        hops: seconds between places.
    """

    def __init__(
        self, shape: Shape, groups: Sequence[Members], order: tuple[str, ...], schedule: str, hops: Hops
    ) -> None:
        self.shape, self.groups, self.order, self.schedule, self.hops = shape, groups, order, schedule, hops
        self.kinds = groups[0].kinds
        self.stack = [self.kinds.index(kind) for kind in order]
        self.layers = np.array([float(order.count(kind)) for kind in self.kinds[:-3]])
        self.pp, self.m = shape.pp, shape.micro_batches
        self.seats = [groups[group] for group in shape.seats()]
        self._classes = {
            group: (shape.alike, self.m, groups[group].problem.cluster.devices // n)
            for group, n in zip(shape.order, shape.stages, strict=True)
        }
        self.factor = float(path_factor(schedule, self.pp, np.array([float(self.m)]))[0])
        generator = generator_of(schedule)
        assert generator.in_flight is not None
        depth = saturated(generator, self.pp, 1, np.array([float(self.m)]))
        self._flights = generator.in_flight(self.pp, depth, np.arange(self.pp)[:, None])[:, 0].tolist()
        self.bound_s, self.bounded, self.priced = shape.bound_s, False, -1

    def next_level(self) -> int:
        """How many members of a class the next bound looks at the memory of."""
        return next(n for n in _LEVELS if n > self.priced)

    def known(self, level: int) -> bool:
        """Whether the members of a level are priced."""
        return all(self.groups[group].knows(of, self.pp, level) for group, of in self._classes.items())

    # -- bounds --------------------------------------------------------------------------------------------------------

    def bound(self, below_s: float) -> None:
        """Raises ``bound_s``: no plan of the shape is faster; infinite where none is below a limit.

        For every number of layers on each group, with ``z`` what its dearest stage works on a micro-batch, ``W`` what all its stages
        do, and ``S`` the whole pipeline's: a stage takes ``m·z`` and its update, and the first micro-batch goes down and the last
        one up through the groups before it; the path of 1F1B that stays on it takes ``S + W_after + W + (m − p + a − 1)·z`` with
        ``a`` stages before the group (:mod:`planner.costs.pipeline_bounds`; the group's stages behind its dearest one work ``W``
        less what those up to it can); that of the first stage ends with its update; and see
        :func:`~planner.solve.layerwise.relaxation.path_factor`.
        """
        m, p = self.m, self.pp
        starts = np.cumsum([0, *self.shape.stages]).tolist()
        self.priced = self.next_level()
        self.stretches = [
            self._stretch(group, a, b)
            for group, a, b in zip(self.shape.order, starts, starts[1:], strict=False)
        ]
        self.shares = _compositions(len(self.stack), len(self.stretches))
        work_s, dearest_s, z = (
            np.stack([getattr(x, name)[n] for x, n in zip(self.stretches, self.shares.T, strict=True)])
            for name in ("work_s", "dearest_s", "dearest_work_s")
        )
        possible = np.isfinite(work_s).all(axis=0)
        self.shares, work_s, dearest_s, z = (
            self.shares[possible],
            *(x[:, possible] for x in (work_s, dearest_s, z)),
        )
        before_s = np.cumsum(work_s, axis=0) - work_s
        through_s = work_s.sum(axis=0)
        bounds_s = np.maximum(np.maximum(dearest_s, before_s + m * z).max(axis=0), through_s * self.factor)
        first, share = self.stretches[0], self.shares[:, 0]
        if m >= p:
            bounds_s = np.maximum(bounds_s, first.opening_s[share] + 2.0 * work_s[1:].sum(axis=0))
        update_s = first.passed_s[share] - work_s[0]
        for i, ahead in enumerate(starts[:-1]):
            if m > p - ahead:
                path_s = 2.0 * through_s - before_s[i] + (m - p + ahead - 1.0) * z[i]
                bounds_s = np.maximum(bounds_s, path_s + update_s * (i > 0))
        self.bounds_s = bounds_s
        lowest = int(np.argmin(bounds_s)) if len(bounds_s) else -1
        self.bound_s = max(self.bound_s, float(bounds_s[lowest])) if lowest >= 0 else np.inf
        self.bounded = self.bound_s >= below_s or all(
            stretch.final(n) for stretch, n in zip(self.stretches, self.shares[lowest].tolist(), strict=True)
        )

    def _stretch(self, group: int, a: int, b: int) -> Stretch:
        """The stages of a group, remembered for other shapes in which they stand alike."""
        members, of = self.groups[group], self._classes[group]
        ends, flights = tuple(self._ends(stage) for stage in range(a, b)), tuple(self._flights[a:b])
        if not self.priced:
            flights = (0.0,) * (b - a)  # which make no difference without limits of memory
        key = (of, self.pp if members.by_length or not a else 0, flights, ends, self.priced)
        if key not in members.stretches:
            members.stretches[key] = Stretch(members, of, self.pp, flights, ends, self.priced)
        return members.stretches[key]

    def _ends(self, stage: int) -> tuple[int, ...]:
        ends = zip(
            (len(self.kinds) - 3, len(self.kinds) - 2), (stage == 0, stage == self.pp - 1), strict=True
        )
        return tuple(end for end, here in ends if here)

    # -- plans ---------------------------------------------------------------------------------------------------------

    def plans(self, below_s: float) -> Iterator[Found]:
        """Plans that fit, each faster than a limit and the ones before: several partitions, then their neighbours."""
        tried: set[tuple[int, ...]] = set()
        best: Found | None = None
        rank = np.argsort(self.bounds_s, kind="stable").tolist()
        start, more, missed = 0, 1, 0
        while start < len(rank) and missed <= _MISSES:
            some = [at for at in rank[start : start + more] if self.bounds_s[at] < below_s]
            start, more = start + more, 2 * more
            missed += len(some)
            better = self._best([self._dealt(at) for at in some], tried, below_s)
            if not some:
                break
            if better is not None:
                best, below_s, missed = better, better.step_s, 0
                yield best
        if comb(len(self.stack) - 1, self.pp - 1) <= _FEW:
            better = self._best(self._every(), tried, below_s)
            if better is not None:
                best, below_s = better, better.step_s
                yield best
        while best is not None:
            better = self._best(self._neighbours(best), tried, below_s)
            if better is None:
                return
            best, below_s = better, better.step_s
            yield best

    def _best(
        self, partitions: Iterable[tuple[int, ...]], tried: set[tuple[int, ...]], below_s: float
    ) -> Found | None:
        """The best plan of some partitions that were not tried before; None where none is below a limit."""
        fresh = [sizes for sizes in dict.fromkeys(partitions) if sizes not in tried]
        tried.update(fresh)
        best = min(self._priced(fresh, below_s), key=lambda found: found.step_s, default=None)
        return best if best is not None and best.step_s < below_s else None

    def _dealt(self, at: int) -> tuple[int, ...]:
        """A partition with the shares of the groups that stand in some place."""
        shares = self.shares[at].tolist()
        return tuple(
            n for stretch, share in zip(self.stretches, shares, strict=True) for n in stretch.sizes(share)
        )

    def _every(self) -> Iterator[tuple[int, ...]]:
        """All partitions that leave no stage without layers."""
        layers = len(self.stack)
        for ends in combinations(range(1, layers), self.pp - 1):
            yield tuple(np.diff([0, *ends, layers]).tolist())

    def _neighbours(self, best: Found) -> Iterator[tuple[int, ...]]:
        """Partitions with one layer moved from a heavy stage to a light one."""
        rank = np.argsort(best.work_s, kind="stable").tolist()
        for heavy in rank[::-1][:_MOVES]:
            for light in rank[:_MOVES]:
                if heavy != light and best.sizes[heavy] > 0:
                    moved = list(best.sizes)
                    moved[heavy] -= 1
                    moved[light] += 1
                    yield tuple(moved)

    def _priced(self, partitions: Sequence[tuple[int, ...]], below_s: float) -> list[Found]:
        """The best strategies of every stage of some partitions, priced together."""
        built = [x for sizes in partitions if (x := self._built(sizes, below_s)) is not None]
        if not built:
            return []
        generator = generator_of(self.schedule)
        parts = [stage_seconds(table, layout, generator, 1.0) for _, _, layout, table in built]
        stages_s = [np.concatenate([part[0][op] for part in parts], axis=1) for op in range(2)]
        work_s = stages_s[0] + stages_s[1]
        tail_s = np.concatenate([part[2] for part in parts], axis=1)
        hop_s = np.stack([self.hops(assignment.stage_places()) for _, assignment, _, _ in built], axis=1)
        order = make_order(generator, self.pp, self.m, 1)
        steps_s = simulate(order, *stages_s, hop_s=hop_s, tail_s=tail_s).makespan_s
        return [
            Found(float(step_s), work_s, self.shape, sizes, assignment, layout)
            for step_s, work_s, (sizes, assignment, layout, _) in zip(steps_s, work_s.T, built, strict=True)
        ]

    def _built(
        self, sizes: tuple[int, ...], below_s: float
    ) -> tuple[tuple[int, ...], Assignment, Layout, BlockTable] | None:
        """A partition with its places and strategies; None where a stage has none that fit."""
        ends = np.cumsum(sizes).tolist()
        chosen: list[tuple[Option, Solved]] = []
        behind_s = 0.0
        for stage, (a, b) in enumerate(zip([0, *ends], ends, strict=False)):
            found = self._solved(stage, a, b, behind_s, below_s)
            if found is None:
                return None
            chosen.append(found)
            backward = (found[0].mesh.micro_batch_s - found[0].mesh["forward_s"]).min(axis=0)
            behind_s += float(backward[self.stack[a:b]].sum())
        assignment, columns = self._assignment(chosen, ends)
        layout = assignment.layout(self.order, self.pp, 1, UNEVEN)
        values = np.stack([option.mesh.values[s, :, kind] for option, s, kind in columns], axis=1)
        names = tuple(f"{self.kinds[kind]}/{i}" for i, (_, _, kind) in enumerate(columns[:-3]))
        table = BlockTable.compact((*names, *self.kinds[-3:]), values[:, :, None])
        return sizes, assignment, layout, table

    def _solved(
        self, stage: int, a: int, b: int, behind_s: float, below_s: float
    ) -> tuple[Option, Solved] | None:
        """The member and the strategies with which a stage is done with some layers first; None where that takes too long."""
        counts = [0] * (len(self.kinds) - 3)
        for kind in self.stack[a:b]:
            counts[kind] += 1
        device = Device(stage, (tuple(counts),), stage == 0, stage == self.pp - 1)
        best: tuple[Option, Solved] | None = None
        members, of = self.seats[stage], self._classes[self.seats[stage].group]
        bundle = members.bundle(of, self.pp, self.priced)
        if bundle is None:
            return None
        valid = [
            member
            for member in members.classes[of][: self.priced]
            if members.mesh(member, self.pp) is not None
        ]
        bounds = bundle.cost(a, b, self._flights[stage], self._ends(stage))
        for at in np.argsort(bounds, kind="stable").tolist():
            limit = below_s if best is None else best[1].seconds
            if bounds[at] >= limit * (1.0 if best is None else 1.0 - _ALIKE):
                break
            option = members.option(valid[at], self.pp)
            assert option is not None
            solved = option.costs.solve(device, behind_s)
            if solved is not None and solved.seconds < limit:
                best = option, solved
        return best

    def _assignment(
        self, chosen: Sequence[tuple[Option, Solved]], ends: Sequence[int]
    ) -> tuple[Assignment, list[tuple[Option, int, int]]]:
        """The chosen strategies as an assignment, and its columns as (option, strategy there, kind)."""
        runs: list[Runs] = []
        for (_, solved), a, b in zip(chosen, [0, *ends], ends, strict=False):
            runs.append(in_order(solved.runs[0], self.stack[a:b]))
        (first, opening), (last, closing) = chosen[0], chosen[-1]
        assert opening.embedding is not None
        assert closing.head is not None
        layers: dict[tuple[int, int], int] = {}
        options = {id(option): option for option, _ in chosen}
        for (option, _), mine in zip(chosen, runs, strict=True):
            for s, n in mine:
                layers[id(option), s] = layers.get((id(option), s), 0) + n
        for option, s in ((first, opening.embedding), (last, closing.head)):
            layers.setdefault((id(option), s), 0)
        rank = {key: index for index, key in enumerate(layers)}
        used = sorted(layers, key=lambda key: (-layers[key], rank[key]))
        number = {key: index for index, key in enumerate(used)}
        places = list(dict.fromkeys(id(option) for option, _ in chosen))
        assignment = Assignment(
            tuple(options[o].choices(s) for o, s in used),
            tuple(tuple((number[id(option), s], n) for s, n in mine) for (option, _), mine in zip(chosen, runs, strict=True)),
            number[id(first), opening.embedding],
            number[id(last), closing.head],
            tuple(options[o].place for o in places),
            tuple(places.index(o) for o, _ in used),
        )  # fmt: skip
        columns = [
            (options[used[s][0]], used[s][1], self.kinds.index(kind))
            for kind, s in assignment.columns(self.order)
        ]
        return assignment, columns


@lru_cache(maxsize=16)
def _compositions(total: int, parts: int) -> NDArray[np.int64]:
    """Every way to deal a number of layers to some groups, (ways, groups)."""
    grid = np.indices((total + 1,) * (parts - 1)).reshape(parts - 1, -1).T
    last = total - grid.sum(axis=1)
    kept: NDArray[np.int64] = np.concatenate([grid, last[:, None]], axis=1)[last >= 0]
    return kept
