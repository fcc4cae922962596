"""Plans of one shape: layers by the bounds, exact strategies per stage, and then the schedule engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise, product
from math import comb, prod
from typing import TypeAlias

import numpy as np

from planner.engine.block_table import BlockTable
from planner.ledger import Array
from planner.pipeline.assignment import Assignment, Runs
from planner.pipeline.layout import Layout
from planner.pipeline.place import Place
from planner.pipeline.step_time import stage_seconds
from planner.pipeline.transition import CHANGE
from planner.schedule.engine import simulate
from planner.schedule.order import generator_of, make_order
from planner.solve.layerwise.devices import Device, Goal, Solved
from planner.solve.layerwise.settle import in_order
from planner.solve.layerwise.strategies import Branch
from planner.solve.mixed.bounds import Bounds
from planner.solve.mixed.ground import SCHEDULE
from planner.solve.mixed.members import Option
from planner.solve.mixed.shapes import Shape

__all__ = ["Found", "Settler"]

Way: TypeAlias = tuple[Option, Solved]  # how a stage is done: a member, and its strategies

_Cell: TypeAlias = tuple[int, Branch]  # a place and a strategy there

_MISSES = 8  # shares of the groups that are tried in vain before others are left to the gap
_FEW = 500  # partitions, or combinations of stages' ways, that are all tried
_ALIKE = 5e-3  # of a stage's time: no other member is tried for less
_TOGETHER = 6  # members of which every two are tried side by side in a stage
_BETWEEN = (0.9, 0.8, 0.65, 0.5, 0.3, 0.15)  # of the way from what updates soonest to what is fastest
_OTHERS = 2  # members of which stages that update sooner are
_PASSED = (0.5, 0.25, 0.0)  # of the micro-batches, that paths pass the first stage with; once at least
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


class Settler:
    """Plans of one shape whose bounds are final.

    Args:
        bounds: of the shape.
        late: whether the time is over: what is not priced by then is left.
    """

    def __init__(self, bounds: Bounds, late: Callable[[], bool] = lambda: False) -> None:
        self.late = late
        self.bounds, self.shape, self.ground = bounds, bounds.shape, bounds.ground
        self.pp, self.m = self.shape.pp, self.shape.micro_batches
        self.kinds, self.order, self.stack = self.ground.kinds, self.ground.order, self.ground.stack
        self.seats = [self.ground.groups[group] for group in self.shape.seats()]
        self._flights = self.ground.flights(self.shape)
        members = (
            self.ground.groups[g].classes[self.ground.class_of(self.shape, g)] for g in self.shape.order
        )
        partitions = comb(len(self.stack) + self.pp - 1, self.pp - 1)
        ways = [len(some) ** 2 if self.ground.mixing else len(some) for some in members]
        self._few = partitions * prod(ways) <= _FEW

    def any(self, below_s: float) -> Found | None:
        """The best plan of the most promising partition; None where none is below a limit."""
        return self._best([self._dealt(int(np.argmin(self.bounds.shares_s)))], set(), below_s)

    def plans(self, below_s: float) -> Iterator[Found]:
        """Plans that fit, each faster than a limit and the ones before: several partitions, then their neighbours."""
        tried: set[tuple[int, ...]] = set()
        best: Found | None = None
        rank = np.argsort(self.bounds.shares_s, kind="stable").tolist()
        start, more, missed = 0, 1, 0
        while start < len(rank) and missed <= _MISSES:
            some = [at for at in rank[start : start + more] if self.bounds.shares_s[at] < below_s]
            start, more = start + more, 2 * more
            missed += len(some)
            better = self._best([self._dealt(at) for at in some], tried, below_s)
            if not some:
                break
            if better is not None:
                best, below_s, missed = better, better.step_s, 0
                yield best
        if self._few:
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
        best = min(self.priced(fresh, below_s), key=lambda found: found.step_s, default=None)
        return best if best is not None and best.step_s < below_s else None

    def _dealt(self, at: int) -> tuple[int, ...]:
        """A partition with the shares of the groups that stand in some place."""
        shares = self.bounds.shares[at].tolist()
        return tuple(
            n
            for stretch, share in zip(self.bounds.stretches, shares, strict=True)
            for n in stretch.sizes(share)
        )

    def _every(self) -> Iterator[tuple[int, ...]]:
        """All partitions that leave no stage without work: embedding and head may stand alone."""
        layers = len(self.stack)
        for ends in combinations_with_replacement(range(layers + 1), self.pp - 1):
            sizes = np.diff([0, *ends, layers]).tolist()
            if all(sizes[1:-1]):
                yield tuple(sizes)

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

    def priced(self, partitions: Sequence[tuple[int, ...]], below_s: float) -> list[Found]:
        """Plans of some partitions, priced together."""
        built = [plan for sizes in partitions if not self.late() for plan in self._built(sizes, below_s)]
        if not built:
            return []
        generator = generator_of(SCHEDULE)
        parts = [
            stage_seconds(table, layout, generator, np.ones((layout.pp, 1))) for _, _, layout, table in built
        ]
        stages_s = [np.concatenate([part[0][op] for part in parts], axis=1) for op in range(2)]
        work_s = stages_s[0] + stages_s[1]
        tail_s = np.concatenate([part[2] for part in parts], axis=1)
        between = [pairwise(assignment.stage_places()) for _, assignment, _, _ in built]
        hops = [self.ground.hops_s((one[-1], other[0]) for one, other in edges) for edges in between]
        order = make_order(generator, self.pp, self.m, 1)
        steps_s = simulate(order, *stages_s, hop_s=np.stack(hops, axis=1), tail_s=tail_s).makespan_s
        return [
            Found(float(step_s), work_s, self.shape, sizes, assignment, layout)
            for step_s, work_s, (sizes, assignment, layout, _) in zip(steps_s, work_s.T, built, strict=True)
        ]

    def _built(
        self, sizes: tuple[int, ...], below_s: float
    ) -> Iterator[tuple[tuple[int, ...], Assignment, Layout, BlockTable]]:
        """A partition with places and strategies: each stage's fastest, and others that may do better together."""
        ends = np.cumsum(sizes).tolist()
        ways: list[list[Way]] = []
        behind_s = 0.0  # what follows a stage's last backward: those before it, on the way up, and the first one's update
        for stage, (a, b) in enumerate(zip([0, *ends], ends, strict=False)):
            before = ways[-1][0][0].place if ways else None
            found = self._ways(stage, a, b, before, behind_s, below_s)
            if not found:
                return
            ways.append(found)
            option, solved = found[0]
            passed_s, work_s = _passes_s(option, solved, self.ground.ends(stage, self.pp))
            behind_s += passed_s
            if before is None:
                behind_s += solved.seconds - self.m * work_s
            else:
                behind_s += float(self.ground.hops_s([(before, option.place)])[0])
        sooner = self._sooner(ways, behind_s, ends) if self.pp > 1 else ()
        for chosen in _together(ways, sooner, ends_alike=self.ground.ends_alike):
            assignment, values = self._assignment(chosen, ends)
            layout = assignment.layout(self.order, self.pp)
            names = tuple(f"{kind}/{i}" for i, (kind, _) in enumerate(assignment.columns(self.order)[:-3]))
            yield (
                sizes,
                assignment,
                layout,
                BlockTable.compact((*names, *self.kinds[-3:]), values[:, :, None]),
            )

    def _ways(
        self, stage: int, a: int, b: int, before: Place | None, behind_s: float, below_s: float
    ) -> list[Way]:
        """Members with their best strategies for some layers, the fastest first; none where all take too long."""
        device = self._device(stage, a, b)
        found: list[Way] = []
        limit_s = below_s
        for bound_s, option in self.options(stage, a, b):
            if bound_s >= limit_s or (found and self.late()):
                break
            up_s = behind_s + (float(self.ground.hops_s([(before, option.place)])[0]) if before else 0.0)
            solved = option.costs.solve(device, up_s)
            if solved is not None and solved.seconds < below_s:
                found.append((option, solved))
                if not self._few:
                    limit_s = min(limit_s, solved.seconds * (1.0 - _ALIKE))
        found.sort(key=lambda way: way[1].seconds)
        return found + [way for option, _ in found[:1] if not stage for way in self._quicker(option, device)]

    def _device(self, stage: int, a: int, b: int) -> Device:
        """A stage that holds the layers ``[a, b)``."""
        counts = [0] * (len(self.kinds) - 3)
        for kind in self.stack[a:b]:
            counts[kind] += 1
        return Device(stage, (tuple(counts),), stage == 0, stage == self.pp - 1)

    def _sooner(
        self, ways: Sequence[Sequence[Way]], behind_s: float, ends: Sequence[int]
    ) -> Iterator[Sequence[Way]]:
        """Combinations whose first and last stage work longer and update sooner than the fastest ones, some more and some less.

        Args:
            ways: of every stage, the fastest first.
            behind_s: what follows the last stage's last backward, where all are the fastest.
            ends: number of the layer behind each stage.
        """
        first, last = self._device(0, 0, ends[0]), self._device(self.pp - 1, ends[-2], ends[-1])
        opening: dict[tuple[object, ...], Way] = {}
        closing: dict[tuple[object, ...], Way] = {}
        for option in list(dict.fromkeys(option for option, _ in ways[0]))[:_OTHERS]:
            for way in self._between(option, first):
                opening.setdefault(_same(way), way)
        for option in list(dict.fromkeys(option for option, _ in ways[-1]))[:_OTHERS]:
            for part in (1.0, *_BETWEEN, 0.0):
                solved = option.costs.solve(last, part * behind_s)
                if solved is not None:
                    closing.setdefault(_same((option, solved)), (option, solved))
        for one, other in product(opening.values(), closing.values()):
            yield [one, *(some[0] for some in ways[1:-1]), other]

    def _between(self, option: Option, device: Device) -> Iterator[Way]:
        """Strategies of the first stage between those that are the fastest in a step and those that pass and update soonest.

        Both are ends of a front of work ``T`` and what follows it; ``max(T + after, m·T + x)`` is least in between, where the
        two meet.
        """
        costs, m = option.costs, float(self.m)
        fast, soon = costs.solve(device, 0.0), costs.solve(device, Goal((1.0,), (1.0,)))
        if fast is None or soon is None:
            return
        yield option, fast
        works = [_passes_s(option, way, self.ground.ends(0, self.pp))[1] for way in (fast, soon)]
        once = [fast.seconds - (m - 1.0) * works[0], soon.seconds]  # a micro-batch and what follows it
        for part in _BETWEEN:
            work_s, after_s = (part * a + (1.0 - part) * b for a, b in (works, once))
            solved = costs.solve(device, Goal((1.0,), (1.0,), beside=(m, after_s - m * work_s)))
            if solved is not None:
                yield option, solved
        yield option, soon

    def _quicker(self, option: Option, device: Device) -> Iterator[Way]:
        """Strategies of the first stage that work longer and update sooner: a path that stays on another stage passes it less
        often and ends with its update."""
        for part in _PASSED:
            passes = (max(part * self.m, 1.0),)
            solved = option.costs.solve(device, Goal(passes, passes))
            if solved is not None:
                yield option, solved

    def options(self, stage: int, a: int, b: int) -> list[tuple[float, Option]]:
        """Members that a stage may take for the layers ``[a, b)``, by what they take at least."""
        members = self.seats[stage]
        of = self.ground.class_of(self.shape, members.group)
        bundle = members.bundle(of, self.pp, self.bounds.level)
        if bundle is None:
            return []
        every = (members.option(member, self.pp) for member in members.classes[of][: self.bounds.level])
        valid = [option for option in every if option is not None]
        flight, ends = self._flights[stage], self.ground.ends(stage, self.pp)
        bounds = bundle.cost(a, b, flight, ends).tolist()
        if self.ground.mixing:
            some = (
                valid if self._few else [valid[at] for at in bundle.together(a, b, flight, ends, _TOGETHER)]
            )
            blends, of_blends = self.ground.blends(members.group, some)
            if of_blends is not None:
                valid = [*valid, *blends]
                bounds += of_blends.cost(a, b, flight, ends).tolist()
        return [(bounds[at], valid[at]) for at in np.argsort(bounds, kind="stable").tolist()]

    def _assignment(self, chosen: Sequence[Way], ends: Sequence[int]) -> tuple[Assignment, Array]:
        """The chosen strategies as an assignment, and the values of its columns, (fields, columns)."""
        runs: list[Runs] = []
        before: Place | None = None
        for (option, solved), a, b in zip(chosen, [0, *ends], ends, strict=False):
            stack = self.stack[a:b]
            runs.append(in_order(option.ordered(solved, stack, before), stack))
            before = option.place_of(runs[-1][-1][0] if runs[-1] else _end(solved))
        (first, opening), (last, closing) = chosen[0], chosen[-1]
        assert opening.embedding is not None
        assert closing.head is not None
        # A strategy at a place is one, whichever option it comes from.
        layers: dict[_Cell, int] = {}
        priced: dict[_Cell, Array] = {}

        def cell(option: Option, s: int) -> _Cell:
            key = id(option.place_of(s)), option.mesh.branches[s]
            priced.setdefault(key, option.mesh.values[s])
            places.setdefault(key[0], option.place_of(s))
            return key

        places: dict[int, Place] = {}
        stages = [
            [(cell(option, s), n) for s, n in mine] for (option, _), mine in zip(chosen, runs, strict=True)
        ]
        embedding, head = cell(first, opening.embedding), cell(last, closing.head)
        for mine in stages:
            for key, n in mine:
                layers[key] = layers.get(key, 0) + n
        for key in (embedding, head):
            layers.setdefault(key, 0)
        used = sorted(layers, key=lambda key: -layers[key])
        number = {key: index for index, key in enumerate(used)}
        branches = self.seats[0].uniform.branches
        at = list(places)
        assignment = Assignment(
            tuple(branches.recipe(*branch) for _, branch in used),
            tuple(tuple((number[key], n) for key, n in mine) for mine in stages),
            number[embedding],
            number[head],
            tuple(places.values()),
            tuple(at.index(place) for place, _ in used),
        )  # fmt: skip
        changes = [
            self.ground.change(assignment.places[a], assignment.places[b])
            for a, b in assignment.kinds_of_change()
        ]
        values = [
            changes[s - len(used)] if kind == CHANGE else priced[used[s]][:, self.kinds.index(kind)]
            for kind, s in assignment.columns(self.order)
        ]
        return assignment, np.stack(values, axis=1)


