"""Block tables of candidates: those of many prefixes' rows and branches, brought together column by column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from planner.costs.arrays import distinct
from planner.engine import COMPACT, TIMES, BlockTable
from planner.ledger import Array
from planner.solve.branches import Branches
from planner.solve.candidates import Jobs
from planner.solve.space import Choice
from planner.solve.tables import BranchTables

__all__ = ["Columns", "editor_of"]

Index = NDArray[np.intp]


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
        self._of_states = np.zeros(0)
        self._known: set[tuple[int, int]] = set()

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
        editor = editor_of(jobs.schedule)
        if editor is None and all(self.branches.idle(r, jobs.swap) for r in distinct(jobs.recomputes)):
            first = COMPACT.index(fields[0])
            columns = self._plain(jobs.states, jobs.rows)[:, first : first + len(fields)]
        else:
            columns = np.empty((len(jobs.rows), len(fields), len(self.kinds)))
            for at, tables, rows, (state, recompute) in self._by_branch(jobs):
                columns[at] = tables.of_branch(state, recompute, jobs.swap, rows, editor, fields)
        return BlockTable(self.kinds, np.ascontiguousarray(columns.transpose(1, 2, 0)), fields)

    def floors(self, jobs: Jobs) -> tuple[BlockTable, NDArray[np.bool_]]:
        """Times that the jobs are not faster than, whose schedule edits nothing, and whether they are their own."""
        columns = np.empty((len(jobs.rows), len(TIMES), len(self.kinds)))
        own = np.empty(len(jobs.rows), dtype=bool)
        for at, tables, rows, (state, recompute) in self._by_branch(jobs):
            columns[at], own[at] = tables.floor_of_branch(state, recompute, jobs.swap, rows)
        return BlockTable(self.kinds, np.ascontiguousarray(columns.transpose(1, 2, 0)), TIMES), own

    def _by_branch(self, jobs: Jobs) -> Iterator[tuple[Index, BranchTables, Index, tuple[int, int]]]:
        """The jobs of each prefix, state and recompute choice: which, and their rows in the prefix's tables."""
        shape = (len(self.tables), len(self.branches.states), len(self.branches.recomputes))
        branches = np.ravel_multi_index((self.prefix_of[jobs.rows], jobs.states, jobs.recomputes), shape)
        order = np.argsort(branches, kind="stable")
        for at in filter(len, np.split(order, np.flatnonzero(np.diff(branches[order])) + 1)):
            prefix, state, recompute = (int(i) for i in np.unravel_index(branches[at[0]], shape))
            yield at, self.tables[prefix], jobs.rows[at] - self.starts[prefix], (state, recompute)

    def _plain(self, states: Index, rows: Index) -> Array:
        """Columns of states without recompute or swaps, (jobs, fields, kinds); their tables are made when first asked for."""
        if not len(self._of_states):
            self._of_states = np.zeros((*self.states.shape, len(COMPACT), len(self.kinds)))
        asked = distinct(states * len(self.tables) + self.prefix_of[rows])
        for state, prefix in (divmod(branch, len(self.tables)) for branch in asked.tolist()):
            if (state, prefix) not in self._known:
                self._known.add((state, prefix))
                where = slice(self.starts[prefix], self.starts[prefix + 1])
                self._of_states[state, where] = self.tables[prefix].of_state(state)
        return self._of_states[states, rows]


def editor_of(schedule: Choice) -> Choice | None:
    """The schedule, if it edits the ledger."""
    assert schedule.technique is not None
    return schedule if schedule.technique.edits else None
