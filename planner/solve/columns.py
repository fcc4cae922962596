"""Block tables of candidates: those of many prefixes' rows and branches, brought together column by column."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from planner.costs.arrays import distinct
from planner.engine.block_table import COMPACT, TIMES, BlockTable
from planner.ledger import Array
from planner.solve.branches import Branches
from planner.solve.candidates import Jobs
from planner.solve.space import Choice
from planner.solve.tables import ASPECTS, BranchTables

__all__ = ["Columns", "editor_of"]

Index = NDArray[np.intp]

_MOST = 5  # summands of a branch: its state, two swaps, recompute, and a schedule that edits the ledger
_NONE = -1  # instead of a summand


class Columns:
    """Columns of the rows of several prefixes, end to end.

    Args:
        branches: additive choices.
        tables: per prefix, its branch tables.
        states: which states say something of their own on each row, (states, rows).
    """

    def __init__(self, branches: Branches, tables: Sequence[BranchTables], states: NDArray[np.bool_]) -> None:
        self.branches, self.tables, self.states = branches, tables, states
        self.kinds = tables[0].kinds
        self.starts = np.cumsum([0, *map(len, tables)])
        self.prefix_of = np.repeat(np.arange(len(tables)), np.diff(self.starts))
        self._pools = {aspect: _Pool(len(aspect) * len(self.kinds)) for aspect in ASPECTS[COMPACT]}
        self._places: dict[tuple[str, tuple[str, ...], bool], dict[int, tuple[int, ...]]] = {}

    def times(self, state: int) -> BlockTable:
        """The times of a state on every row, before what a schedule adds; zero where it is active on no row of a prefix."""
        parts = zip(self.tables, pairwise(self.starts.tolist()), strict=True)
        each = [
            table.times(state)
            if self.states[state, start:stop].any()
            else np.zeros((len(TIMES), len(self.kinds), len(table)))
            for table, (start, stop) in parts
        ]
        return BlockTable(self.kinds, np.concatenate(each, axis=2), TIMES)

    def of(self, jobs: Jobs, fields: tuple[str, ...] = COMPACT) -> BlockTable:
        """The jobs' columns: those of their states, plus what recompute and swaps change, and what the schedule adds."""
        return self._added_up(jobs, fields, floor=False)[0]

    def floors(self, jobs: Jobs) -> tuple[BlockTable, NDArray[np.bool_]]:
        """Times that the jobs are not faster than, whose schedule edits nothing, and whether they are their own."""
        return self._added_up(jobs, TIMES, floor=True)

    def _added_up(
        self, jobs: Jobs, fields: tuple[str, ...], *, floor: bool
    ) -> tuple[BlockTable, NDArray[np.bool_]]:
        """Sums of the summands of each job's branch, and whether each of these is of one change alone."""
        prefix = self.prefix_of[jobs.rows]
        branches = self.branches
        shape = (len(self.tables), len(branches.states), len(branches.recomputes), len(branches.swaps))
        numbers = np.ravel_multi_index((prefix, jobs.states, jobs.recomputes, jobs.swaps), shape)
        each, local = distinct(numbers), jobs.rows - self.starts[prefix]
        of, editor = np.searchsorted(each, numbers), editor_of(jobs.schedule)
        columns, own = [], np.ones(len(numbers), dtype=bool)
        for aspect in ASPECTS[fields]:
            known = self._places.setdefault((editor.value if editor else "", aspect, floor), {})
            for branch in each.tolist():
                if branch not in known:
                    at, state, recompute, swap = (int(i) for i in np.unravel_index(branch, shape))
                    known[branch] = self._find(at, (state, recompute, swap), editor, aspect, floor)
            places = np.array([known[branch] for branch in each.tolist()], dtype=np.intp).reshape(
                -1, _MOST + 1
            )
            own &= places[of, _MOST] == 1
            columns.append(self._pools[aspect].sums(places[:, :_MOST], of, local))
        values = columns[0] if len(columns) == 1 else np.concatenate(columns)
        return BlockTable(self.kinds, values.reshape(len(fields), len(self.kinds), -1), fields), own

    def _find(
        self, prefix: int, branch: tuple[int, int, int], editor: Choice | None, aspect: tuple[str, ...], floor: bool
    ) -> tuple[int, ...]:  # fmt: skip
        """Where each summand of a branch of a prefix begins in the pool, which takes in those that are new; and whether each is
        of one change alone."""
        tables, pool = self.tables[prefix], self._pools[aspect]
        groups = tables.summands(*branch, aspect, editor, floor=floor)
        every = np.arange(len(tables))
        places = []
        for first, group in zip((True, *[False] * _MOST), groups, strict=False):
            key = (prefix, first, *map(id, group))
            if key not in pool.starts:
                pool.add(key, tables.summand(group, aspect, every, first=first))
            places.append(pool.starts[key])
        alone = all(len(group) == 1 for group in groups)
        return (*places, *[_NONE] * (_MOST - len(places)), int(alone))


class _Pool:
    """Tables of summands side by side, a column each: (fields times kinds, columns)."""

    def __init__(self, height: int) -> None:
        self.starts: dict[tuple[int, ...], int] = {}
        self._values, self._used = np.empty((height, 0)), 0

    def add(self, key: tuple[int, ...], table: Array) -> None:
        """Takes in a table of all rows of a prefix."""
        self.starts[key] = self._used
        end, room = self._used + len(table), self._values.shape[1]
        if end > room:
            more = np.empty((len(self._values), max(end, 2 * room)))
            more[:, : self._used] = self._values[:, : self._used]
            self._values = more
        self._values[:, self._used : end] = table.reshape(len(table), -1).T
        self._used = end

    def sums(self, places: NDArray[np.intp], of: Index, local: Index) -> Array:
        """Sums over the summands of each job, (fields times kinds, jobs): those of its branch ``of``, on its prefix's row."""
        total: Array = self._values.take(places[of, 0] + local, axis=1)
        for place in filter(lambda place: np.any(place != _NONE), places.T[1:]):
            at = np.flatnonzero(place[of] != _NONE)
            more = self._values.take(place[of[at]] + local[at], axis=1)
            if len(at) == len(of):
                total += more
            else:
                total[:, at] += more
        return total


def editor_of(schedule: Choice) -> Choice | None:
    """The schedule, if it edits the ledger."""
    assert schedule.technique is not None
    return schedule if schedule.technique.edits else None
