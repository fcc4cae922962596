"""Prices the branches of rows that can still win."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from planner.costs.arrays import distinct
from planner.engine.block_table import HELD, TIMES, BlockTable
from planner.ledger import Array
from planner.pipeline.composer import held_bytes, memory, step_bound
from planner.pipeline.layout import Dealt, Layout
from planner.solve.branches import Activity, Branches, Faults
from planner.solve.candidates import Batch, Jobs, Pending, SearchCounts, Shortfall
from planner.solve.columns import Columns, editor_of
from planner.solve.pairs import Pairs
from planner.solve.space import Choice, Rows, order_of
from planner.solve.tables import BranchTables
from planner.specs.problem import Problem
from planner.uncertainty.memory_limit import exceeded_bytes

__all__ = ["Expansion"]

Index = NDArray[np.intp]
_Held = dict[
    str, tuple[Array, float]
]  # bytes that each job needs in a tier, and the tier's capacity per device

RISK = "risk of running out of memory"
TIERS = {"host": "host memory", "cxl": "CXL memory", "nvme": "NVMe"}

_TOGETHER = 16384  # candidates priced at once


class Expansion:
    """Rows of several prefixes, end to end, priced together.

    Args:
        problem: the problem.
        branches: additive choices.
        tables: per prefix, its branch tables on the rows that are open.
        rows: per prefix, those rows.
        activities: per prefix, which states and recompute choices say something of their own on each.
        counts: where candidates are counted.
    """

    def __init__(
        self,
        problem: Problem,
        branches: Branches,
        tables: Sequence[BranchTables],
        rows: Sequence[Rows],
        activities: Sequence[Activity],
        counts: SearchCounts,
    ) -> None:
        self.problem, self.branches, self.tables, self.counts = problem, branches, tables, counts
        self.values = {name: np.concatenate([part.values[name] for part in rows]) for name in rows[0].values}
        self.micro_batches = np.concatenate([table.ctx.micro_batches for table in tables])
        self.activities = list(activities)
        self.states = np.concatenate([activity.states for activity in activities], axis=1)
        self.recomputes = np.concatenate([activity.recomputes for activity in activities], axis=1)
        groups = [self.values[name] > 1 for name in ("tp", "cp", "dp", "pp", "ep")]
        self.communicators = np.stack(groups).astype(float).sum(axis=0)
        self.columns = Columns(branches, tables, self.states)
        self.starts, self.prefix_of = self.columns.starts, self.columns.prefix_of
        self.nearest: Shortfall | None = None
        self._launched: dict[tuple[str, int, str, int, int, int, int], Faults] = {}

    def __len__(self) -> int:
        return len(self.prefix_of)

    def without_idle_prefixes(self, rows: Index) -> tuple[Expansion, Index]:
        """The expansion of the prefixes of some rows alone, with their tables as they are, and those rows' places in it."""
        mine = distinct(self.prefix_of[rows])
        parts = [self._rows(np.arange(self.starts[prefix], self.starts[prefix + 1])) for prefix in mine]
        tables, activities = ([each[prefix] for prefix in mine] for each in (self.tables, self.activities))
        few = Expansion(self.problem, self.branches, tables, parts, activities, self.counts)
        local = rows - self.starts[self.prefix_of[rows]]
        return few, few.starts[np.searchsorted(mine, self.prefix_of[rows])] + local

    def narrow(self, rows: Index) -> Expansion:
        """The expansion of some of the rows alone; ``rows`` is sorted."""
        tables, parts, activities = [], [], []
        for prefix in distinct(self.prefix_of[rows]).tolist():
            mine = rows[self.prefix_of[rows] == prefix]
            local = mine - self.starts[prefix]
            tables.append(self.tables[prefix].take(local))
            activities.append(self.activities[prefix].take(local))
            parts.append(self._rows(mine))
        return Expansion(self.problem, self.branches, tables, parts, activities, self.counts)

    def _rows(self, index: Index) -> Rows:
        return Rows({name: column[index] for name, column in self.values.items()})

    def plain(self, pairs: Pairs) -> tuple[Batch, Pending]:
        """Scores the pairs' open states without recompute or swaps; returns it with what is left to try."""
        states, at = np.nonzero(pairs.open & (self._width(0, pairs.layouts.deal(pairs.of), pairs.rows) > 0))
        layout, rows = pairs.layouts.deal(pairs.of[at]), pairs.rows[at]
        plain = np.zeros(len(at), dtype=np.intp)
        jobs = Jobs(pairs.schedule, layout, plain, plain, states, rows, self._width(0, layout, rows))
        table = self.columns.of(jobs)
        fit, bound_s, batch = self.evaluate(jobs, table=table)
        shape = (len(self.branches.swaps), len(self.branches.recomputes), len(at))
        fits, bounds_s = np.zeros(shape, dtype=bool), np.zeros(shape)
        fits[0, 0], bounds_s[0, 0] = fit, bound_s
        return batch, Pending(
            self, jobs, bounds_s, fits, self._overfull(jobs, table), self._saving_s(jobs, table)
        )

    def open_pairs(self, pending: Pending, bar: float) -> Index:
        """Pairs whose other branches are worth a look; those of the others are counted as excluded or rejected.

        Whatever else a state does on a row only adds time to its plain branch: nothing else can win where that fits, or where
        its bound is not under the bar, but for swaps that save, and then by no more than that. Where what cannot be moved
        exceeds the device, nothing fits.
        """
        branches, rows = self.branches, pending.jobs.rows
        if branches.recomputes[0].technique is not None or branches.moves_activations(
            0, pending.jobs.schedule
        ):
            return np.arange(len(rows))
        others = -self._width(0, pending.jobs.layout, rows)
        for recompute in range(len(branches.recomputes)):
            others += len(branches.swaps) * self._width(recompute, pending.jobs.layout, rows)
        fits, late = pending.fits[0, 0] & (not branches.any_saves), pending.floor_s >= bar
        full = pending.overfull
        self.counts.excluded_by_bound["dominated"] += int(others[fits].sum())
        self.counts.excluded_by_bound["step time"] += int(others[late & ~fits].sum())
        self.counts.rejected["device memory"] += int(others[full & ~late & ~fits].sum())
        return np.flatnonzero(~(fits | late | full))

    def rest(self, pending: Pending, chosen: Index, swaps: Sequence[int], bar: float) -> list[Batch]:
        """Scores more branches of the chosen (state, row) pairs with some swaps, none of which does less than another, those
        with less recompute first; returns what fits.

        A branch is excluded where another of its pair that does less has a bound that is not under the bar (more work only
        adds time), or fits (more work has nothing to offer).
        """
        found: list[Batch] = []
        few = pending.jobs.take(chosen)
        for together in self.branches.waves:
            ways = list(product(together, swaps))
            left = [self._undecided(pending, few, chosen, *way, bar) for way in ways]
            at, width, least_s = (np.concatenate(each) for each in zip(*left, strict=True))
            if not len(at):
                continue
            recomputes, moved = np.repeat(np.array(ways).T, [len(at) for at, *_ in left], axis=1)
            pairs = chosen[at]
            jobs = few.take(at)._replace(recomputes=recomputes, swaps=moved, width=width)
            for begin in range(0, len(at), _TOGETHER):
                some = np.arange(begin, min(begin + _TOGETHER, len(at)))
                fit, bound_s, batch = self.evaluate(jobs.take(some), bar)
                where = (moved[some], recomputes[some], pairs[some])
                pending.fits[where], pending.bounds_s[where] = fit, np.maximum(bound_s, least_s[some])
                if len(batch.fitting):
                    found.append(batch)
        return found

    def _undecided(
        self, pending: Pending, jobs: Jobs, chosen: Index, recompute: int, swap: int, bar: float
    ) -> tuple[Index, NDArray[np.int64], Array]:
        """Chosen pairs whose branch has to be priced, the candidates behind each, and the largest bound of branches that do less.

        The candidates of the others are counted. ``jobs`` are those of the chosen pairs.
        """
        width = self._width(recompute, jobs.layout, jobs.rows)
        if (swap, recompute) == (0, 0) or not width.any():
            return np.zeros(0, dtype=np.intp), width[:0], np.zeros(0)
        less = np.array(self.branches.no_more(recompute, swap, jobs.schedule), dtype=np.intp).reshape(-1, 2)
        where = less[:, 1:], less[:, :1], chosen
        dominated = pending.fits[where].any(axis=0)
        least_s = pending.bounds_s[where].max(axis=0, initial=0.0)
        if self.branches.saves(swap):
            least_s = np.maximum(least_s, pending.floor_s[chosen])
        late, full = least_s >= bar, pending.overfull[chosen]
        self.counts.excluded_by_bound["dominated"] += int(width[dominated].sum())
        self.counts.excluded_by_bound["step time"] += int(width[late & ~dominated].sum())
        self.counts.rejected["device memory"] += int(width[full & ~late & ~dominated].sum())
        at = np.flatnonzero((width > 0) & ~(dominated | late | full))
        return at, width[at], least_s[at]

    def _width(self, recompute: int, layout: Layout | Dealt, rows: Index) -> NDArray[np.int64]:
        """Candidates behind one recompute choice on each row."""
        each = self.branches.widths(self.branches.recomputes[recompute], layout.layers)
        width: NDArray[np.int64] = self.recomputes[recompute, rows] * each
        return width

    def _overfull(self, jobs: Jobs, table: BlockTable) -> NDArray[np.bool_]:
        """Jobs that exceed the device by what no recompute or swap of the space moves: gradients, optimizer states, framework."""
        stack = self.problem.stack
        fixed = [
            table[f"{pool}_bytes"] for pool in ("gradients", "optimizer") if pool not in self.branches.moved
        ]
        held = held_bytes(jobs.layout, sum(fixed, np.zeros_like(table["gradients_bytes"])))
        idle = stack.framework_bytes.value + stack.communicator_bytes.value * self.communicators[jobs.rows]
        least = held.max(axis=0) + idle
        full: NDArray[np.bool_] = least > self.problem.memory_budget_bytes
        if full.any():
            i = int(np.argmin(np.where(full, least, np.inf)))
            self._note(
                jobs, i, "device memory", float(least[i]), self.problem.memory_budget_bytes, at_least=True
            )
        return full

    def _saving_s(self, jobs: Jobs, table: BlockTable) -> Array:
        """What a swap may save of the plain branches' time: their updates, on the device where they take longest."""
        if not self.branches.any_saves:
            return np.zeros(len(jobs.rows))
        saving: Array = held_bytes(jobs.layout, table["main_step_s"]).max(axis=0)
        return saving

    def evaluate(
        self, jobs: Jobs, bar: float = np.inf, *, table: BlockTable | None = None
    ) -> tuple[NDArray[np.bool_], Array, Batch]:
        """Prices jobs that share a schedule: which fit, bounds (zero: not known), and those that are scored.

        Recompute by layers is priced apart from other choices. ``bar``: of a bound that is of use; whether jobs that reach it
        fit is not asked. ``table``: the jobs' columns, where these are known.
        """
        runs, layers = self._launchable(jobs), None
        floors, own = self._floors(jobs, bar) if table is None else (table, np.ones(len(runs), dtype=bool))
        held = table
        if self._by_layers(jobs):
            held = self.columns.of(jobs, HELD)
            layers = self._fewest_layers(jobs, held, floors, bar)
        # Times first, as far as they are known without a ledger of each branch: most are too slow by them, and need no memory.
        bound_s = np.zeros(len(runs)) if floors is None else self._bound(jobs, floors, layers)
        at = self._in_time(jobs, np.flatnonzero(runs), bound_s, bar)
        few, held = jobs.take(at), self.columns.of(jobs.take(at), HELD) if held is None else held.take(at)
        peak, exceeded, slower = self._memory(few, held, None if layers is None else layers[at])
        needs = {"device memory": (peak, self.problem.memory_budget_bytes)}
        for tier, capacity in self.problem.cluster.slower_bytes.items():
            needs[TIERS[tier]] = slower[tier], capacity
        risk = exceeded, float(self.problem.cluster.device.memory_bytes)
        inside = self._within(few, {**needs, RISK: risk})
        if not inside.all():
            self._note_nearest(few, needs)
        fit = np.zeros(len(runs), dtype=bool)
        fit[at] = inside
        # Of jobs that do not fit only recomputation alone is bounded, which says something of all that swaps as well.
        asked = np.flatnonzero(~own & (fit | (runs & (jobs.swaps == 0) & (floors is None))))
        if len(asked):
            times, counts = (
                self.columns.of(jobs.take(asked), TIMES),
                None if layers is None else layers[asked],
            )
            bound_s[asked] = self._bound(jobs.take(asked), times, counts)
        scored = self._in_time(jobs, np.flatnonzero(fit), bound_s, bar)
        self.counts.excluded_by_bound["recompute layers"] += int((jobs.width - 1)[scored].sum())
        self.counts.scored += len(scored)
        peaks = np.zeros(len(runs))
        peaks[at] = peak
        return fit, bound_s, Batch(self, jobs, scored, bound_s, peaks, layers)

    def _floors(self, jobs: Jobs, bar: float) -> tuple[BlockTable | None, NDArray[np.bool_]]:
        """Times that the jobs are not faster than, where a bar makes them of use, and which of them are their own."""
        if bar == np.inf or editor_of(jobs.schedule) or order_of(jobs.schedule).splits_backward:
            return None, np.zeros(len(jobs.rows), dtype=bool)
        return self.columns.floors(jobs)

    def _bound(self, jobs: Jobs, times: BlockTable, layers: Array | None) -> Array:
        """Lower bounds of the jobs' step times by what their blocks take."""
        micro_batches, order = self.micro_batches[jobs.rows], order_of(jobs.schedule)
        return step_bound(times, jobs.layout, micro_batches, layers, order)

    def _in_time(self, jobs: Jobs, at: Index, bound_s: Array, bar: float) -> Index:
        """Those of some jobs whose bound is under the bar; the others are counted."""
        late = bound_s[at] >= bar
        self.counts.excluded_by_bound["step time"] += int(jobs.width[at[late]].sum())
        return at[~late]

    def _by_layers(self, jobs: Jobs) -> bool:
        """Whether the jobs recompute some of a device's layers."""
        first = jobs.recomputes[:1]  # none where no state of the pairs keeps its rules
        return bool(len(first)) and self.branches.by_layers(self.branches.recomputes[int(first[0])])

    def _launchable(self, jobs: Jobs) -> NDArray[np.bool_]:
        """Jobs whose swaps keep their rules, and that the launcher can run; the others are counted under the reason."""
        ok = np.ones(len(jobs.rows), dtype=bool)
        asked = np.arange(len(ok)) if self.problem.launcher is not None else self._ruled(jobs)
        if not len(asked):
            return ok
        few = jobs.take(asked)
        layouts = np.zeros(len(asked), dtype=np.intp)  # no technique asks for stages
        if self.problem.launcher is not None and isinstance(few.layout, Dealt):
            layouts = few.layout.of
        branches = (few.states, few.recomputes, few.swaps, self.prefix_of[few.rows], layouts)
        numbers = np.ravel_multi_index(branches, [int(each.max()) + 1 for each in branches])
        order = np.argsort(numbers, kind="stable")
        for some in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            faults, prefix = self._late_faults(few, int(some[0])), int(branches[3][some[0]])
            first = faults.first[few.rows[some] - self.starts[prefix]]
            ok[asked[some]] = first < 0
            for index, reason in enumerate(faults.reasons):
                self.counts.rejected[reason] += int(few.width[some[first == index]].sum())
        return ok

    def _ruled(self, jobs: Jobs) -> Index:
        """Jobs with a swap whose rules are about rows."""
        ruled = [self.branches.ruled(swap) for swap in range(len(self.branches.swaps))]
        return np.flatnonzero(np.array(ruled)[jobs.swaps])

    def _late_faults(self, jobs: Jobs, index: int) -> Faults:
        """Every row's first broken rule of swaps and launcher, for the prefix, the layout and the choices of one job."""
        launcher, layout = self.problem.launcher, jobs.layout_of(index)
        state, recompute, swap = (int(of[index]) for of in (jobs.states, jobs.recomputes, jobs.swaps))
        prefix = int(self.prefix_of[jobs.rows[index]])
        key = jobs.schedule.value, layout.virtual_stages, layout.split, recompute, swap, state, prefix
        if key not in self._launched:
            branch = self.branches.recipe(state, recompute, swap)
            knobs = self.branches.space.knobs(
                {**self.tables[prefix].recipe, **branch, "schedule": jobs.schedule}
            )
            knobs |= {"virtual_stages": layout.virtual_stages, "pipeline_layout": layout.split}
            rows = slice(self.starts[prefix], self.starts[prefix + 1])
            ctx = Rows({name: column[rows] for name, column in self.values.items()}).context(
                self.problem, knobs
            )
            faults = self._launched[key] = Faults(rows.stop - rows.start)
            for choice in self.branches.swaps[swap].values() if self.branches.ruled(swap) else ():
                for check in choice.technique.valid(ctx) if choice.technique is not None else ():
                    faults.check(check.reason, check.ok)
            if launcher is not None:
                for check in launcher.valid(ctx):
                    faults.check(f"{launcher.name}: {check.reason}", check.ok)
        return self._launched[key]

    def _within(self, jobs: Jobs, held: _Held) -> NDArray[np.bool_]:
        """Which jobs fit; the others are rejected for the first tier that they exceed, with the layer counts behind them."""
        fitting = np.ones(len(jobs.rows), dtype=bool)
        for tier, (n_bytes, capacity) in held.items():
            inside = n_bytes <= capacity
            self.counts.rejected[tier] += int(jobs.width[fitting & ~inside].sum())
            fitting = fitting & inside
        return fitting

    def _fewest_layers(self, jobs: Jobs, held: BlockTable, floors: BlockTable | None, bar: float) -> Array:
        """The fewest recomputed layers that fit (time grows and memory shrinks with each); all but one where none do.

        Where so many that the floors' bound reaches the bar do not fit, that many: how many more it takes is not asked.
        """
        fixed = self.branches.space.fixed.get("recompute_layers")
        if fixed is not None:
            return np.full(len(jobs.rows), np.minimum(float(fixed), jobs.layout.layers))
        budget, total = self.problem.memory_budget_bytes, float(self.problem.cluster.device.memory_bytes)

        def fitting(some: Jobs, columns: BlockTable, layers: Array) -> NDArray[np.bool_]:
            peak, exceeded, _ = self._memory(some, columns, layers)
            within: NDArray[np.bool_] = (peak <= budget) & (exceeded <= total)
            return within

        most = np.full(len(jobs.rows), np.maximum(jobs.layout.layers - 1.0, 1.0))
        low, high = np.where(fitting(jobs, held, most), 1.0, most), most
        open_ = np.flatnonzero(low < high)
        while len(open_):
            some, middle = jobs.take(open_), np.floor((low[open_] + high[open_]) / 2)
            inside = fitting(some, held.take(open_), middle)
            high[open_[inside]], low[open_[~inside]] = middle[inside], middle[~inside] + 1.0
            if floors is not None:
                inside |= self._bound(some, floors.take(open_), low[open_]) < bar
                open_ = open_[inside]
            open_ = open_[low[open_] < high[open_]]
        return low

    def _memory(
        self, jobs: Jobs, held: BlockTable, layers: Array | None
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Peaks, what they exceed with the chance that is allowed, and bytes in slower tiers."""
        peak, software, slower = memory(
            held,
            jobs.layout,
            order_of(jobs.schedule),
            self.micro_batches[jobs.rows],
            self.problem.stack,
            self.communicators[jobs.rows],
            layers,
        )
        return peak, exceeded_bytes(self.problem, peak, software), slower

    def _note_nearest(self, jobs: Jobs, held: _Held) -> None:
        """Remembers the candidate that misses the first tier that it exceeds by the least."""
        excess, first = np.ones(len(jobs.rows)), np.zeros(len(jobs.rows), dtype=np.intp)
        for number, (n_bytes, capacity) in enumerate(held.values()):
            over = (excess <= 1.0) & (n_bytes > capacity)
            excess = np.where(over, n_bytes / max(capacity, 1.0), excess)
            first = np.where(over, number, first)
        missing = np.where(excess > 1.0, excess, np.inf)
        i = int(np.argmin(missing))
        if np.isinf(missing[i]):
            return
        tier = list(held)[int(first[i])]
        n_bytes, capacity = held[tier]
        self._note(jobs, i, tier, float(n_bytes[i]), capacity)

    def _note(
        self, jobs: Jobs, index: int, binding: str, needed: float, budget: float, *, at_least: bool = False
    ) -> None:
        if self.nearest is None or needed / budget < self.nearest.excess:
            row, recipe = self.row(jobs, index), self.recipe(jobs, index)
            self.nearest = Shortfall(binding, needed, budget, at_least, recipe, row, jobs.layout_of(index))

    def recipe(self, jobs: Jobs, index: int) -> dict[str, Choice]:
        """All choices of one job."""
        prefix = int(np.searchsorted(self.starts, jobs.rows[index], side="right")) - 1
        branch = self.branches.recipe(
            int(jobs.states[index]), int(jobs.recomputes[index]), int(jobs.swaps[index])
        )
        return {**self.tables[prefix].recipe, **branch, "schedule": jobs.schedule}

    def row(self, jobs: Jobs, index: int) -> dict[str, float]:
        """Degrees of one job."""
        return {name: float(column[jobs.rows[index]]) for name, column in self.values.items()}
