"""The exact search of the uniform space: bound, branch, and re-price.

Every candidate is either rejected with a reason, excluded by a bound, or scored with the full cost model:

1. *floors*: once there is a plan, what a prefix's blocks take at least in an endless micro-batch bounds rows without a ledger;
   *prefix bound*: a prefix's ledger, priced without its additive slots, bounds every candidate on a row and layout from below;
2. *branching*: rows that can still win are priced with every branch. A branch that only adds work to one that fits in memory
   cannot beat it (``dominated``), so offload and recompute are tried where memory asks for them;
3. *re-pricing*: scored candidates go to the schedule engine in the order of their bounds, until no bound beats the incumbent.

The best plan is then exact under this model. The others of the list are the best of what was scored: their gap is to it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise, product
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.costs.arrays import distinct
from planner.engine.block_table import TIMES, BlockTable
from planner.engine.pricer import Pricer
from planner.ledger import Array, Ledger
from planner.operators.baseline import EMBEDDING, HEAD, baseline, block_order
from planner.pipeline.composer import step_bound
from planner.pipeline.layout import BOUNDARY, Layout, layouts
from planner.solve.branches import Activity, Branches, Faults
from planner.solve.candidates import Pending, Scored, SearchCounts, Shortfall
from planner.solve.expansion import Expansion
from planner.solve.leftovers import try_leftovers
from planner.solve.pairs import Deal, Dealing, Pairs, sift, together
from planner.solve.prefixes import Alike, Prefix, likely, priced_alike
from planner.solve.ranking import Ranking
from planner.solve.row_floor import RowFloor
from planner.solve.space import Choice, Named, Rows, Space, named, order_of
from planner.solve.tables import BranchTables
from planner.solve.time_limit import ask
from planner.specs.problem import Problem
from planner.technique import SLOTS, Context

__all__ = ["SearchCounts", "UniformSearch"]

_ROWS = 32768  # rows whose ledgers are built and priced at once
_ROWS_FIRST = 8192  # of the first part, whose best plan sets the bar for the floors of all others
_PAIRS = 400_000  # rows and layouts bounded before the best of them are priced
_MANY = 64  # prefixes from which the first is priced on its own, so that there is a bar for the others
_CUTS = (1024, 4096)  # and again, within a wave
_TOGETHER = 16384  # rows and layouts whose plain branches are priced at once
_FIRST = 512  # rows and layouts, best bounds first, after which the bar is set for the first time

Index = NDArray[np.intp]
Recipe: TypeAlias = Mapping[str, Choice]


class UniformSearch:
    """Searches the uniform space of one problem.

    Args:
        problem: the problem.
        top: plans to keep.
        reprice: exact step times of scored candidates (the schedule engine).
        on_progress: called with (prefixes done, prefixes in all).
        rows: places of the rows that prefixes are searched on; without, all (:class:`~planner.solve.space.Space`).
        known: tables of prefixes that there are already, and the places of their rows.
    """

    def __init__(
        self, problem: Problem, top: int, reprice: Callable[[list[Scored]], list[float]],
        on_progress: Callable[[int, int], None] | None = None, rows: Mapping[Named, Index] | None = None,
        known: Mapping[Named, tuple[Index, BranchTables]] | None = None,
    ) -> None:  # fmt: skip
        self.problem, self._known = problem, {} if known is None else known
        self.space = Space(problem, rows)
        self.on_progress = on_progress
        self.counts = SearchCounts()
        self.ranking = Ranking(top, problem.workload.global_batch_size, reprice)
        self.nearest: Shortfall | None = None
        self.order = tuple(block_order(problem.model))
        self.kinds = (*dict.fromkeys(self.order), EMBEDDING, HEAD, BOUNDARY)
        self.pricer = Pricer(problem.cluster, problem.stack)
        self.branches = Branches(self.space)
        self._pending: list[Pending] = []
        self._prefixes: list[Prefix] = []
        self._layouts: dict[int, list[tuple[Choice, Layout]]] = {}
        self._deals: list[Deal] = []
        self._dealings: list[Dealing] = []
        self._waiting = 0  # rows and layouts in them
        ends = {EMBEDDING: 1.0, HEAD: 1.0}
        self.blocks = {kind: float(self.order.count(kind)) for kind in self.kinds} | ends
        self._floor = RowFloor(self.space.rows, self.blocks)

    def run(self) -> list[tuple[float, Scored]]:
        """The best plans by exact step time, best first."""
        recipes, every = list(self.space.prefixes()), np.arange(len(self.space.rows))
        parts = [at for at in (every[:_ROWS_FIRST], every[_ROWS_FIRST:]) if len(at)]
        for number, (at, (index, recipe)) in enumerate(product(parts, enumerate(recipes))):
            if not index:
                self._expand()  # the best plan of the first rows sets the bar for all others
                part, made = self.space.rows.take(at), dict[tuple[str, ...], Ledger]()
                mesh, alike = part.context(self.problem, {}).mesh, Alike(part)
            knobs = self.space.knobs(recipe)
            ctx = replace(part.context(self.problem, knobs), mesh=mesh)
            open_, activity = self._in_time(recipe, part, at, *self._valid(recipe, at, part, ctx))
            if at[0] == 0:
                self._bound(recipe, part, ctx, open_, activity, alike, made, at)
            else:
                for begin in range(0, len(open_), _ROWS):
                    some = np.arange(begin, min(begin + _ROWS, len(open_)))
                    rows = part.take(open_[some])
                    # Forgets other rows' groups.
                    self.pricer = Pricer(self.problem.cluster, self.problem.stack)
                    own, all_, there = rows.context(self.problem, knobs), some - begin, at[open_[some]]
                    self._bound(recipe, rows, own, all_, activity.take(some), Alike(rows), {}, there)
            if self._waiting > (_PAIRS if number or len(recipes) < _MANY else 0):
                self._expand()
            if self.on_progress is not None:
                self.on_progress(number + 1, len(parts) * len(recipes))
        self._expand()
        return self.ranking.complete()

    def _expand(self) -> None:
        """Prices what can still win of all rows and layouts bounded so far, and forgets them."""
        if not self._deals:
            return
        # First the rows of the most promising prefix that are likely to fit: they set the bar for everything else,
        # with whatever recompute and swaps it takes.
        any_likely = any(deal.likely.any() for deal in self._deals)
        likely = {id(d): np.where(d.likely | (not any_likely), d.bound_s, np.inf) for d in self._deals}
        first = min(self._deals, key=lambda deal: float(likely[id(deal)].min())).prefix
        bounds = np.sort(np.concatenate([likely[id(deal)] for deal in self._deals if deal.prefix == first]))
        cut = float(bounds[min(_FIRST, int(np.isfinite(bounds).sum()) - 1)])
        self._wave(lambda deal: (deal.prefix == first) & (likely[id(deal)] <= cut))
        if not self.ranking.best:
            self._leftovers()
        self._wave(lambda deal: (deal.prefix != first) | (likely[id(deal)] > cut))
        self._leftovers()
        self._deals, self._prefixes, self._waiting = [], [], 0

    def _leftovers(self) -> None:
        """Tries what is left of the rows that were priced plain, and forgets them."""
        for work in try_leftovers(self._pending, self.ranking):
            self._note_nearest(work)
        self._pending = []

    # -- step 1: rows of a prefix, and their bounds ----------------------------------------------------------------

    def _valid(self, recipe: Recipe, at: Index, part: Rows, ctx: Context) -> tuple[Index, Activity]:
        """Rows on which a prefix says something of its own and breaks no rule; candidates of those that break one are counted."""
        active = self.space.searched(recipe)[at]
        for slot, choice in recipe.items():
            technique = choice.technique
            if technique is not None and technique.active is not None and slot not in self.space.fixed:
                active &= technique.active(ctx)
                if not active.any():
                    break
        if not len(open_ := np.flatnonzero(active)):
            return open_, self.branches.no_activity()
        fault = self.faults(recipe, ctx.take(open_))
        activity = self.branches.activity(part.take(open_), ctx.knobs)
        self._reject_rows(fault, part.values["pp"][open_], activity)
        valid = np.flatnonzero(fault.first < 0)
        return open_[valid], activity.take(valid)

    def _in_time(
        self, recipe: Recipe, part: Rows, at: Index, open_: Index, activity: Activity
    ) -> tuple[Index, Activity]:
        """Those of a part's rows, ``at`` in the space, whose floor is under the bar; candidates of the others are counted."""
        bar, knobs = self.ranking.bar, self.space.knobs(recipe)
        if bar == np.inf or not len(open_):
            return open_, activity

        def on(rows: Rows) -> tuple[Ledger, Context]:
            ctx = rows.context(self.problem, knobs)
            return self.ledger(recipe, ctx), ctx

        sequences = self.problem.workload.global_batch_size
        late = self._floor.seconds(named(recipe), at[open_], sequences, on, self.pricer) >= bar
        lost, kept = np.flatnonzero(late), np.flatnonzero(~late)
        for *_, variants in self._pairs(part.take(open_[lost]), knobs, activity.take(lost)):
            self.counts.excluded_by_bound["step time"] += int(variants.sum())
        return open_[kept], activity.take(kept)

    def _bound(
        self, recipe: Recipe, part: Rows, whole: Context, open_: Index, activity: Activity, alike: Alike,
        made: dict[tuple[str, ...], Ledger], at: Index,
    ) -> None:  # fmt: skip
        """Bounds a prefix's rows in a part, ``at`` in the space, under each layout, and keeps those that are under the bar."""
        if not len(open_):
            return
        ledger = self.ledger(recipe, whole, made)
        table, of, known = priced_alike(ledger, whole, open_, alike, self.pricer, self.kinds)
        rows = part.take(open_)
        if not (deals := list(self._deal(rows, whole.take(open_), table, activity))):
            return
        # Only the rows that are still open are kept, and nothing of the others.
        used = distinct(np.concatenate([deal.rows for deal in deals]))
        ctx, classes = whole.take(open_[used]), distinct(of[used])
        kept = ledger.take(open_[used], ctx.mesh.counterpart)
        of, known = np.searchsorted(classes, of[used]), known.take(classes)
        places = self.space.places[at[open_[used]]]
        self._prefixes.append(
            Prefix(recipe, rows.take(used), ctx, kept, activity.take(used), of, known, places)
        )
        self._deals += [deal._replace(rows=np.searchsorted(used, deal.rows)) for deal in deals]
        self._waiting += sum(len(deal.rows) for deal in deals)

    def faults(self, recipe: Recipe, ctx: Context) -> Faults:
        """Every row's first broken rule, the arithmetic of the batch and of the layers included."""
        ask()
        devices, batch = self.problem.cluster.devices, self.problem.workload.global_batch_size
        faults = Faults(len(ctx.micro_batch_size))
        faults.check(f"global batch size {batch} not divisible by dp", batch % ctx.mesh.dp == 0)
        for choice in recipe.values():
            if choice.technique is not None:
                for check in choice.technique.valid(ctx):
                    faults.check(check.reason, check.ok)
        if self.problem.launcher is not None:
            for check in self.problem.launcher.valid(ctx):
                faults.check(f"{self.problem.launcher.name}: {check.reason}", check.ok)
        for pp in distinct(ctx.mesh.pp).tolist():
            if not self.layouts_of(int(pp)):
                faults.check(self.space.undealt(int(pp)), ctx.mesh.pp != pp)
        assert np.all(ctx.mesh.devices == devices)
        return faults

    def _reject_rows(
        self, faults: Faults, pp: Array, activity: Activity, only: Sequence[Dealing] | None = None
    ) -> None:
        """Counts every candidate on a faulty row (of one schedule, or of all) under the row's first fault."""
        lost = np.flatnonzero(faults.first >= 0)
        if not len(lost):
            return
        counts, dealt = np.zeros((2, len(lost)), dtype=np.int64)
        for dealing in self.dealings() if only is None else only:
            at, of = dealing.pairs(pp[lost])
            np.add.at(counts, at, self.branches.variants(activity, lost[at], dealing.layers[of]))
            np.add.at(dealt, at, 1)
        alone = np.flatnonzero(
            (dealt == 0) & (only is None)
        )  # a row without any layout is as many candidates as one of one layer
        counts[alone] = self.branches.variants(activity, lost[alone], np.ones(len(alone), dtype=np.int64))
        for index, reason in enumerate(faults.reasons):
            self._reject(reason, int(np.sum(counts[faults.first[lost] == index])))

    def dealings(self) -> list[Dealing]:
        """All layouts of the space; those of a schedule together, unless their runs are as many as their devices."""
        if not self._dealings:
            degrees = [int(pp) for pp in distinct(self.space.rows.values["pp"])]
            for schedule in self.space.choices["schedule"]:
                found = {pp: each for pp in degrees if (each := self.layouts(schedule, pp))}
                alone = [found] if order_of(schedule).alike_in_order else [{pp: found[pp]} for pp in found]
                self._dealings += [Dealing(schedule, each) for each in alone if each]
        return self._dealings

    def layouts(self, schedule: Choice, pp: int) -> list[Layout]:
        """Layouts of one schedule for a pipeline degree."""
        return [layout for choice, layout in self.layouts_of(pp) if choice is schedule]

    def layouts_of(self, pp: int) -> list[tuple[Choice, Layout]]:
        """Schedules and layouts of a pipeline degree."""
        if pp not in self._layouts:
            self._layouts[pp] = list(self._find_layouts(pp))
        return self._layouts[pp]

    def _find_layouts(self, pp: int) -> Iterator[tuple[Choice, Layout]]:
        fixed = self.space.fixed
        room = 3 * self.problem.model.mtp_modules  # a layer and a head each, beside the model's head
        anyhow = "virtual_stages" in fixed  # asked for, so dealt as evenly as it goes where nothing divides
        for schedule in self.space.choices["schedule"]:
            order = order_of(schedule)
            for v in order.chunks((len(self.order) + 2) // pp if pp > 1 else 1):
                if not self.space.allows("virtual_stages", np.array([v]))[0]:
                    continue
                where = order.placement, order.alike_in_order, room, fixed.get("pipeline_layout", "")
                for layout in layouts(self.order, self.kinds, pp, v, *where):
                    launcher = self.problem.launcher
                    runs = launcher is None or launcher.takes_stages(layout.stages, pp)
                    if runs and (v == 1 or layout.split != "balanced" or anyhow):
                        yield schedule, layout

    def _pairs(
        self, rows: Rows, knobs: Mapping[str, Any], activity: Activity
    ) -> Iterator[tuple[Dealing, Index, Index, NDArray[np.int64]]]:
        """A prefix's rows with every layout of their pipeline degree, some at a time: places of rows and of layouts, and the
        candidates of each, which are counted."""
        for schedule, dealings in groupby(self.dealings(), key=lambda dealing: dealing.schedule):
            each = list(dealings)
            works = self._works(schedule, rows, knobs, activity, each)
            for dealing in each:
                at, of = dealing.pairs(rows.values["pp"][works])
                for begin in range(0, len(at), _TOGETHER):
                    where, layouts = works[at[begin : begin + _TOGETHER]], of[begin : begin + _TOGETHER]
                    variants = self.branches.variants(activity, where, dealing.layers[layouts])
                    self.counts.candidates += int(variants.sum())
                    yield dealing, where, layouts, variants

    def _deal(self, rows: Rows, ctx: Context, table: BlockTable, activity: Activity) -> Iterator[Deal]:
        """Bounds a prefix's rows under every layout of their pipeline degree; what is still open, a schedule at a time."""
        counts, timed = np.array([self.blocks[kind] for kind in self.kinds]), table.of_fields(TIMES)
        fits = likely(ctx, table, counts, self.problem.memory_budget_bytes)
        for dealing, where, of, variants in self._pairs(rows, ctx.knobs, activity):
            times, technique = timed.take(where), dealing.schedule.technique
            if self.branches.any_saves or (technique is not None and technique.saves):  # the update's time
                times["main_step_s"][:] = 0.0
            bound_s = step_bound(
                times, dealing.layouts.deal(of), ctx.micro_batches[where], schedule=dealing.order
            )
            late = bound_s >= self.ranking.bar
            self.counts.excluded_by_bound["step time"] += int(variants[late].sum())
            open_ = np.flatnonzero(~late)
            if len(open_):
                where = where[open_]
                yield Deal(
                    dealing, len(self._prefixes), of[open_], where, bound_s[open_], variants[open_], fits[where]
                )  # fmt: skip

    def _works(
        self,
        schedule: Choice,
        rows: Rows,
        knobs: Mapping[str, Any],
        activity: Activity,
        dealings: Sequence[Dealing],
    ) -> Index:
        """Rows that a schedule works on; its broken rules are counted."""
        technique = schedule.technique
        assert technique is not None
        ctx = rows.context(self.problem, {**knobs, "schedule": schedule.value})
        active = np.ones(len(rows), dtype=bool)
        if technique.active is not None and "schedule" not in self.space.fixed:
            active &= technique.active(ctx)
        faults = Faults(len(rows))
        for check in technique.valid(ctx):
            faults.check(check.reason, check.ok)
        faults.first[~active] = -1
        self._reject_rows(faults, rows.values["pp"], activity, dealings)
        return np.flatnonzero(active & (faults.first < 0))

    def ledger(
        self, recipe: Recipe, ctx: Context, made: dict[tuple[str, ...], Ledger] | None = None
    ) -> Ledger:
        """Runs the passes of a (partial) recipe in slot order.

        A pass knows the choices of its own slot and of those before it, so that recipes which begin alike share what they made
        of the same rows, in ``made``.
        """
        made = {} if made is None else made
        done: tuple[str, ...] = ()
        if done not in made:
            workload = self.problem.workload
            made[done] = baseline(
                self.problem.model, batch=ctx.micro_batch_size, seq=float(workload.seq_len),
                encoder_seq=workload.encoder_seq_len, document_len=workload.document_len,
            )  # fmt: skip
        ledger = made[done]
        for slot in SLOTS:
            choice = recipe.get(slot)
            if choice is None:
                continue
            done = (*done, choice.value)
            if choice.technique is not None:
                if done not in made:
                    made[done] = choice.technique.apply(ledger, ctx)
                ledger = made[done]
        return ledger

    # -- step 2: branches of the rows that can still win -------------------------------------------------------------

    def _wave(self, select: Callable[[Deal], NDArray[np.bool_]]) -> None:
        """Prices the selected rows and layouts whose bound is under the bar; counts the other selected ones as excluded."""
        bar = self.ranking.bar
        chosen: list[tuple[Deal, Index]] = []
        for deal in self._deals:
            inside = select(deal)
            lost = inside & (deal.bound_s >= bar)
            self.counts.excluded_by_bound["step time"] += int(deal.variants[lost].sum())
            if np.any(kept := inside & ~lost):
                chosen.append((deal, np.flatnonzero(kept)))
        if not chosen:
            return
        open_ = {
            number: distinct(np.concatenate([deal.rows[at] for deal, at in chosen if deal.prefix == number]))
            for number in sorted({deal.prefix for deal, _ in chosen})
        }
        tables, rows, activities = [], [], []
        for number, used in open_.items():
            prefix = self._prefixes[number].take(used)
            tables.append(self._tables(prefix))
            rows.append(prefix.rows)
            activities.append(prefix.activity)
        work = Expansion(self.problem, self.branches, tables, rows, activities, self.counts)
        place = dict(zip(open_, work.starts[:-1].tolist(), strict=True))
        by_dealing: dict[int, list[tuple[Deal, Index, Index]]] = defaultdict(list)
        for deal, at in chosen:
            where = place[deal.prefix] + np.searchsorted(open_[deal.prefix], deal.rows[at])
            by_dealing[id(deal.dealing)].append((deal, where, at))
        dealt = [together(deals, work.states) for deals in by_dealing.values()]
        if bar < np.inf:
            dealt, late = sift(work, dealt, bar)
            self.counts.excluded_by_bound["step time"] += late
            if not dealt:
                return
            places = np.cumsum([0, *(len(part.rows) for part in dealt)])
            work, at = work.without_idle_prefixes(np.concatenate([part.rows for part in dealt]))
            dealt = [
                part._replace(rows=at[i:j])
                for part, (i, j) in zip(dealt, pairwise(places.tolist()), strict=True)
            ]
        bounds = np.sort(np.concatenate([part.bound_s for part in dealt]))
        cuts = [-np.inf, *(float(bounds[cut]) for cut in _CUTS if cut < len(bounds)), np.inf]
        for low, high in pairwise(cuts):
            for part in dealt:
                self._plain(work, part, low, high)
            self.ranking.settle()
        self._note_nearest(work)

    def _tables(self, prefix: Prefix) -> BranchTables:
        """Tables of a prefix's rows: those that are known, where they are of all these rows."""
        places, (at, known) = prefix.places, self._known.get(named(prefix.recipe), (prefix.places[:0], None))
        if known is not None and np.array_equal(distinct(np.concatenate([at, places])), at):
            return known.of(np.searchsorted(at, places))
        own = prefix.recipe, prefix.ctx, prefix.priced_ledger()
        return BranchTables(self.space, self.branches, self.pricer, self.kinds, *own)

    def _plain(self, work: Expansion, part: Pairs, low: float, high: float) -> None:
        """Scores the plain branches of rows whose bound lies in [low, high) and still under the bar."""
        inside = (part.bound_s >= low) & (part.bound_s < high)
        late = inside & (part.bound_s >= self.ranking.bar)
        self.counts.excluded_by_bound["step time"] += part.candidates(late)
        at = np.flatnonzero(inside & ~late)
        for begin in range(0, len(at), _TOGETHER):
            batch, pending = work.plain(part.take(at[begin : begin + _TOGETHER]))
            self.ranking.add(batch)
            self._pending.append(pending)

    def _note_nearest(self, work: Expansion) -> None:
        """Remembers the candidate that misses its memory by the least."""
        if work.nearest is not None and (self.nearest is None or work.nearest.excess < self.nearest.excess):
            self.nearest = work.nearest

    def _reject(self, reason: str, count: int) -> None:
        if count:
            self.counts.candidates += count
            self.counts.rejected[reason] += count
