"""What every layer may choose: all additive strategies of a mesh, each priced by the engine's own block tables.

A strategy is a choice in every additive slot but the schedule: what is sharded, what is recomputed, what is offloaded. What a
block computes and how its work is cut (the slots before) is common to all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TypeAlias

import numpy as np

from planner.engine.block_table import COMPACT, PACED, BlockTable
from planner.ledger import Array
from planner.pipeline.assignment import Assignment, Runs
from planner.solve.branches import Branches
from planner.solve.space import Choice, Rows
from planner.solve.tables import BranchTables
from planner.technique import Launcher

__all__ = ["Branch", "Mesh", "Strategies"]

Branch: TypeAlias = tuple[int, int, int]  # state, recompute and swap of :class:`Branches`

_FIELD = {name: index for index, name in enumerate(COMPACT)}
_LONGEST_S = 1e9  # of a block under a strategy that it must not take
_TIMES = [_FIELD[name] for name in ("forward_s", "backward_s", "weight_s", "recompute_s")]


_BESIDE = (
    ("main_step_s",), ("always_bytes",), ("saved_bytes",), ("block_bytes", "recomputed_bytes"), ("host_bytes",),
    ("host_saved_bytes",),
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """One row of a prefix with all of its strategies.

    Attributes:
        recipe, row: the prefix's choices; mesh degrees and micro-batch size.
        branches: the strategies that are valid here.
        values: (strategies, compact fields, kinds) of the engine's block tables.
        micro_batches: per pipeline and step.
        communicators: groups with more than one rank.
    """

    recipe: Mapping[str, Choice]
    row: Mapping[str, float]
    kinds: tuple[str, ...]
    branches: Sequence[Branch]
    values: Array
    micro_batches: int
    communicators: float

    def __getitem__(self, name: str) -> Array:
        """A field, (strategies, kinds)."""
        field: Array = self.values[:, _FIELD[name]]
        return field

    @property
    def pp(self) -> int:
        """Pipeline degree."""
        return round(self.row["pp"])

    @property
    def micro_batch_s(self) -> Array:
        """Forward, backward and recomputation of one micro-batch in one block, (strategies, kinds)."""
        total: Array = self.values[:, _TIMES].sum(axis=1)
        return total

    @property
    def blocks(self) -> Array:
        """As :meth:`Strategies.blocks`: (7, strategies, kinds but the boundary)."""
        beside = [sum(self[name] for name in names) for names in _BESIDE]
        return np.stack([self.micro_batch_s, *beside])[:, :, :-1]

    def alone(self) -> list[Mesh]:
        """The same mesh with one of the strategies each, the fastest first."""
        total_s = self.micro_batch_s[:, :-3].sum(axis=1)
        order = np.argsort(total_s, kind="stable").tolist()
        return [replace(self, branches=[self.branches[s]], values=self.values[s : s + 1]) for s in order]

    def runnable(self, launcher: Launcher, choices: Branches) -> list[Mesh]:
        """The same mesh with strategies that a launcher lets stand side by side: as many as it does, and what embedding and head
        may have beside them."""
        recipes = [{slot: c.value for slot, c in choices.recipe(*branch).items()} for branch in self.branches]
        at_both = sorted(launcher.alike_at_ends & launcher.per_layer.keys())
        families: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for sets in product(*launcher.per_layer.values()):
            mixed = dict(zip(launcher.per_layer, sets, strict=True))
            alike: dict[tuple[str, ...], list[int]] = {}
            for s, recipe in enumerate(recipes):
                if all(recipe[slot] in values for slot, values in mixed.items()):
                    rest = tuple(value for slot, value in recipe.items() if slot not in mixed)
                    alike.setdefault(rest, []).append(s)
            for members in alike.values():
                ends: dict[tuple[str, ...], list[int]] = {}
                for s in members:
                    at_ends = tuple(recipes[s][slot] for slot in at_both)
                    ends.setdefault(at_ends, []).append(s)
                families[tuple(members)] = [tuple(some) for some in ends.values()]
        largest = [one for one in families if not any(set(one) < set(other) for other in families)]
        covered = {s for one in largest for s in one}
        found = [self._some(members, ends) for members in largest for ends in families[members]]
        return found + [
            alone for alone in self.alone() if alone.branches[0] not in {self.branches[s] for s in covered}
        ]

    def barred(self, at_ends: Mapping[str, str], choices: Branches) -> Mesh:
        """The same mesh, whose embedding and head take no strategy but those with some values, by slot."""
        if not at_ends:
            return self
        recipes = [choices.recipe(*branch) for branch in self.branches]
        ends = [
            s for s, own in enumerate(recipes) if all(own[slot].value == at_ends[slot] for slot in at_ends)
        ]
        return self._some(range(len(self.branches)), ends)

    def _some(self, members: Sequence[int], ends: Sequence[int]) -> Mesh:
        """Some of the strategies, of which embedding and head take some: any other takes for ever there."""
        values = self.values[list(members)].copy()
        barred = [place for place, s in enumerate(members) if s not in ends]
        values[np.ix_(barred, [_FIELD["forward_s"]], [len(self.kinds) - 3, len(self.kinds) - 2])] = _LONGEST_S
        return replace(self, branches=[self.branches[s] for s in members], values=values)

    def assignment(self, stages: Sequence[Runs], embedding: int, head: int, choices: Branches) -> Assignment:
        """Strategies by number as strategies by choice; those in use only, the most frequent one first."""
        layers: dict[int, int] = {}
        for runs in stages:
            for s, n in runs:
                layers[s] = layers.get(s, 0) + n
        for end in (embedding, head):
            layers.setdefault(end, 0)
        used = sorted(layers, key=lambda s: (-layers[s], s))
        number = {s: index for index, s in enumerate(used)}
        return Assignment(
            tuple(choices.recipe(*self.branches[s]) for s in used),
            tuple(tuple((number[s], n) for s, n in runs) for runs in stages),
            number[embedding],
            number[head],
        )

    def table(self, columns: Sequence[tuple[str, int]]) -> BlockTable:
        """The one-row table of some (kind, strategy) columns, as :meth:`Assignment.columns` lists them."""
        picked = [self.values[s, :, self.kinds.index(kind)] for kind, s in columns]
        names = [f"{kind}/{s}" for kind, s in columns[:-3]] + [kind for kind, _ in columns[-3:]]
        return BlockTable.compact(tuple(names), np.stack(picked, axis=1)[:, :, None])


class Strategies:
    """All strategies on some rows of one prefix, with some of the swaps.

    Attributes:
        branches: the strategies that say something of their own on any of the rows.
    """

    def __init__(self, tables: BranchTables, rows: Rows, choices: Branches, swaps: Sequence[int]) -> None:
        self.tables, self.rows, self.choices, self.swaps = tables, rows, choices, swaps
        activity = choices.activity(rows, tables.ctx.knobs)
        self.branches: list[Branch] = []
        self._own: list[Array] = []
        for r, recompute in enumerate(choices.recomputes):
            if choices.by_layers(recompute):
                continue  # recomputing some layers is full recompute for these
            for state in range(len(choices.states)):
                on = activity.states[state] & activity.recomputes[r]
                if on.any():
                    self.branches += [(state, r, swap) for swap in swaps]
                    self._own += [on] * len(swaps)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Array) -> Strategies:
        """The strategies of some of the rows."""
        return Strategies(self.tables.take(index), self.rows.take(index), self.choices, self.swaps)

    @cached_property
    def active(self) -> Array:
        """(strategies, rows) where each is valid and says something of its own."""
        active = np.array(self._own).reshape(len(self.branches), len(self))
        launcher = self.choices.space.problem.launcher
        for s, branch in enumerate(self.branches):
            if launcher is not None or self.choices.ruled(branch[2]):
                recipe = {**self.tables.recipe, **self.choices.recipe(*branch)}
                ctx = self.rows.context(self.choices.space.problem, self.choices.space.knobs(recipe))
                rules = [c.technique.valid for c in self.choices.swaps[branch[2]].values() if c.technique]
                for valid in (*rules, *([launcher.valid] if launcher is not None else [])):
                    for check in valid(ctx):
                        active[s] &= check.ok
        return active

    def blocks(self) -> Array:
        """Of one block under each strategy, no more than the engine's tables say: (7, strategies, rows, kinds but the boundary).

        Seconds of a micro-batch (infinite where a strategy is not active), serial seconds of a step; bytes held throughout, saved
        per micro-batch in flight, and while the block is at work; on the host throughout, and per micro-batch in flight. Times
        are rough (:meth:`~planner.solve.tables.BranchTables.floors`): first bounds need few ledgers.
        """
        least, beside = self.tables.floors(self.branches, np.arange(len(self)), _BESIDE, rough=True)
        blocks = np.concatenate([least.sum(axis=0, keepdims=True), beside])[..., :-1]
        blocks[0][~self.active] = np.inf
        return blocks

    def meshes(self, rows: Sequence[int]) -> list[Mesh]:
        """Some of the rows, each with the strategies that are valid there."""
        index = np.asarray(rows, dtype=np.intp)
        values = np.stack([self.tables.of_branch(*branch, index) for branch in self.branches])
        return [self._mesh(row, values[:, place]) for place, row in enumerate(index.tolist())]

    def priced(self, lower: Mesh, row: int, numbers: Sequence[int]) -> Mesh:
        """What :meth:`lower` says of a row, with some strategies as :meth:`meshes` has them."""
        values = lower.values.copy()
        for s in numbers:
            values[s] = self.tables.of_branch(*lower.branches[s], np.array([row]))[0]
        return replace(lower, values=values)

    def lower(self, rows: Sequence[int]) -> list[Mesh]:
        """Rows as :meth:`meshes` has them, but for times, which are no longer than these: what follows a forward counts as
        backward."""
        single = [(name,) for name in COMPACT[len(PACED) :]]
        (forward, later), beside = self.tables.floors(self.branches, np.asarray(rows, dtype=np.intp), single)
        values = np.stack([forward, later, *np.zeros((len(PACED) - 2, *forward.shape)), *beside], axis=2)
        return [self._mesh(row, values[:, place]) for place, row in enumerate(rows)]

    def _mesh(self, row: int, values: Array) -> Mesh:
        """A row with some values of all strategies, (strategies, compact fields, kinds)."""
        on = np.flatnonzero(self.active[:, row])
        at = {name: float(column[row]) for name, column in self.rows.values.items()}
        groups = sum(float(at[name] > 1) for name in ("tp", "cp", "dp", "pp", "ep"))
        micro_batches = round(float(self.tables.ctx.micro_batches[row]))
        branches = [self.branches[i] for i in on]
        return Mesh(self.tables.recipe, at, self.tables.kinds, branches, values[on], micro_batches, groups)
