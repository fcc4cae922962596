"""One shape: a tighter bound from its stages' budgets, then plans, priced by the schedule engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

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
from planner.solve.layerwise.stages import cut, cuts_within, smallest_limit
from planner.solve.mixed.members import Class, Members, Option
from planner.solve.mixed.shapes import Paths, Shape
from planner.specs.cluster import Cluster

__all__ = ["TOGETHER", "Found", "Hops", "Settler"]

TOGETHER = 16  # members of a class, the fastest first, that are priced together
_PRECISION = 1e-4  # relative, of a bound
_STEP = 0.01  # of a bound: by how much it is raised at first
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
        for one, other in zip(stages[:-1], stages[1:], strict=True):
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
        self._free = {group: self._without_memory(groups[group], of) for group, of in self._classes.items()}
        generator = generator_of(schedule)
        assert generator.in_flight is not None
        depth = saturated(generator, self.pp, 1, np.array([float(self.m)]))
        self.flights = generator.in_flight(self.pp, depth, np.arange(self.pp)[:, None])[:, 0].tolist()
        self._first = dict.fromkeys(self._classes, TOGETHER)
        least = [self._least(group) for group in shape.order]
        self._paths = Paths(self.m, shape.stages, least, self.layers)
        self._step_s, self._limit_s = _STEP * shape.bound_s, np.inf
        self.bound_s, self.tight = shape.bound_s, False

    def _without_memory(self, members: Members, of: Class) -> Array:
        """(members, layers + 1) seconds of a micro-batch in the layers up to each, at least."""
        each = np.array([member.seconds[self.stack] for member in members.classes[of]])
        return np.concatenate([np.zeros((len(each), 1)), np.cumsum(each, axis=1)], axis=1)

    # -- bounds --------------------------------------------------------------------------------------------------------

    def tighten(self, below_s: float) -> None:
        """Raises ``bound_s`` by more and more, until it is ``tight``: no plan of the shape is faster.

        Infinite where no plan is faster than a limit.
        """
        high_s = min(self.bound_s + self._step_s, below_s)
        if cuts_within(self._reach, self.pp, len(self.stack), high_s) is None:
            self.bound_s = high_s if high_s < below_s else np.inf
            self._step_s *= 2.0
            self.tight = high_s >= below_s
            return
        found = smallest_limit(self._reach, self.pp, len(self.stack), self.bound_s, high_s, _PRECISION)
        assert found is not None
        self._limit_s, self.tight = found[1], True
        low_s = self.m * self._paths.dearest_s
        work = smallest_limit(self._reach_of_work, self.pp, len(self.stack), low_s, found[1], _PRECISION)
        assert work is not None
        self.bound_s = max(self.bound_s, found[0], self._paths.bound_s(work[0] / self.m))

    def _least(self, group: int) -> Array:
        known = self.groups[group].classes[self._classes[group]]
        found: Array = np.min([member.seconds for member in known], axis=0)
        return found

    def _reach(self, stage: int, start: int, limit: float) -> int:
        return self._furthest(stage, start, limit, work_only=False)

    def _reach_of_work(self, stage: int, start: int, limit: float) -> int:
        return self._furthest(stage, start, limit, work_only=True)

    def _furthest(self, stage: int, start: int, limit: float, *, work_only: bool) -> int:
        """The furthest end of layers from ``start`` that some member holds within a limit."""
        members = self.seats[stage]
        group, free = members.group, self._free[members.group]
        ends = self._ends(stage)
        while True:
            first = self._first[group]
            bundle = members.bundle(self._classes[group], self.pp, first)
            best = start - 1
            if bundle is not None:
                best = bundle.reach(start, limit, self.flights[stage], ends, work_only=work_only)
            # The members that are not priced yet reach no further than they would without limits of memory.
            room = limit / self.m + free[first:, start] if first < len(free) else np.zeros(0)
            if not len(room) or not np.any(free[first:, min(best + 1, len(self.stack))] <= room):
                return best
            if best >= len(self.stack):
                return best
            self._first[group] = first + TOGETHER

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
        while True:
            sizes = self._partitions() if best is None else self._neighbours(best)
            fresh = [s for s in dict.fromkeys(sizes) if s not in tried]
            tried.update(fresh)
            better = min(self._priced(fresh, below_s), key=lambda found: found.step_s, default=None)
            if better is None or better.step_s >= below_s:
                return
            best, below_s = better, better.step_s
            yield best

    def _partitions(self) -> Iterator[tuple[int, ...]]:
        """Partitions worth a price: packed from the left, from the right, and between the two."""
        limit, layers = self._limit_s, len(self.stack)
        left = cut(self._reach, self.pp, layers, limit)
        right = self._from_the_right(limit)
        ends = (np.cumsum(left) + np.cumsum(right)) // 2
        yield tuple(left)
        yield tuple(right)
        yield tuple(np.diff([0, *ends]).tolist())

    def _from_the_right(self, limit: float) -> list[int]:
        """Layers per stage if every stage from the last one takes as many as a limit allows."""
        sizes, end = [0] * self.pp, len(self.stack)
        for stage in range(self.pp - 1, -1, -1):
            start = end
            while start > 0 and (stage == 0 or self._reach(stage, start - 1, limit) >= end):
                start -= 1
            sizes[stage], end = end - start, start
        return sizes

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
        first = self._first[members.group]
        bundle = members.bundle(of, self.pp, first)
        if bundle is None:
            return None
        valid = [
            member for member in members.classes[of][:first] if members.mesh(member, self.pp) is not None
        ]
        bounds = bundle.cost(a, b, self.flights[stage], self._ends(stage))
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
