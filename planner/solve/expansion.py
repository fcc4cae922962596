"""Prices the branches of rows that can still win."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from planner.engine import BlockTable, Pricer, tabulate
from planner.ledger import Array, Ledger, Resident
from planner.pipeline import Layout, memory, step_bound
from planner.solve.branches import Activity, Branches
from planner.solve.space import Choice, Rows, Space
from planner.specs.problem import Problem
from planner.technique import SLOTS, Context

if TYPE_CHECKING:
    from planner.solve.uniform import SearchCounts

__all__ = ["Expansion", "Scored", "Shortfall"]

Index = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """One candidate that fits, with the lower bound of its step time and its column of the block table."""

    bound_s: float
    peak_bytes: float
    recipe: Mapping[str, Choice]
    row: Mapping[str, float]
    layout: Layout
    recompute_layers: int | None
    table: BlockTable

    @property
    def schedule(self) -> str:
        """Name of the order generator."""
        technique = self.recipe["schedule"].technique
        assert technique is not None
        return technique.order

    def micro_batches(self, global_batch_size: int) -> int:
        """Micro-batches per step."""
        return round(global_batch_size / (self.row["dp"] * self.row["micro_batch_size"]))


@dataclass(frozen=True, slots=True, eq=False)
class Shortfall:
    """The candidate that came closest to fitting: which memory binds, and by how much."""

    binding: str
    needed_bytes: float
    budget_bytes: float
    recipe: Mapping[str, Choice]
    row: Mapping[str, float]
    layout: Layout

    @property
    def excess(self) -> float:
        """What it needs, relative to the budget."""
        return self.needed_bytes / self.budget_bytes


class Expansion:
    """Branch tables of one prefix on the rows that are still open."""

    def __init__(
        self, problem: Problem, space: Space, branches: Branches, pricer: Pricer, kinds: tuple[str, ...],
        recipe: Mapping[str, Choice], ctx: Context, rows: Rows, ledger: Ledger, counts: SearchCounts,
    ) -> None:  # fmt: skip
        self.problem, self.space, self.branches, self.pricer, self.kinds = (
            problem,
            space,
            branches,
            pricer,
            kinds,
        )
        self.recipe, self.rows, self.counts = recipe, rows, counts
        self.ctx, self.knobs = ctx, ctx.knobs
        self.activity: Activity = branches.activity(rows, self.knobs)
        self.communicators = sum(
            (rows.values[name] > 1).astype(float) for name in ("tp", "cp", "dp", "pp", "ep")
        )
        self._ledgers: dict[tuple[str, ...], Ledger] = {(): ledger}
        self._tables: dict[tuple[int, int, int], Array] = {}
        self._changes: dict[tuple[str, ...], _Change] = {}
        self._change({})
        self.nearest: Shortfall | None = None

    def price(self, schedule: Choice, layout: Layout, rows: Index, bar: float) -> list[Scored]:
        """Scores every branch of the rows under one layout; returns what fits and has a bound below the bar.

        Every candidate is counted once: scored, rejected for memory, or excluded by a bound.
        """
        branches, n = self.branches, len(rows)
        fits = np.zeros((len(branches.swaps), len(branches.recomputes), len(branches.states), n), dtype=bool)
        hopeless = ~self.activity.states[:, rows]
        found: list[Scored] = []
        overfull = self._overfull(layout, rows, ~hopeless)
        hopeless |= overfull
        for swap in range(len(branches.swaps)):
            for recompute, choice in enumerate(branches.recomputes):
                width = branches.width(choice, layout.layers)
                open_ = self.activity.recomputes[recompute, rows] & self.activity.states[:, rows]
                if not width or not open_.any():
                    continue
                dominated = np.zeros_like(open_)
                for r, s in branches.no_more(recompute, swap):
                    dominated |= fits[s, r]
                self.counts.excluded_by_bound["dominated"] += width * int(
                    (open_ & dominated & ~hopeless).sum()
                )
                self.counts.excluded_by_bound["step time"] += width * int((open_ & hopeless & ~overfull).sum())
                self.counts.rejected["device memory"] += width * int((open_ & overfull).sum())
                states, at = np.nonzero(open_ & ~dominated & ~hopeless)
                if not len(states):
                    continue
                jobs = _Jobs(schedule, layout, recompute, swap, states, rows[at], width)
                fit, bound_s, scored = self._evaluate(jobs, bar)
                fits[swap, recompute, states, at] = fit
                found += scored
                if choice.technique is None and swap == 0:
                    # Whatever else a state does on a row only adds time to this.
                    hopeless[states, at] |= bound_s >= bar
        return found

    def _overfull(self, layout: Layout, rows: Index, states: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """States whose gradients, optimizer and framework alone exceed the device, whatever is recomputed or swapped."""
        full = np.zeros_like(states)
        stack = self.problem.stack
        idle = stack.framework_bytes.value + stack.communicator_bytes.value * self.communicators[rows]
        for state in np.flatnonzero(states.any(axis=1)):
            table = BlockTable(self.kinds, self._table(int(state), 0, 0))
            held = layout.first_counts @ (table["gradients_bytes"] + table["optimizer_bytes"])[:, rows]
            full[state] = held.max(axis=0) + idle > self.problem.memory_budget_bytes
        return full & states

    def _evaluate(self, jobs: _Jobs, bar: float) -> tuple[NDArray[np.bool_], Array, list[Scored]]:
        """Prices jobs that share a layout, a recompute choice and a swap."""
        choice = self.branches.recomputes[jobs.recompute]
        table = BlockTable(self.kinds, self._columns(jobs))
        micro_batches = self.ctx.micro_batches[jobs.rows]
        by_layers = self.branches.by_layers(choice)
        layers: Array | None = self._fewest_layers(jobs, table, micro_batches) if by_layers else None
        bound_s = step_bound(table, jobs.layout, micro_batches, layers)
        peak, host = self._memory(jobs, table, micro_batches, layers)
        budget, host_budget = self.problem.memory_budget_bytes, self.problem.cluster.host_memory_bytes
        on_device, on_host = peak <= budget, host <= host_budget
        fit = on_device & on_host
        self._count(jobs, on_device, on_host)
        if not fit.all():
            self._note_nearest(
                jobs, np.where(on_device, host / max(host_budget, 1.0), peak / budget), peak, host, on_device
            )
        keep = np.flatnonzero(fit & (bound_s < bar))
        values = table.values
        recipes = {
            s: {
                **self.recipe,
                **self.branches.recipe(s, jobs.recompute, jobs.swap),
                "schedule": jobs.schedule,
            }
            for s in set(jobs.states[keep].tolist())
        }
        scored = [
            Scored(
                float(bound_s[i]), float(peak[i]), recipes[int(jobs.states[i])],
                {name: float(column[jobs.rows[i]]) for name, column in self.rows.values.items()}, jobs.layout,
                None if layers is None else int(layers[i]), BlockTable(self.kinds, values[:, :, i : i + 1]),
            )
            for i in keep.tolist()
        ]  # fmt: skip
        return fit, bound_s, scored

    def _count(self, jobs: _Jobs, on_device: NDArray[np.bool_], on_host: NDArray[np.bool_]) -> None:
        """One candidate per job is scored or rejected; the other layer counts behind it are excluded or rejected with it."""
        fitting = int((on_device & on_host).sum())
        rejected: Counter[str] = self.counts.rejected
        rejected["device memory"] += jobs.width * int((~on_device).sum())
        rejected["host memory"] += jobs.width * int((on_device & ~on_host).sum())
        self.counts.scored += fitting
        if jobs.width > 1:
            self.counts.excluded_by_bound["recompute layers"] += (jobs.width - 1) * fitting

    def _fewest_layers(self, jobs: _Jobs, table: BlockTable, micro_batches: Array) -> Array:
        """The fewest recomputed layers that fit (time grows and memory shrinks with each); all but one where none do."""
        fixed = self.space.fixed.get("recompute_layers")
        if fixed is not None:
            return np.full(len(jobs.rows), float(min(fixed, jobs.layout.layers)))
        low, high = np.ones(len(jobs.rows)), np.full(len(jobs.rows), float(max(jobs.layout.layers - 1, 1)))
        while np.any(low < high):
            middle = np.floor((low + high) / 2)
            peak, _ = self._memory(jobs, table, micro_batches, middle)
            fit = peak <= self.problem.memory_budget_bytes
            low, high = np.where(fit, low, np.minimum(middle + 1, high)), np.where(fit, middle, high)
        return high

    def _memory(
        self, jobs: _Jobs, table: BlockTable, micro_batches: Array, layers: Array | None
    ) -> tuple[Array, Array]:
        technique = jobs.schedule.technique
        assert technique is not None
        return memory(
            table,
            jobs.layout,
            technique.order,
            micro_batches,
            self.problem.stack,
            self.communicators[jobs.rows],
            layers,
        )

    def _columns(self, jobs: _Jobs) -> Array:
        """Block-table columns of the jobs: (fields, kinds, jobs)."""
        parts = []
        for state in np.unique(jobs.states):
            at = jobs.rows[jobs.states == state]
            parts.append(self._table(int(state), jobs.recompute, jobs.swap)[:, :, at])
        return np.concatenate(parts, axis=2)

    def _table(self, state: int, recompute: int, swap: int) -> Array:
        """The block table of one branch on all rows of the expansion.

        Where what recompute and swaps change is independent of what the state changes, the table is the sum of both
        changes; else the branch's own ledger is built.
        """
        key = (state, recompute, swap)
        if key not in self._tables:
            whole = self.branches.recipe(*key)
            of_state = {slot: whole[slot] for slot in self.branches.states[state]}
            rest = {slot: choice for slot, choice in whole.items() if slot not in of_state}
            one, other = self._change(of_state), self._change(rest)
            if one.independent_of(other):
                self._tables[key] = one.values + other.delta
            else:
                self._tables[key] = self._change(whole).values
        return self._tables[key]

    def _change(self, recipe: Mapping[str, Choice]) -> _Change:
        """What a partial recipe makes of the prefix's ledger."""
        key = tuple(f"{slot}={choice.value}" for slot, choice in recipe.items() if choice.technique is not None)
        if key not in self._changes:
            ledger = self._ledger(recipe)
            values = tabulate(ledger, self.pricer, self.kinds, len(self.rows)).values
            base = self._changes[()] if key else None
            if base is None:
                change = _Change(values, np.zeros(1), frozenset(), frozenset())
            else:
                change = _Change(values, values - base.values, *_difference(self._ledgers[()], ledger))
            self._changes[key] = change
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
                ctx = ctx or replace(self.ctx, knobs={**self.knobs, **self.space.knobs(recipe)})
                self._ledgers[done] = choice.technique.apply(ledger, ctx)
            ledger = self._ledgers[done]
        return ledger

    def _note_nearest(
        self, jobs: _Jobs, excess: Array, peak: Array, host: Array, on_device: NDArray[np.bool_]
    ) -> None:
        """Remembers the candidate that misses its budget by the least."""
        missing = np.where(excess > 1.0, excess, np.inf)
        i = int(np.argmin(missing))
        if self.nearest is not None and self.nearest.excess <= missing[i]:
            return
        binding = "host memory" if on_device[i] else "device memory"
        needed = float(host[i] if on_device[i] else peak[i])
        budget = self.problem.cluster.host_memory_bytes if on_device[i] else self.problem.memory_budget_bytes
        recipe = {
            **self.recipe,
            **self.branches.recipe(int(jobs.states[i]), jobs.recompute, jobs.swap),
            "schedule": jobs.schedule,
        }
        row = {name: float(column[jobs.rows[i]]) for name, column in self.rows.values.items()}
        self.nearest = Shortfall(binding, needed, budget, recipe, row, jobs.layout)


