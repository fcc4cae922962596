"""What all shapes of a problem stand on: the members of every node group, seconds between places, and stretches of stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np

from planner.engine.block_table import COMPACT, tabulate
from planner.ledger import Array
from planner.operators.baseline import block_order
from planner.pipeline.composer import saturated
from planner.pipeline.place import Place, hops_s
from planner.pipeline.transition import CHANGE, meets, transition
from planner.schedule.order import generator_of
from planner.solve.layerwise.solvers import Solver
from planner.solve.mixed.blend import Blend
from planner.solve.mixed.bundle import Bundle
from planner.solve.mixed.families import FREE, Ends
from planner.solve.mixed.members import Class, Members, Option
from planner.solve.mixed.shapes import Shape
from planner.solve.mixed.stretch import Stretch
from planner.specs.problem import Problem

__all__ = ["SCHEDULE", "Ground"]

SCHEDULE = "1f1b"


class Ground:
    """Everything that is priced once.

    Args:
        problem: the whole problem.
        solver: of the strategies of a stage.
        mixing: whether layers of one stage may be cut in different ways.
        ends: what embedding and head share.

    Raises:
        SpecError: a group has no mesh with the degrees that are fixed.
    """

    def __init__(self, problem: Problem, solver: Solver, *, mixing: bool = False, ends: Ends = FREE) -> None:
        self.problem, self.mixing, self.ends_alike = problem, mixing, ends.alike
        self.groups = [
            Members(problem, group, SCHEDULE, solver, mixing=mixing, ends=ends)
            for group in range(len(problem.cluster.groups))
        ]
        self.order = tuple(block_order(problem.model))
        self.kinds = self.groups[0].kinds
        self.stack = [self.kinds.index(kind) for kind in self.order]
        self._hops: dict[tuple[int, int], tuple[float, Place, Place]] = {}
        self._changes: dict[tuple[int, int], tuple[Array, Place, Place]] = {}
        self._stretches: dict[tuple[object, ...], Stretch] = {}
        self._blends: dict[tuple[int, int], Blend | None] = {}
        self._pairs: dict[tuple[int, ...], tuple[list[Blend], Bundle | None]] = {}

    def class_of(self, shape: Shape, group: int) -> Class:
        """The class of a group's members that a shape takes."""
        stages = shape.stages[shape.order.index(group)]
        return shape.alike, shape.micro_batches, self.groups[group].problem.cluster.devices // stages

    def ends(self, stage: int, pp: int) -> tuple[int, ...]:
        """Kinds of what a stage holds besides layers."""
        return (len(self.kinds) - 3,) * (stage == 0) + (len(self.kinds) - 2,) * (stage == pp - 1)

    def flights(self, shape: Shape) -> list[float]:
        """Micro-batches in flight of every stage."""
        generator = generator_of(SCHEDULE)
        assert generator.in_flight is not None
        depth = saturated(generator, shape.pp, 1, np.array([float(shape.micro_batches)]))
        found: list[float] = generator.in_flight(shape.pp, depth, np.arange(shape.pp)[:, None])[:, 0].tolist()
        return found

    def stretches(self, shape: Shape, priced: int) -> list[Stretch]:
        """The stages of every group; those that stand alike in several shapes are one."""
        flights, pp = self.flights(shape), shape.pp
        found, start = [], 0
        for group, n in zip(shape.order, shape.stages, strict=True):
            of, stages = self.class_of(shape, group), range(start, start + n)
            # Without limits of memory, it makes no difference how many are in flight.
            live = tuple(flights[stage] if priced else 0.0 for stage in stages)
            ends = tuple(self.ends(stage, pp) for stage in stages)
            length = pp if self.groups[group].by_length or not start else 0
            key = (group, of, length, live, ends, priced)
            if key not in self._stretches:
                self._stretches[key] = Stretch(self.groups[group], of, pp, live, ends, priced)
            found.append(self._stretches[key])
            start += n
        return found

    def blends(self, group: int, options: Sequence[Option]) -> tuple[list[Blend], Bundle | None]:
        """Every two of some options of a group that may be neighbours, and their bounds."""
        key = tuple(id(option) for option in options)
        if key not in self._pairs:
            found = [self._blend(one, other) for one, other in combinations(options, 2)]
            pairs = [blend for blend in found if blend is not None]
            problem = self.groups[group].problem
            bundle = Bundle(problem, [blend.mesh for blend in pairs], self.stack) if pairs else None
            self._pairs[key] = pairs, bundle
        return self._pairs[key]

    def _blend(self, one: Option, other: Option) -> Blend | None:
        key = id(one), id(other)
        if key not in self._blends:
            self._blends[key] = Blend(one, other) if meets(one.place, other.place) else None
        return self._blends[key]

    def change(self, one: Place, other: Place) -> Array:
        """Compact fields of a change between two places of a group."""
        key = id(one), id(other)
        if key not in self._changes:
            pricer = self.groups[one.group].uniform.pricer
            table = tabulate(transition(one, other), pricer, (CHANGE,), 1, COMPACT)
            self._changes[key] = table.values[:, 0, 0], one, other
        return self._changes[key][0]

    def hops_s(self, edges: Iterable[tuple[Place, Place]]) -> Array:
        """As :func:`planner.pipeline.place.hops_s`, remembered."""
        found = []
        for one, other in edges:
            key = (id(one), id(other))
            if key not in self._hops:
                self._hops[key] = (float(hops_s(self.problem.cluster, [(one, other)])[0]), one, other)
            found.append(self._hops[key][0])
        return np.array(found)
