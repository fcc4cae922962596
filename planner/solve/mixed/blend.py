"""Two ways to cut work side by side in one stage: layers of either, and the change of degrees between them.

A change and the change back cost as much, in a forward and a backward pass together, so layers of each way stand together: of any
order that has both, the one that joins them pays a single change and no order pays less. How many layers go which way is then the
count problem of their strategies, those of both ways side by side. Embedding and head go either way too; where a stage holds
both, they settle how many changes there are, and which of their passes sends more.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from planner.engine.block_table import COMPACT, tabulate
from planner.ledger import Array
from planner.pipeline.assignment import Runs
from planner.pipeline.place import Place
from planner.pipeline.transition import CHANGE, communicators, transition
from planner.solve.layerwise.devices import Device, DeviceCosts, DeviceGroup, Goal, Solved
from planner.solve.mixed.members import Option, side_by_side

__all__ = ["Blend"]

_BLOCK, _RECOMPUTED = (COMPACT.index(name) for name in ("block_bytes", "recomputed_bytes"))


class Blend(Option):
    """Two members whose layers may be neighbours.

    Attributes:
        places: of the one and of the other.
        change_s: forward and backward seconds of a change, of a micro-batch.
    """

    def __init__(self, one: Option, other: Option) -> None:
        self.parts = one, other
        pricer = one.members.uniform.pricer
        change = tabulate(transition(one.place, other.place), pricer, (CHANGE,), 1, COMPACT)
        self.change_s = (float(change["forward_s"][0, 0]), float(change["backward_s"][0, 0]))
        mesh = side_by_side([one.mesh, other.mesh], communicators([one.place, other.place]))
        values = mesh.values
        # While a change is at work, a device holds what a block at work would.
        pieces = float(change["block_bytes"][0, 0]) - values[:, _RECOMPUTED]
        values[:, _BLOCK] = np.maximum(values[:, _BLOCK], pieces)
        super().__init__(one.members, mesh)
        self.places = one.place, other.place

    def way(self, strategy: int) -> int:
        """Which of the two a strategy belongs to."""
        return int(strategy >= len(self.parts[0].mesh.branches))

    def place_of(self, strategy: int) -> Place:
        """Where a strategy's layers are."""
        return self.places[self.way(strategy)]

    @cached_property
    def costs(self) -> DeviceCosts:
        """Costs and budgets of stages that hold layers of both."""
        return _Costs(self)

    def ordered(self, solved: Solved, kinds: Sequence[int], before: Place | None) -> list[Runs]:
        """Runs of every kind in the order that changes least, and begins where the stage before ends, if it may."""
        best: tuple[float, list[Runs]] | None = None
        for first in (0, 1):
            runs = [tuple(sorted(mine, key=lambda run: self.way(run[0]) != first)) for mine in solved.runs[0]]
            left = [[self.way(s) for s, n in mine for _ in range(n)] for mine in runs]
            ways = [left[kind].pop(0) for kind in kinds]
            if solved.embedding is not None:
                ways.insert(0, self.way(solved.embedding))
            if solved.head is not None:
                ways.append(self.way(solved.head))
            changes = sum(a != b for a, b in itertools.pairwise(ways))
            away = before is not None and self.places[ways[0]] is not before
            if best is None or changes + 0.5 * away < best[0]:
                best = changes + 0.5 * away, runs
        assert best is not None
        return best[1]


class _Costs(DeviceCosts):
    """The best strategies of stages that hold layers of both ways, whose changes they pay."""

    def __init__(self, blend: Blend) -> None:
        members = blend.members
        super().__init__(members.problem, blend.mesh, members.schedule, 1, members.solver)
        self.blend = blend
        self._change_s = blend.change_s
        self._ends: dict[int, int] = {}
        if members.ends.alike:
            # An end that another way beats may be wanted all the same: where the other end has none better than its own.
            one, other = blend.parts
            shift = len(one.mesh.branches)
            self.fronts = list(self.fronts)
            for kind in (len(self.mesh.kinds) - 3, len(self.mesh.kinds) - 2):
                self.fronts[kind] = [*one.costs.fronts[kind], *(shift + s for s in other.costs.fronts[kind])]
            self.useful = sorted({s for front in self.fronts for s in front})

    def _solve(self, device: Device, goal: Goal) -> Solved | None:
        best: Solved | None = None
        embedding, head = len(self.mesh.kinds) - 3, len(self.mesh.kinds) - 2
        there = self.blend.change_s
        ways: list[tuple[tuple[float, float], dict[int, int]]] = [(there, {})]
        if device.embedding and device.head:
            both = (sum(there), sum(there))
            ways = [(both, {embedding: a, head: a}) for a in (0, 1)]
            if not self.blend.members.ends.alike:
                # What one way sends forward, the other sends backward.
                ways += [(there, {embedding: 0, head: 1}), (there[::-1], {embedding: 1, head: 0})]
        for self._change_s, self._ends in ways:
            found = super()._solve(device, goal)
            if found is not None and (best is None or found.seconds < best.seconds):
                best = found
        return best

    def _sums(self, groups: Sequence[DeviceGroup], goal: Goal) -> tuple[Array, Array]:
        offset, sums = super()._sums(groups, goal)
        forward_s, backward_s = self._change_s
        passed_s = np.full(len(offset), goal.forwards[0] * forward_s + goal.backwards[0] * backward_s)
        if goal.after:
            # What a change takes hides traffic too: gradients beside the last backward, weights beside the first forward.
            gradients, weights = self._buckets(groups)
            hides = itertools.product(
                (0.0, (1.0 - gradients) * backward_s), (0.0, (1.0 - weights) * forward_s)
            )
            passed_s[:4] -= [*map(sum, hides)]
        if goal.beside is not None:
            passed_s[-1] = goal.beside[0] * (forward_s + backward_s)
        return offset + passed_s, sums

    def _small(self, groups: Sequence[DeviceGroup], limit: float) -> list[list[int]]:
        small = super()._small(groups, limit)
        return [
            [s for s in some if self._ends.get(group.kind) in (None, self.blend.way(s))]
            for group, some in zip(groups, small, strict=True)
        ]