def _same(way: Way) -> tuple[object, ...]:
    """Equal for ways that are."""
    option, solved = way
    return id(option), solved.runs, solved.embedding, solved.head


def _together(
    ways: Sequence[Sequence[Way]], besides: Iterable[Sequence[Way]], *, ends_alike: bool
) -> Iterator[Sequence[Way]]:
    """Combinations of every stage's ways: all where they are few, otherwise the first ones with at most one other; and some
    besides.

    Where embedding and head are cut alike, those of the first and of the last stage go together.
    """

    def runs(chosen: Sequence[Way]) -> bool:
        return not ends_alike or _cut(chosen[0], "embedding") == _cut(chosen[-1], "head")

    yield from filter(runs, besides)
    if prod(len(some) for some in ways) <= _FEW:
        yield from filter(runs, product(*ways))
        return
    first = [some[0] for some in ways]
    if ends_alike:
        pairs = ([a, *first[1:-1], b] for a, b in product(ways[0], ways[-1]))
        first = next(filter(runs, pairs), first)
    every = [
        [*first[:stage], way, *first[stage + 1 :]] for stage, some in enumerate(ways) for way in some[1:]
    ]
    yield from filter(runs, [first, *every])


def _cut(way: Way, end: str) -> tuple[float, float]:
    """Degrees of a stage's embedding or head."""
    option, solved = way
    row = option.place_of(getattr(solved, end)).row
    return row["tp"], row["cp"]


def _end(solved: Solved) -> int:
    """The strategy of an embedding or a head that has a stage for itself."""
    end = solved.embedding if solved.embedding is not None else solved.head
    assert end is not None
    return end


def _passes_s(option: Option, solved: Solved, ends: Sequence[int]) -> tuple[float, float]:
    """Backward seconds of a micro-batch, and all of them, in a stage that is done in some way."""
    mesh = option.mesh
    blocks = [(s, kind, n) for kind, runs in enumerate(solved.runs[0]) for s, n in runs]
    own = {len(mesh.kinds) - 3: solved.embedding, len(mesh.kinds) - 2: solved.head}
    blocks += [(s, kind, 1) for kind, s in own.items() if kind in ends and s is not None]
    work_s = sum(n * float(mesh.micro_batch_s[s, kind]) for s, kind, n in blocks)
    return work_s - sum(n * float(mesh["forward_s"][s, kind]) for s, kind, n in blocks), work_s
