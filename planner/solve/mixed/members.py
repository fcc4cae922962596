"""How a stage may be cut on one node group: every mesh of a stage with every prefix, priced by the engine on that group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np

from planner.engine.block_table import COMPACT, tabulate
from planner.ledger import Array
from planner.pipeline.assignment import Runs
from planner.pipeline.place import Place, of_group
from planner.solve.layerwise.devices import DeviceCosts, Solved
from planner.solve.layerwise.solvers import Solver
from planner.solve.layerwise.strategies import Mesh, Strategies
from planner.solve.mixed.bundle import Bundle
from planner.solve.mixed.families import FREE, Ends
from planner.solve.space import Choice, Rows
from planner.solve.tables import BranchTables
from planner.solve.uniform import UniformSearch
from planner.specs.problem import Problem

_ANY = 2  # stages, where their number makes no difference
_LONG = 8 * _ANY  # stages, by which that is judged

__all__ = ["ALIKE", "Class", "Member", "Members", "Option", "side_by_side"]

ALIKE = ("adaptation", "precision", "optimizer")
"""Slots whose choice is common to all stages: what is computed does not depend on where."""

Class: TypeAlias = tuple[tuple[str, ...], int, int]
"""Choices of the slots that are alike, micro-batches, devices of a stage."""


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A prefix and a row: one way to cut a stage's work.

    ``seconds`` is what a micro-batch takes in one block of each kind at least (no recompute); the boundary is left out.
    ``least_s`` is what it takes in any 0, 1, … neighbouring layers.
    """

    prefix: int
    row: int
    seconds: Array
    least_s: Array


class Option:
    """A member in a pipeline of some length, with its strategies."""

    def __init__(self, members: Members, mesh: Mesh) -> None:
        self.members, self.mesh = members, mesh
        self.place = Place(members.problem, members.group, mesh.recipe, mesh.row)

    def place_of(self, strategy: int) -> Place:
        """Where a strategy's layers are."""
        return self.place

    def ordered(self, solved: Solved, kinds: Sequence[int], before: Place | None) -> Sequence[Runs]:
        """Runs of every kind in the order of their layers; ``kinds`` of all layers, ``before`` the place of the layer before."""
        return solved.runs[0]

    @cached_property
    def costs(self) -> DeviceCosts:
        """Costs and budgets of stages that are cut so."""
        members = self.members
        return DeviceCosts(members.problem, self.mesh, members.schedule, 1, members.solver)

    def choices(self, strategy: int) -> Mapping[str, Choice]:
        """The additive choices of one of its strategies."""
        return self.members.uniform.branches.recipe(*self.mesh.branches[strategy])


