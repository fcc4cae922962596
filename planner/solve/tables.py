"""Block tables of every branch of one prefix, built when asked for and shared where they can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.engine import COMPACT, TIMES, Pricer, tabulate
from planner.ledger import Array, Ledger, Resident
from planner.phases import loose
from planner.solve.branches import Branches
from planner.solve.space import Choice, Space
from planner.solve.time_limit import ask
from planner.technique import SLOTS, Context

__all__ = ["BranchTables"]

Index = NDArray[np.intp]


class BranchTables:
    """Tables of one prefix on some of its rows.

    Args:
        space, branches, pricer: of the search.
        kinds: block kinds.
        recipe: the prefix's choices.
        ctx: its rows.
        ledger: the prefix's ledger on these rows.
    """

    def __init__(
        self, space: Space, branches: Branches, pricer: Pricer, kinds: tuple[str, ...], recipe: Mapping[str, Choice],
        ctx: Context, ledger: Ledger,
    ) -> None:  # fmt: skip
        self.space, self.branches, self.pricer, self.kinds = space, branches, pricer, kinds
        self.recipe, self.ctx = recipe, ctx
        self._ledgers: dict[tuple[str, ...], Ledger] = {(): ledger}
        self._changes: dict[tuple[str, ...], _Change] = {}
        self._divided: dict[tuple[int, int, int, int], list[_Change]] = {}
        self._units: dict[int, tuple[Mapping[str, Choice], _Change]] = {}  # by the unit's id, which is held
        self._joint: dict[tuple[int, int], dict[str, Choice]] = {}
        self._passes: dict[Any, dict[str, Choice]] = {}  # one schedule of all that edit the prefix alike

    def take(self, index: Index) -> BranchTables:
        """The tables on some of the rows."""
        ctx = self.ctx.take(index)
        ledger = self._ledgers[()].take(index, ctx.mesh.counterpart)
        return BranchTables(self.space, self.branches, self.pricer, self.kinds, self.recipe, ctx, ledger)

    def __len__(self) -> int:
        return len(self.ctx.micro_batch_size)

    def of_state(self, state: int) -> Array:
        """The table of a state without recompute or swaps: (rows, compact fields, kinds)."""
        return self._change(self.branches.states[state]).values

    def times(self, state: int) -> Array:
        """The times of a state without recompute or swaps: (time fields, kinds, rows)."""
        return tabulate(
            self._ledger(self.branches.states[state]), self.pricer, self.kinds, len(self), TIMES
        ).values

    def of_branch(
        self, state: int, recompute: int, swap: int, rows: Index, schedule: Choice | None = None
    ) -> Array:
        """The table of a branch on some rows: the prefix's, and what every part of the branch changes.

        A schedule that edits the ledger sees the state's items, and makes one part with it unless it looks at none of them.
        """
        base: Array = self._change({}).values[rows]
        total = base
        for part in self._parts(state, recompute, swap, schedule):
            total = total + (part.values[rows] - base)
        return total

    def parts(self, state: int, recompute: int, swap: int) -> tuple[Array, list[Array]]:
        """What :meth:`of_branch` adds up: the prefix's table and those of the branch's parts alone, (rows, compact fields, kinds)
        each, the same objects every time."""
        return self._change({}).values, [part.values for part in self._parts(state, recompute, swap)]

    def whole(self, state: int, recompute: int, swap: int) -> Array:
        """The same on all rows, from a ledger of the branch's own."""
        return self._change(self.branches.recipe(state, recompute, swap)).values

    def _parts(self, state: int, recompute: int, swap: int, schedule: Choice | None = None) -> list[_Change]:
        """What a branch changes, in parts that add up: choices that touch the same things make one part."""
        edits = None if schedule is None else self._edits(schedule)
        key = (state, recompute, swap, id(edits))
        if key not in self._divided:
            parts: list[tuple[dict[str, Choice], _Change]] = []
            of_state, *units = self.branches.units(state, recompute, swap)
            if edits is not None and edits["schedule"].technique.apart:  # type: ignore[union-attr]
                units.append(edits)
            elif edits is not None:
                of_state = self._together(of_state, edits)
            for part in (of_state, *units):
                change = self._unit(part)
                while clash := next((other for other in parts if _clash(change, other[1])), None):
                    parts.remove(clash)
                    part = self._together(clash[0], part)
                    change = self._unit(part)
                if change.removed or change.timed or change.differs:
                    parts.append((part, change))
            self._divided[key] = [change for _, change in parts]
        return self._divided[key]

    def _edits(self, schedule: Choice) -> dict[str, Choice]:
        """A schedule as a unit; schedules whose passes are one and look at the prefix alone are one unit."""
        technique = schedule.technique
        assert technique is not None
        return self._passes.setdefault(
            technique.apply if technique.apart else schedule.value, {"schedule": schedule}
        )

    def _together(self, one: dict[str, Choice], other: dict[str, Choice]) -> dict[str, Choice]:
        """Two units as one; always the same object."""
        key = id(one), id(other)
        if key not in self._joint:
            self._unit(one), self._unit(other)  # which holds them
            self._joint[key] = {**one, **other}
        return self._joint[key]

    def _unit(self, recipe: dict[str, Choice]) -> _Change:
        """:meth:`_change` of a unit, remembered by its identity."""
        known = self._units.get(id(recipe))
        if known is None:
            known = self._units[id(recipe)] = (recipe, self._change(recipe))
        return known[1]

    def _change(self, recipe: Mapping[str, Choice]) -> _Change:
        """What a partial recipe makes of the prefix's ledger."""
        key = tuple(
            f"{slot}={choice.value}" for slot, choice in recipe.items() if choice.technique is not None
        )
        if key not in self._changes:
            ask()
            ledger = self._ledger(recipe)
            table = tabulate(ledger, self.pricer, self.kinds, len(self), COMPACT)
            values = np.ascontiguousarray(table.values.transpose(2, 0, 1))
            differs = bool(key) and not np.array_equal(values, self._change({}).values)
            self._changes[key] = _Change(values, *_difference(self._ledgers[()], ledger), differs)
        return self._changes[key]

    def _ledger(self, recipe: Mapping[str, Choice]) -> Ledger:
        """The branch's ledger; branches share the ledgers of their common prefixes."""
        done: tuple[str, ...] = ()
        ledger = self._ledgers[()]
        ctx: Context | None = None
        for slot in SLOTS:
            choice = recipe.get(slot)
            if choice is None or choice.technique is None:
                continue
            done = (*done, f"{slot}={choice.value}")
            if done not in self._ledgers:
                # The same mesh throughout, so that all branches name the same groups and share their prices.
                ctx = ctx or replace(self.ctx, knobs={**self.ctx.knobs, **self.space.knobs(recipe)})
                self._ledgers[done] = choice.technique.apply(ledger, ctx)
            ledger = self._ledgers[done]
        return ledger


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """A partial recipe's block table (rows, fields, kinds), and what it touched.

    ``removed``: ids of the prefix's items that it replaced or dropped. ``timed``: blocks and phases whose seconds it changed,
    where overlap makes changes interact. ``differs``: whether its table is not the prefix's.
    """

    values: Array
    removed: frozenset[int]
    timed: frozenset[tuple[str, str]]
    differs: bool


def _clash(one: _Change, other: _Change) -> bool:
    """Whether both touch an item, or the timing of a block and phase: then their changes do not add up."""
    return not (one.removed.isdisjoint(other.removed) and one.timed.isdisjoint(other.timed))


def _difference(before: Ledger, after: Ledger) -> tuple[frozenset[int], frozenset[tuple[str, str]]]:
    """Items of ``before`` that are not in ``after``, and the blocks and phases where timed items differ."""
    old, new = {id(item): item for item in before.items}, {id(item): item for item in after.items}
    removed = frozenset(old.keys() - new.keys())
    changed = [old[i] for i in removed] + [new[i] for i in new.keys() - old.keys()]
    paced = [i for i in changed if i.phase != "step" and not isinstance(i, Resident)]
    timed = {(i.block, i.phase) for i in paced}
    # What runs beside a backward hides behind its weight gradients and recomputation as well.
    beside = {i.block for i in paced if i.phase == "backward" and loose([i])}
    timed |= {(block, phase) for block in beside for phase in ("weight", "recompute")}
    return removed, frozenset(timed)
