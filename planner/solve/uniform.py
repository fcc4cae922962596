"""The exact search of the uniform space: bound, branch, and re-price.

Every candidate is either rejected with a reason, excluded by a bound, or scored with the full cost model:

1. *prefix bound*: a prefix's ledger, priced without its additive slots, bounds every candidate on a row and layout from below;
2. *branching*: rows that can still win are priced with every branch. A branch that only adds work to one that fits in memory
   cannot beat it (``dominated``), so offload and recompute are tried where memory asks for them;
3. *re-pricing*: scored candidates go to the schedule engine in the order of their bounds, until no bound beats the incumbent.

The best plan is then exact under this model: bounds are held against its engine price. The other plans of the list are the best
of what was scored on the way; none can be faster than the best one, and how much slower they are is their gap.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.baseline import EMBEDDING, HEAD, baseline, block_order
from planner.engine import COMPACT, BlockTable, Pricer, tabulate
from planner.layout import BOUNDARY, Layout, Layouts, layouts
from planner.ledger import Array, Ledger
from planner.mesh import Mesh
from planner.pipeline import step_bound
from planner.solve.branches import Branches, Faults
from planner.solve.candidates import Pending, Scored, Shortfall
from planner.solve.expansion import Expansion
from planner.solve.leftovers import try_leftovers
from planner.solve.ranking import Ranking
from planner.solve.space import Choice, Rows, Space, order_of
from planner.solve.tables import BranchTables
from planner.specs.problem import Problem
from planner.technique import SLOTS, Context

__all__ = ["NOT_DEALT", "SearchCounts", "UniformSearch"]

NOT_DEALT = "layers cannot be dealt to the stages"

_ROWS = 32768  # rows whose ledgers are built and priced at once
_PAIRS = 400_000  # rows and layouts bounded before the best of them are priced
_MANY = 64  # prefixes from which the first is priced on its own, so that there is a bar for the others
_CUTS = (1024, 4096)  # and again, within a wave
_TOGETHER = 16384  # rows and layouts whose plain branches are priced at once
_FIRST = 512  # rows and layouts, best bounds first, after which the bar is set for the first time

Index = NDArray[np.intp]


@dataclass(slots=True)
class SearchCounts:
    """How the space was exhausted: ``candidates = scored + all excluded + all rejected``."""

    candidates: int = 0
    scored: int = 0
    repriced: int = 0
    excluded_by_bound: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True, eq=False)
class _Deal:
    """One layout under one schedule, and the rows of a prefix that it deals with, bounded."""

    schedule: Choice
    layout: Layout
    prefix: int
    rows: Index
    bound_s: Array
    variants: NDArray[np.int64]
    likely: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class _Dealt:
    """All layouts of one schedule end to end: rows of an expansion, and of each its layout, bound and candidates."""

    schedule: Choice
    layouts: Layouts
    of: Index
    rows: Index
    bound_s: Array
    variants: NDArray[np.int64]


def _together(deals: Sequence[tuple[_Deal, Index, Index]]) -> _Dealt:
    """Deals of one schedule, each with its rows' places in an expansion, and which of its own these are."""
    layouts = list({id(deal.layout): deal.layout for deal, _, _ in deals}.values())
    number = {id(layout): index for index, layout in enumerate(layouts)}
    of = np.repeat([number[id(deal.layout)] for deal, _, _ in deals], [len(at) for _, _, at in deals])
    return _Dealt(
        deals[0][0].schedule, Layouts(layouts), of, np.concatenate([where for _, where, _ in deals]),
        np.concatenate([deal.bound_s[at] for deal, _, at in deals]),
        np.concatenate([deal.variants[at] for deal, _, at in deals]),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _Prefix:
    """A prefix with its valid rows, and its ledger on them."""

    recipe: Mapping[str, Choice]
    rows: Rows
    ctx: Context
    ledger: Ledger


class UniformSearch:
    """Searches the uniform space of one problem.

    Args:
        problem: the problem.
        top: plans to keep.
        reprice: exact step times of scored candidates (the schedule engine).
        on_progress: called with (prefixes done, prefixes in all).
    """

    def __init__(
        self,
        problem: Problem,
        top: int,
        reprice: Callable[[list[Scored]], list[float]],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.problem = problem
        self.space = Space(problem)
        self.on_progress = on_progress
        self.counts = SearchCounts()
        self.ranking = Ranking(top, problem.workload.global_batch_size, reprice)
        self.nearest: Shortfall | None = None
        self.order = tuple(block_order(problem.model))
        self.kinds = (*dict.fromkeys(self.order), EMBEDDING, HEAD, BOUNDARY)
        self.pricer = Pricer(problem.cluster, problem.stack)
        self.branches = Branches(self.space)
        self._pending: list[Pending] = []
        self._prefixes: list[_Prefix] = []
        self._layouts: dict[int, list[tuple[Choice, Layout]]] = {}
        self._deals: list[_Deal] = []
        self._waiting = 0  # rows and layouts in them

    def run(self) -> list[tuple[float, Scored]]:
        """The best plans by exact step time, best first."""
        recipes, rows = list(self.space.prefixes()), self.space.rows
        parts = [
            rows.take(np.arange(start, min(start + _ROWS, len(rows)))) for start in range(0, len(rows), _ROWS)
        ]
        made: dict[tuple[str, ...], Ledger] = {}
        for done, (part, recipe) in enumerate(product(parts, recipes)):
            if recipe is recipes[0]:
                made, mesh = {}, part.context(self.problem, {}).mesh
            self._bound(recipe, part, mesh, made)
            if self._waiting > (_PAIRS if done or len(recipes) < _MANY else 0):
                self._expand()
            if self.on_progress is not None:
                self.on_progress(done + 1, len(parts) * len(recipes))
        self._expand()
        self.counts.repriced = self.ranking.repriced
        return self.ranking.best

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

    def _bound(
        self, recipe: Mapping[str, Choice], rows: Rows, mesh: Mesh, made: dict[tuple[str, ...], Ledger]
    ) -> None:
        """Keeps the rows on which the prefix is valid, and bounds each of them under each layout."""
        knobs = self.space.knobs(recipe)
        whole = replace(rows.context(self.problem, knobs), mesh=mesh)
        active = np.ones(len(rows), dtype=bool)
        for slot, choice in recipe.items():
            technique = choice.technique
            if technique is not None and technique.active is not None and slot not in self.space.fixed:
                active &= technique.active(whole)
        open_ = np.flatnonzero(active)
        fault = self.faults(recipe, whole.take(open_))
        self._reject_rows(fault, rows.take(open_), knobs)
        open_ = open_[fault.first < 0]
        if len(open_):
            ledger = self.ledger(recipe, whole, made)
            rows, ctx = rows.take(open_), whole.take(open_)
            ledger = ledger.take(open_, ctx.mesh.counterpart)
            table = tabulate(ledger, self.pricer, self.kinds, len(rows), COMPACT)
            deals = list(self._deal(rows, ctx, table))
            if not deals:
                return
            # Only the rows that are still open are kept, without the prices of all the others.
            used = np.unique(np.concatenate([deal.rows for deal in deals]))
            ctx = ctx.take(used)
            self._deals += [replace(deal, rows=np.searchsorted(used, deal.rows)) for deal in deals]
            self._waiting += sum(len(deal.rows) for deal in deals)
            self._prefixes.append(
                _Prefix(recipe, rows.take(used), ctx, ledger.take(used, ctx.mesh.counterpart))
            )

    def faults(self, recipe: Mapping[str, Choice], ctx: Context) -> Faults:
        """Every row's first broken rule, the arithmetic of the batch and of the layers included."""
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
        dealt = {pp: bool(self.layouts_of(int(pp))) for pp in np.unique(ctx.mesh.pp)}
        faults.check(NOT_DEALT, np.array([dealt[pp] for pp in ctx.mesh.pp]))
        assert np.all(ctx.mesh.devices == devices)
        return faults

    def _reject_rows(
        self, faults: Faults, rows: Rows, knobs: Mapping[str, Any], only: Choice | None = None
    ) -> None:
        """Counts every candidate on a faulty row (of one schedule, or of all) under the row's first fault."""
        lost = np.flatnonzero(faults.first >= 0)
        if not len(lost):
            return
        rows, first = rows.take(lost), faults.first[lost]
        activity = self.branches.activity(rows, knobs)
        for pp in np.unique(rows.values["pp"]):
            at = rows.values["pp"] == pp
            deals = [
                layout for schedule, layout in self.layouts_of(int(pp)) if only is None or schedule is only
            ]
            counts = self.branches.variants(activity, [deal.layers for deal in deals] or [1])
            for index, reason in enumerate(faults.reasons):
                self._reject(reason, int(np.sum(counts * (at & (first == index)))))

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
        for schedule in self.space.choices["schedule"]:
            order = order_of(schedule)
            for v in order.chunks((len(self.order) + 2) // pp if pp > 1 else 1):
                if not self.space.allows("virtual_stages", np.array([v]))[0]:
                    continue
                for layout in layouts(self.order, self.kinds, pp, v, order.placement, order.alike_in_order):
                    launcher, split = self.problem.launcher, layout.split
                    runs = launcher is None or split in launcher.layouts
                    wanted = fixed.get("pipeline_layout", split) == split and (v == 1 or split != "balanced")
                    if runs and wanted:
                        yield schedule, layout

    def _deal(self, rows: Rows, ctx: Context, table: BlockTable) -> Iterator[_Deal]:
        """Bounds a prefix's rows under every layout of their pipeline degree; what is still open, a layout at a time."""
        activity = self.branches.activity(rows, ctx.knobs)
        micro_batches = ctx.micro_batches
        likely = self._likely(ctx, table)
        for pp in np.unique(ctx.mesh.pp):
            at = np.flatnonzero(ctx.mesh.pp == pp)
            part = BlockTable.compact(self.kinds, np.ascontiguousarray(table.values[:, :, at]))
            if self.branches.any_saves:  # updates may hide
                part["main_step_s"][:] = 0.0
            masks: dict[str, NDArray[np.bool_]] = {}
            for schedule, layout in self.layouts_of(int(pp)):
                if schedule.value not in masks:
                    masks[schedule.value] = self._schedule_mask(schedule, rows.take(at), ctx.knobs)
                keep = np.flatnonzero(masks[schedule.value])
                if not len(keep):
                    continue
                bound_s = step_bound(part, layout, micro_batches[at], schedule=order_of(schedule))[keep]
                variants = self.branches.variants(activity, [layout.layers])[at[keep]]
                self.counts.candidates += int(variants.sum())
                late = bound_s >= self.ranking.bar
                if late.any():
                    self.counts.excluded_by_bound["step time"] += int(variants[late].sum())
                    keep, bound_s, variants = keep[~late], bound_s[~late], variants[~late]
                if len(keep):
                    where = at[keep]
                    yield _Deal(
                        schedule, layout, len(self._prefixes), where, bound_s, variants, likely[where]
                    )

    def _likely(self, ctx: Context, table: BlockTable) -> NDArray[np.bool_]:
        """Rows that would about fit under 1F1B with the optimizer sharded; this orders the work and excludes nothing."""
        counts = np.array([float(self.order.count(kind)) for kind in self.kinds])
        counts[self.kinds.index(EMBEDDING)] = counts[self.kinds.index(HEAD)] = 1.0
        optimizer = counts @ table["optimizer_bytes"]
        in_flight = np.minimum(ctx.micro_batches, ctx.mesh.pp)
        each = (
            counts @ table["always_bytes"]
            - optimizer
            + optimizer / ctx.mesh.dp
            + in_flight * (counts @ table["saved_bytes"])
        )
        fits: NDArray[np.bool_] = each / ctx.mesh.pp <= self.problem.memory_budget_bytes
        return fits

    def _schedule_mask(self, schedule: Choice, rows: Rows, knobs: Mapping[str, Any]) -> NDArray[np.bool_]:
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
        self._reject_rows(faults, rows, knobs, only=schedule)
        mask: NDArray[np.bool_] = active & (faults.first < 0)
        return mask

    def ledger(
        self, recipe: Mapping[str, Choice], ctx: Context, made: dict[tuple[str, ...], Ledger] | None = None
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

    def _wave(self, select: Callable[[_Deal], NDArray[np.bool_]]) -> None:
        """Prices the selected rows and layouts whose bound is under the bar; counts the other selected ones as excluded."""
        bar = self.ranking.bar
        chosen: list[tuple[_Deal, Index]] = []
        for deal in self._deals:
            inside = select(deal)
            lost = inside & (deal.bound_s >= bar)
            self.counts.excluded_by_bound["step time"] += int(deal.variants[lost].sum())
            kept = deal.rows[inside & ~lost]
            if len(kept):
                chosen.append((deal, kept))
        if not chosen:
            return
        open_ = {
            number: np.unique(np.concatenate([kept for deal, kept in chosen if deal.prefix == number]))
            for number in {deal.prefix for deal, _ in chosen}
        }
        tables, rows = [], []
        for number, used in open_.items():
            prefix = self._prefixes[number]
            ctx = prefix.ctx.take(used)
            ledger = prefix.ledger.take(used, ctx.mesh.counterpart)
            tables.append(
                BranchTables(self.space, self.branches, self.pricer, self.kinds, prefix.recipe, ctx, ledger)
            )
            rows.append(prefix.rows.take(used))
        work = Expansion(self.problem, self.branches, tables, rows, self.counts)
        place = dict(zip(open_, work.starts[:-1].tolist(), strict=True))
        by_schedule: dict[int, list[tuple[_Deal, Index, Index]]] = defaultdict(list)
        for deal, kept in chosen:
            at = np.searchsorted(deal.rows, kept)
            where = place[deal.prefix] + np.searchsorted(open_[deal.prefix], kept)
            by_schedule[id(deal.schedule)].append((deal, where, at))
        dealt = [_together(deals) for deals in by_schedule.values()]
        bounds = np.sort(np.concatenate([part.bound_s for part in dealt]))
        cuts = [-np.inf, *(float(bounds[cut]) for cut in _CUTS if cut < len(bounds)), np.inf]
        for low, high in pairwise(cuts):
            for part in dealt:
                self._plain(work, part, low, high)
            self.ranking.settle()
        self._note_nearest(work)

    def _plain(self, work: Expansion, part: _Dealt, low: float, high: float) -> None:
        """Scores the plain branches of rows whose bound lies in [low, high) and still under the bar."""
        inside = (part.bound_s >= low) & (part.bound_s < high)
        late = inside & (part.bound_s >= self.ranking.bar)
        self.counts.excluded_by_bound["step time"] += int(part.variants[late].sum())
        at = np.flatnonzero(inside & ~late)
        for begin in range(0, len(at), _TOGETHER):
            some = at[begin : begin + _TOGETHER]
            batch, pending = work.plain(part.schedule, part.layouts.deal(part.of[some]), part.rows[some])
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