class Members:
    """All members of one node group.

    Args:
        problem: the whole problem.
        group: number of the node group.
        schedule: name of the order.
        solver: of strategies.
        mixing: whether layers of one stage may be cut in different ways.
        ends: what embedding and head share.
    """

    def __init__(
        self,
        problem: Problem,
        group: int,
        schedule: str,
        solver: Solver,
        *,
        mixing: bool = False,
        ends: Ends = FREE,
    ) -> None:
        self.group, self.schedule, self.solver, self.mixing = group, schedule, solver, mixing
        self.ends, self.problem = ends, of_group(problem, group)
        self.uniform = UniformSearch(self.problem, 1, lambda batch: [])
        self.kinds = self.uniform.kinds
        self.classes: dict[Class, list[Member]] = defaultdict(list)
        self.rejected: dict[str, int] = defaultdict(int)
        self._prefixes: list[dict[str, Choice]] = []
        self._meshes: dict[tuple[int, int], Mesh | None] = {}
        self._options: dict[tuple[int, int], Option | None] = {}
        self._free: dict[Class, Array] = {}
        self._bundles: dict[tuple[Class, int, int, bool], Bundle | None] = {}
        made: dict[tuple[str, ...], object] = {}
        space = self.uniform.space
        mesh = space.rows.context(self.problem, {}).mesh
        for recipe in space.prefixes():
            self._add(recipe, replace(space.rows.context(self.problem, space.knobs(recipe)), mesh=mesh), made)
        for members in self.classes.values():
            members.sort(key=lambda member: (float(member.seconds.sum()), member.prefix, member.row))
        self.by_length = bool(self.classes) and self._depends_on_length()

    def _add(self, recipe: dict[str, Choice], whole, made) -> None:  # type: ignore[no-untyped-def]
        """The members of one prefix."""
        active = np.ones(len(whole.micro_batch_size), dtype=bool)
        for slot, choice in recipe.items():
            technique = choice.technique
            if (
                technique is not None
                and technique.active is not None
                and slot not in self.uniform.space.fixed
            ):
                active &= technique.active(whole)
        open_ = np.flatnonzero(active)
        faults = self.uniform.faults(recipe, whole.take(open_))
        for index, reason in enumerate(faults.reasons):
            self.rejected[reason] += int((faults.first == index).sum())
        open_ = open_[faults.first < 0]
        if not len(open_):
            return
        ctx = whole.take(open_)
        ledger = self.uniform.ledger(recipe, whole, made).take(open_, ctx.mesh.counterpart)
        table = tabulate(ledger, self.uniform.pricer, self.kinds, len(open_), COMPACT)
        seconds = (table["forward_s"] + table["backward_s"] + table["weight_s"])[:-1].T
        ranks = ctx.mesh.tp * ctx.mesh.cp * ctx.mesh.dp
        alike = tuple(recipe[slot].value for slot in ALIKE)
        least_s = _windows(seconds[:, [self.kinds.index(kind) for kind in self.uniform.order]])
        for place, row in enumerate(open_.tolist()):
            key = (alike, round(float(ctx.micro_batches[place])), round(float(ranks[place])))
            self.classes[key].append(Member(len(self._prefixes), row, seconds[place], least_s[place]))
        self._prefixes.append(recipe)

    # -- with strategies -----------------------------------------------------------------------------------------------

    def price(self, wanted: Iterable[tuple[Member, int]]) -> None:
        """Prices the strategies of members in pipelines of some lengths, those of one prefix together."""
        by_prefix: dict[int, dict[tuple[int, int], tuple[Member, int]]] = defaultdict(dict)
        for member, pp in wanted:
            key = self._key(member, pp)
            if key not in self._meshes:
                by_prefix[member.prefix][key] = member, key[1]
        for prefix, pairs in by_prefix.items():
            meshes = self._priced(self._prefixes[prefix], list(pairs.values()))
            self._meshes.update(zip(pairs, meshes, strict=True))

    def knows(self, of: Class, pp: int, first: int) -> bool:
        """Whether the first members of a class are priced."""
        return all(self._key(member, pp) in self._meshes for member in self.classes[of][:first])

    def mesh(self, member: Member, pp: int) -> Mesh | None:
        """A member's strategies; None where none is valid."""
        key = self._key(member, pp)
        if key not in self._meshes:
            self.price([(member, pp)])
        return self._meshes[key]

    def option(self, member: Member, pp: int) -> Option | None:
        """A member as it is in a pipeline of some length; None where no strategy is valid."""
        if (id(member), pp) not in self._options:
            mesh = self.mesh(member, pp)
            if mesh is not None:
                mesh = replace(mesh, row={**mesh.row, "pp": float(pp)})
            self._options[id(member), pp] = None if mesh is None else Option(self, mesh)
        return self._options[id(member), pp]

    def free_s(self, of: Class, first: int) -> Array:
        """What the members behind the first ones take for a micro-batch in 0, 1, … layers, without limits of memory."""
        if of not in self._free:
            each = np.array([member.least_s for member in self.classes[of]])
            self._free[of] = np.minimum.accumulate(each[::-1], axis=0)[::-1]
        free = self._free[of]
        return free[first] if first < len(free) else np.full(free.shape[1], np.inf)

    def freest_s(self, of: Class) -> Array:
        """What any members side by side take for a micro-batch in 0, 1, … layers, without limits of memory."""
        least = np.min([member.seconds for member in self.classes[of]], axis=0)
        found: Array = _windows(least[None, [self.kinds.index(kind) for kind in self.uniform.order]])[0]
        return found

    def bundle(self, of: Class, pp: int, first: int) -> Bundle | None:
        """The bounds of the first members of a class; None where none of them has a valid strategy."""
        return self._bundle(of, pp, first, mixed=False)

    def mixture(self, of: Class, pp: int, first: int) -> Bundle | None:
        """The bounds of stages whose layers are cut as any members cut them; those behind the first ones, if there are any, as
        if they held nothing. What a change between neighbours takes is left out."""
        return self._bundle(of, pp, first, mixed=True)

    def _bundle(self, of: Class, pp: int, first: int, *, mixed: bool) -> Bundle | None:
        key = of, self._length(pp), first, mixed
        if key not in self._bundles:
            members = self.classes[of][:first]
            self.price((member, pp) for member in members)
            meshes = [mesh for mesh in (self.mesh(member, pp) for member in members) if mesh is not None]
            stack = [self.kinds.index(kind) for kind in self.uniform.order]
            if mixed and meshes:
                behind = self.classes[of][first:]
                free = [_weightless(meshes[0], np.min([m.seconds for m in behind], axis=0))] if behind else []
                meshes = [side_by_side([*meshes, *free], min(mesh.communicators for mesh in meshes))]
            self._bundles[key] = Bundle(self.problem, meshes, stack) if meshes else None
        return self._bundles[key]

    def _length(self, pp: int) -> int:
        """A pipeline's length, as far as it makes a difference."""
        return pp if self.by_length or pp == 1 else _ANY

    def _key(self, member: Member, pp: int) -> tuple[int, int]:
        return id(member), self._length(pp)

    def _depends_on_length(self) -> bool:
        """Whether stacks, models or the network between the ends make a stage's price depend on how many there are, beyond what
        is in flight: of a member on every number of ranks, in as many stages as devices allow, and in more on several groups."""
        by_ranks = {ranks: members[0] for (_, _, ranks), members in reversed(self.classes.items())}
        by_prefix: dict[int, list[tuple[Member, int]]] = defaultdict(list)
        for ranks, member in by_ranks.items():
            most = self.problem.cluster.devices // ranks
            by_prefix[member.prefix] += [(member, pp) for pp in {most, _LONG} if pp > _ANY]
        return any(self._differs(self._prefixes[prefix], pairs) for prefix, pairs in by_prefix.items())

    def _differs(self, recipe: dict[str, Choice], pairs: Sequence[tuple[Member, int]]) -> bool:
        """Whether members of a prefix take or hold otherwise in pipelines of some lengths than in short ones."""
        if not pairs:
            return False
        short, long = (
            self._priced(recipe, some) for some in ([(member, _ANY) for member, _ in pairs], pairs)
        )
        values = [
            (a.values[:, :, :-1], b.values[:, :, :-1]) for a, b in zip(short, long, strict=True) if a and b
        ]
        return not all(np.array_equal(a, b) for a, b in values)

    def _priced(self, recipe: dict[str, Choice], pairs: Sequence[tuple[Member, int]]) -> list[Mesh | None]:
        """Members of one prefix with their strategies, each in a pipeline of some length."""
        space, branches = self.uniform.space, self.uniform.branches
        rows = space.rows.take(np.array([member.row for member, _ in pairs]))
        rows = Rows({**rows.values, "pp": np.array([float(pp) for _, pp in pairs])})
        ctx = rows.context(self.problem, space.knobs(recipe))
        ledger = self.uniform.ledger(recipe, ctx)
        tables = BranchTables(space, branches, self.uniform.pricer, self.kinds, recipe, ctx, ledger)
        strategies = Strategies(tables, rows, branches, [0])
        if not strategies.branches:
            return [None] * len(pairs)
        meshes = [mesh.barred(self.ends.values, branches) for mesh in strategies.meshes(range(len(pairs)))]
        return [mesh if len(mesh.branches) else None for mesh in meshes]


def side_by_side(meshes: Sequence[Mesh], communicators: float) -> Mesh:
    """The strategies of several meshes as those of one."""
    return replace(
        meshes[0],
        branches=[branch for mesh in meshes for branch in mesh.branches],
        values=np.concatenate([mesh.values for mesh in meshes]),
        communicators=communicators,
    )


def _weightless(like: Mesh, seconds: Array) -> Mesh:
    """A strategy that takes some seconds for a micro-batch in one block of each kind, and holds nothing."""
    values = np.zeros((1, *like.values.shape[1:]))
    values[0, COMPACT.index("forward_s"), :-1] = seconds
    return replace(like, branches=like.branches[:1], values=values)


def _windows(seconds: Array) -> Array:
    """(rows, layers + 1): the least sum over any 0, 1, … neighbouring layers of (rows, layers)."""
    sums = np.concatenate([np.zeros((len(seconds), 1)), np.cumsum(seconds, axis=1)], axis=1)
    layers = seconds.shape[1]
    if np.ptp(seconds, axis=1).max(initial=0.0) == 0.0:
        return sums
    return np.stack(
        [(sums[:, n:] - sums[:, : layers + 1 - n]).min(axis=1) for n in range(layers + 1)], axis=1
    )