@dataclass(frozen=True, slots=True, eq=False)
class _Jobs:
    """Candidates that share everything but state and row; ``states`` is sorted."""

    schedule: Choice
    layout: Layout
    recompute: int
    swap: int
    states: Index
    rows: Index
    width: int


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """A partial recipe's block table, its difference to the prefix's, and what it touched.

    ``removed``: ids of the prefix's items that it replaced or dropped. ``timed``: blocks and phases whose seconds it changed,
    where overlap makes changes interact.
    """

    values: Array
    delta: Array
    removed: frozenset[int]
    timed: frozenset[tuple[str, str]]

    def independent_of(self, other: _Change) -> bool:
        """Whether both changes can be added up."""
        return not (self.removed & other.removed or self.timed & other.timed)


def _difference(before: Ledger, after: Ledger) -> tuple[frozenset[int], frozenset[tuple[str, str]]]:
    """Items of ``before`` that are not in ``after``, and the blocks and phases where timed items differ."""
    old, new = {id(item): item for item in before.items}, {id(item): item for item in after.items}
    removed = frozenset(old.keys() - new.keys())
    changed = [old[i] for i in removed] + [new[i] for i in new.keys() - old.keys()]
    timed = frozenset((i.block, i.phase) for i in changed if i.phase != "step" and not isinstance(i, Resident))
    return removed, timed
