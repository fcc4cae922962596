"""Block tables of every branch of one prefix, built when asked for and shared where they can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.engine.block_table import COMPACT, HELD, ONCE, PACED, REST, TIMES, tabulate
from planner.engine.phases import loose
from planner.engine.pricer import Pricer
from planner.ledger import Array, Ledger, Resident
from planner.solve.branches import Branches
from planner.solve.space import Choice, Space
from planner.solve.time_limit import ask
from planner.technique import SLOTS, Context

__all__ = ["ASPECTS", "BranchTables"]

Index = NDArray[np.intp]

ASPECTS = {COMPACT: (PACED, ONCE, HELD), TIMES: (PACED, ONCE), ONCE: (ONCE,), HELD: (HELD,)}


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
        self._every = ctx
        self._seen: Index | None = None  # rows of the tables, if they are seen on some
        self._many = len(self)
        self._ledgers: dict[tuple[str, ...], Ledger] = {(): ledger}
        self._items = {id(item): item for item in ledger.items}
        self._base = self._change_to(ledger)
        self._changes: dict[tuple[str, ...], _Change] = {(): self._base}
        self._divided: dict[tuple[int, int, int, int, bool], list[_Change]] = {}
        self._units: dict[int, tuple[Mapping[str, Choice], _Change]] = {}  # by the unit's id, which is held
        self._joint: dict[tuple[int, int], dict[str, Choice]] = {}
        self._numbers: dict[tuple[tuple[tuple[int, int, int], ...], bool], _Numbered] = {}
        self._passes: dict[Any, dict[str, Choice]] = {}  # one schedule of all that edit the prefix alike

    def take(self, index: Index) -> BranchTables:
        """The tables on some of the rows: new ones, but where they are only seen."""
        if self._seen is not None:
            return self.of(index)
        ctx = self.ctx.take(index)
        ledger = self._ledgers[()].take(index, ctx.mesh.counterpart)
        return BranchTables(self.space, self.branches, self.pricer, self.kinds, self.recipe, ctx, ledger)

    def of(self, index: Index) -> BranchTables:
        """The same tables, seen on some of the rows: what either makes, both have."""
        seen = copy(self)
        seen.ctx = self.ctx.take(index)
        seen._seen = index if self._seen is None else self._seen[index]
        return seen

    def __len__(self) -> int:
        return len(self.ctx.micro_batch_size)

    def times(self, state: int) -> Array:
        """The times of a state without recompute or swaps: (time fields, kinds, rows)."""
        table = tabulate(
            self._ledger(self.branches.states[state]), self.pricer, self.kinds, self._many, TIMES
        )
        return table.values if self._seen is None else table.take(self._seen).values

    def of_branch(
        self, state: int, recompute: int, swap: int, rows: Index, schedule: Choice | None = None,
        fields: tuple[str, ...] = COMPACT,
    ) -> Array:  # fmt: skip
        """A branch on some rows: the prefix's table, and what every part of the branch changes; (rows, fields, kinds).

        A schedule that edits the ledger sees the state's items, and makes one part with it unless it looks at none of them.

        Args:
            state, recompute, swap: the branch.
            rows: which.
            schedule: one that edits the ledger.
            fields: ``COMPACT``, or some of its aspects: ``TIMES``, ``ONCE``, ``HELD``.
        """
        if fields is COMPACT:
            self._both(self._parts(state, recompute, swap, schedule, beside=False))
        sums = []
        for aspect in ASPECTS[fields]:
            first, *others = self.summands(state, recompute, swap, aspect, schedule)
            total = self.summand(first, aspect, rows, first=True)
            for group in others:
                total += self.summand(group, aspect, rows, first=False)
            sums.append(total)
        return sums[0] if len(sums) == 1 else np.concatenate(sums, axis=1)

    def summands(
        self, state: int, recompute: int, swap: int, aspect: tuple[str, ...], schedule: Choice | None = None, *,
        floor: bool = False,
    ) -> Sequence[Sequence[_Change]]:  # fmt: skip
        """Groups of changes whose tables (:meth:`summand`) add up to one aspect of a branch's: of one change each, or for a
        ``floor`` of its times, of all whose work and traffic run side by side.

        Parts that share nothing but the clock, as where traffic of one hides behind work of another, take together no less
        than each of them alone. A step adds up blocks' forwards, backwards (weight gradients included), and these with what
        runs again: of each of the three counts the largest among such parts. That needs no ledger of the branch's own.
        """
        if floor and aspect is PACED:
            groups = self._beside(state, recompute, swap)
        else:
            parts = self._parts(state, recompute, swap, schedule, beside=aspect is PACED)
            groups = [[part] for part in parts if aspect in part.touched]
        return groups or [[self._base]]

    def summand(
        self, group: Sequence[_Change], aspect: tuple[str, ...], rows: Index, *, first: bool
    ) -> Array:
        """One aspect of a group's table on some rows: whole, or unless it is the ``first``, what it changes of the prefix's;
        (rows, fields, kinds)."""
        each = [self._rows(part, aspect, rows) for part in group]
        table: Array = each[0] if len(each) == 1 else _apart(np.max([_added_up(one) for one in each], axis=0))
        return table if first else table - self._rows(self._base, aspect, rows)

    def floors(
        self,
        branches: Sequence[tuple[int, int, int]],
        rows: Index,
        sums: Sequence[Sequence[str]],
        *,
        rough: bool = False,
    ) -> tuple[Array, Array]:
        """What floors of :meth:`summands` say of many branches at once, and what these take without their swaps, which only add.

        Args:
            branches, rows: which.
            sums: of names, of what happens once per step or is held.
            rough: whether states that interact with recompute need no ledgers of their own with it: their times are then no more
                than those of either.

        Returns:
            Seconds of forwards and of backwards, with weight gradients and what runs again, (2, branches, rows, kinds), which no
            branch undercuts; the sums, (sums, branches, rows, kinds), which are the branches' own.
        """
        names, of = REST, self._numbered(tuple(branches), rough)
        self._both(of.held)
        phases = [self._rows(part, PACED, rows).transpose(1, 0, 2) for part in of.clocked]
        seconds = np.stack([[forward, sum(backward)] for forward, *backward in phases], axis=1)
        aspects = [
            np.concatenate([self._rows(part, x, rows) for x in (ONCE, HELD)], axis=1) for part in of.held
        ]
        each = np.stack(aspects)
        rest = np.stack([each[:, :, [names.index(n) for n in some]].sum(axis=2) for some in sums])
        least = seconds[:, [0] * len(branches)]
        for members in of.beside:
            largest = seconds[:, members[0]]
            for member in members[1:]:
                np.maximum(largest, seconds[:, member], out=largest)
            least += largest - seconds[:, :1]
        return np.maximum(least, _added(seconds, of.plain)), _added(rest, of.parts)

    def _numbered(self, branches: tuple[tuple[int, int, int], ...], rough: bool) -> _Numbered:
        if (branches, rough) not in self._numbers:
            clocked, held = {self._base: 0}, {self._base: 0}

            def numbered(parts: Sequence[_Change], among: dict[_Change, int]) -> list[int]:
                return [among.setdefault(part, len(among)) for part in parts]

            parts = [numbered(self._parts(*branch, beside=False), held) for branch in branches]
            beside = [[numbered(group, clocked) for group in self._beside(*branch)] for branch in branches]
            plain = [
                () if rough else numbered(self._parts(state, r, 0, beside=True), clocked)
                for state, r, _ in branches
            ]
            groups = []
            for each in zip_longest(*beside, fillvalue=[0]):
                most = max(map(len, each))  # a group with fewer members than others has its first one again
                groups.append(np.array([[*some, *some[:1] * (most - len(some))] for some in each]).T)
            self._numbers[branches, rough] = _Numbered(
                [*clocked], [*held], groups, _side_by_side(plain), _side_by_side(parts)
            )
        return self._numbers[branches, rough]

    def whole(self, state: int, recompute: int, swap: int) -> Array:
        """:meth:`of_branch` on all rows, from a ledger of the branch's own."""
        return self._whole(self._change(self.branches.recipe(state, recompute, swap)))

    def _whole(self, change: _Change) -> Array:
        every = np.arange(len(self))
        return np.concatenate([self._rows(change, aspect, every) for aspect in ASPECTS[COMPACT]], axis=1)

    def _rows(self, change: _Change, aspect: tuple[str, ...], rows: Index) -> Array:
        """One aspect of a partial recipe's table on some rows: (rows, fields, kinds)."""
        rows = rows if self._seen is None else self._seen[rows]
        table: Array = self._cells(self._base, aspect)[1].take(rows, axis=0)
        if aspect in change.touched:
            cells, values = self._cells(change, aspect)
            table[:, cells] = values.take(rows, axis=0)
        return table.reshape(len(rows), len(aspect), -1)

    def _cells(self, change: _Change, aspect: tuple[str, ...]) -> tuple[Index, Array]:
        """One aspect of a partial recipe's table where it is not the prefix's: which fields and kinds, and (rows, these)."""
        if aspect not in change.tables:
            self._tabulate(change, aspect, aspect)
        return change.tables[aspect]

    def _both(self, parts: Sequence[_Change]) -> None:
        """Makes what is not known of updates and of what is held in one go, where both are asked for."""
        for part in parts:
            if part.touched >= {ONCE, HELD} and part.tables.keys().isdisjoint((ONCE, HELD)):
                self._tabulate(part, REST, ONCE, HELD)

    def _tabulate(self, change: _Change, fields: tuple[str, ...], *aspects: tuple[str, ...]) -> None:
        """Makes some aspects' tables, whose fields stand one after the other."""
        every = tabulate(change.ledger, self.pricer, self.kinds, self._many, fields).values
        for aspect in aspects:
            values, every = every[: len(aspect)].reshape(-1, self._many).T, every[len(aspect) :]
            cells = np.arange(values.shape[1])
            if change is not self._base:
                cells = np.flatnonzero((values != self._cells(self._base, aspect)[1]).any(axis=0))
            change.tables[aspect] = cells, np.ascontiguousarray(values[:, cells])

    def _parts(
        self, state: int, recompute: int, swap: int, schedule: Choice | None = None, *, beside: bool
    ) -> list[_Change]:
        """What a branch changes, in parts that add up: choices that touch the same items make one part.

        ``beside``: also those whose work and traffic run side by side, and hide each other. What is held adds up without that.
        """
        edits = None if schedule is None else self._edits(schedule)
        key = (state, recompute, swap, id(edits), beside)
        if key not in self._divided:
            clash = _clash if beside else _share
            parts: list[tuple[dict[str, Choice], _Change]] = []
            of_state, *units = self.branches.units(state, recompute, swap)
            if edits is not None and edits["schedule"].technique.apart:  # type: ignore[union-attr]
                units.append(edits)
            elif edits is not None:
                of_state = self._together(of_state, edits)
            for part in (of_state, *units):
                change = self._unit(part)
                while other := next((other for other in parts if clash(change, other[1])), None):
                    parts.remove(other)
                    part = self._together(other[0], part)
                    change = self._unit(part)
                if change.touched:
                    parts.append((part, change))
            self._divided[key] = [change for _, change in parts]
        return self._divided[key]

    def _beside(self, state: int, recompute: int, swap: int) -> list[list[_Change]]:
        """Parts of a branch that touch no common item, those whose times interact together."""
        found: list[list[_Change]] = []
        for part in self._parts(state, recompute, swap, beside=False):
            if PACED in part.touched:
                joint = [group for group in found if any(_clash(part, other) for other in group)]
                found = [group for group in found if group not in joint] + [sum(joint, [part])]
        return found

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
            self._changes[key] = self._change_to(self._ledger(recipe))
        return self._changes[key]

    def _change_to(self, ledger: Ledger) -> _Change:
        """The difference between the prefix's ledger and another."""
        old, new = self._items, {id(item): item for item in ledger.items}
        removed = frozenset(old.keys() - new.keys())
        changed = [old[i] for i in removed] + [new[i] for i in new.keys() - old.keys()]
        aspects = [HELD if isinstance(i, Resident) else ONCE if i.phase == "step" else PACED for i in changed]
        paced = [i for i, aspect in zip(changed, aspects, strict=True) if aspect is PACED]
        timed = {(i.block, i.phase) for i in paced}
        # What runs beside a backward hides behind its weight gradients and recomputation as well.
        beside = {i.block for i in paced if i.phase == "backward" and loose([i])}
        timed |= {(block, phase) for block in beside for phase in ("weight", "recompute")}
        whole = not ledger.axes.extends(self._ledgers[()].axes)  # every item may have another size
        return _Change(ledger, removed, frozenset(timed), frozenset(ASPECTS[COMPACT] if whole else aspects))

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
                ctx = ctx or replace(self._every, knobs={**self._every.knobs, **self.space.knobs(recipe)})
                self._ledgers[done] = choice.technique.apply(ledger, ctx)
            ledger = self._ledgers[done]
        return ledger


class _Change:
    """What a partial recipe makes of the prefix's ledger.

    ``removed``: ids of the prefix's items that it replaced or dropped. ``timed``: blocks and phases whose seconds it changed,
    where overlap makes changes interact. ``touched``: aspects in which its table may differ from the prefix's.
    ``tables``: by aspects, what :meth:`BranchTables._cells` says of it, made when first asked for.
    """

    def __init__(
        self, ledger: Ledger, removed: frozenset[int], timed: frozenset[tuple[str, str]],
        touched: frozenset[tuple[str, ...]],
    ) -> None:  # fmt: skip
        self.ledger, self.removed, self.timed, self.touched = ledger, removed, timed, touched
        self.tables: dict[tuple[str, ...], tuple[Index, Array]] = {}


def _share(one: _Change, other: _Change) -> bool:
    """Whether both touch an item: then their changes do not add up."""
    return not one.removed.isdisjoint(other.removed)


def _clash(one: _Change, other: _Change) -> bool:
    """Whether both touch an item, or the timing of a block and phase: then their times do not add up."""
    return _share(one, other) or not one.timed.isdisjoint(other.timed)


class _Numbered(NamedTuple):
    """Parts of some branches by number.

    Attributes:
        clocked, held: the parts that the others number.
        beside: groups of parts that run side by side, (members, branches) each.
        plain: what branches take without their swaps, (parts, branches).
        parts: what they hold, (parts, branches).
    """

    clocked: list[_Change]
    held: list[_Change]
    beside: list[Index]
    plain: Index
    parts: Index


def _side_by_side(parts: Sequence[Sequence[int]]) -> Index:
    """Numbers of every branch's parts, (parts, branches): one with fewer than others has the first, which changes nothing."""
    return np.array([*zip_longest(*parts, fillvalue=0)], dtype=np.intp).reshape(-1, len(parts))


def _added(values: Array, parts: Index) -> Array:
    """The first of some tables and what others of them change, per branch: (fields, branches, …) of (fields, tables, …)."""
    total: Array = values[:, [0] * parts.shape[1]]
    changes = values - values[:, :1]
    for some in parts:
        total += changes[:, some]
    return total


def _added_up(paced: Array) -> Array:
    """Forward, weight gradients, these with the backward, and all that with what runs again: of (rows, paced fields, kinds)."""
    forward, backward, weight, again = paced.transpose(1, 0, 2)
    return np.stack([forward, weight, weight + backward, weight + backward + again], axis=1)


def _apart(added_up: Array) -> Array:
    """The phases of such sums."""
    forward, weight, backward, again = added_up.transpose(1, 0, 2)
    return np.stack([forward, backward - weight, weight, again - backward], axis=1)
