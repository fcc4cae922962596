"""The layer-wise space: meshes, how their stages may be cut, and what no plan of each is faster than.

A *deal* is a mesh (prefix and row), a schedule, and either one layout or, with one stage per device, any cuts. Interleaved
schedules take the layouts of the uniform search or, where it has none, virtual stages that are equal but for one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.costs.arrays import distinct
from planner.engine.block_table import TIMES, BlockTable, tabulate
from planner.ledger import Array
from planner.pipeline.composer import step_bound, tight_bound
from planner.pipeline.layout import Layout
from planner.solve.layerwise.cuts import SCHEDULES, cuts, name_of
from planner.solve.layerwise.meshes import Deal, Meshes
from planner.solve.layerwise.relaxation import AtPrices, Relaxation, in_flight, path_factor
from planner.solve.layerwise.rows import DegreeRows, some_of
from planner.solve.layerwise.strategies import Strategies
from planner.solve.space import Choice, Named, named
from planner.solve.tables import BranchTables
from planner.solve.time_limit import ask
from planner.solve.uniform import UniformSearch
from planner.uncertainty.memory_limit import room_bytes

__all__ = ["Deal", "LayerwiseSpace"]

_LOOSE = 1.01  # times a limit, for which bounds by memory are known that do for the limit too


class _Pool(NamedTuple):
    """What all devices' memory together says of a prefix's rows of one pipeline degree.

    Attributes:
        below_s: limit for which it is known.
        rows: which, in order.
        work_s: what each takes at least.
        open: those that may take less than the limit.
        priced: what bounds their layouts.
    """

    below_s: float
    rows: NDArray[np.intp]
    work_s: Array
    open: NDArray[np.intp]
    priced: AtPrices


class LayerwiseSpace(Meshes):
    """All deals of a problem that bounds do not exclude at once.

    Args:
        uniform: the uniform search of the problem, which knows its prefixes and rules.
        below_s: deals that cannot be faster are left out.
        uneven: whether cuts are open.
    """

    def __init__(self, uniform: UniformSearch, below_s: float, uneven: bool) -> None:
        super().__init__()
        self.uniform = uniform
        self.problem, self.order, self.kinds = uniform.problem, uniform.order, uniform.kinds
        self.layers = np.array([float(self.order.count(kind)) for kind in self.kinds[:-1]])
        self.layers[-2:] = 1.0
        self.excluded = {"work": 0, "memory": 0}
        self.meshes = 0
        self.parts: list[Strategies] = []
        self.least_s: dict[int, float] = {}
        """By pipeline degree, what none of its deals is faster than."""
        self.at: list[NDArray[np.intp]] = []
        """By prefix, the places of its rows in the uniform space."""
        self.others: dict[Named, NDArray[np.intp]] = {}
        """Places of rows of prefixes that are not searched here."""
        self._tables: list[BlockTable] = []
        self._opened: dict[int, tuple[DegreeRows, Array, list[tuple[Choice, Layout | None, int]]]] = {}
        self._priced_below_s: dict[int, float] = {}
        self._walked: set[int] = set()  # pipeline degrees whose rows are bounded by paths
        # By it, of the rows of a pipeline degree; infinite where deals are known. And the least of these, by the limit.
        self._floor_s: dict[int, Array] = {}
        self._least: dict[float, dict[int, float]] = {}
        self._pools: dict[tuple[int, int], _Pool] = {}  # by pipeline degree and prefix
        launcher = self.problem.launcher
        self._named_only = not uneven or (launcher is not None and launcher.stages is not None)
        self._narrow(below_s)
        self._pooled = np.zeros(len(self.parts), dtype=bool)  # prefixes that are bounded by memory

    def deals(self, below_s: float) -> list[Deal]:
        """Deals whose bound is below a limit, smallest bounds first."""
        found: list[Deal] = []
        while (least := self.least(below_s))[1] < below_s:
            if not self.pool(below_s, below_s):
                found += self.deals_of(least[0], below_s)
        return sorted(found, key=Deal.rank)

    def least(self, below_s: float) -> tuple[int, float]:
        """The pipeline degree whose deals that are not yet known may be the fastest, and what none of these is faster than."""
        known = self._least.setdefault(below_s, {})
        for pp in self.least_s.keys() - known.keys():
            known[pp] = float(self._left(pp, below_s).min(initial=np.inf))
        return min(known.items(), key=lambda bound: (bound[1], bound[0]), default=(0, np.inf))

    def pool(self, enough_s: float, below_s: float) -> bool:
        """Bounds a prefix's rows below a limit by all devices' memory together: the prefix, of those that are not, of the fastest
        row; false where no such row is below ``enough_s``."""
        for pp in self.least_s.keys() - self._walked:
            self._walk(pp, below_s)
        fastest, part = enough_s, -1
        for pp in filter(lambda pp: len(self._left(pp, below_s)), self.least_s):
            parts, left = self._open(pp, below_s)[0].part, self._left(pp, below_s)
            at = int(np.argmin(np.where(self._pooled[parts], np.inf, left)))
            if not self._pooled[parts[at]] and left[at] < fastest:
                fastest, part = float(left[at]), int(parts[at])
        if part < 0:
            return False
        self._pooled[part] = True
        self._least.clear()
        for degree in self.least_s:
            rows, _, free_s = self._open(degree, below_s)
            mine = np.flatnonzero((rows.part == part) & np.any(free_s < below_s, axis=0))
            self._floor_s[degree][mine] = self._among(degree, part, rows.row[mine], below_s)
        return True

    def deals_of(self, pp: int, below_s: float) -> Iterator[Deal]:
        """Deals of a pipeline degree whose bound is below a limit, in no order, of the prefixes that are bounded by memory: first
        without limits of memory, then all devices' memory together, then the schedule's own paths and every device's memory."""
        rows, cuts, free_s = self._open(pp, below_s)
        floor_s = self._floor_s[pp]
        mine = np.isfinite(floor_s) & self._pooled[rows.part]
        late = np.isfinite(free_s) & (free_s >= below_s) & mine  # where the limit has fallen since
        full = np.isfinite(free_s) & ~late & (floor_s >= below_s) & mine
        self.excluded["work"] += int(late.sum())
        self.excluded["memory"] += int(full.sum())
        found = some_of(rows, np.where(late, np.inf, free_s), mine & (floor_s < below_s))
        yield from self._bounded(*found, cuts, below_s)
        self._least.clear()
        self._floor_s[pp] = np.where(mine, np.inf, floor_s)  # at the end: what is over before is not known

    def places(self, below_s: float) -> Iterator[tuple[int, int]]:
        """Prefix and row of what is not yet known that may be below a limit."""
        for pp in self.least_s:
            rows, left = self._open(pp, below_s)[0], self._left(pp, below_s) < below_s
            yield from zip(rows.part[left].tolist(), rows.row[left].tolist(), strict=True)

    def _left(self, pp: int, below_s: float) -> Array:
        """What no deal of a row is faster than; infinite where they are known."""
        _, _, free_s = self._open(pp, below_s)
        least: Array = np.maximum(free_s.min(axis=0, initial=np.inf), self._floor_s[pp])
        return least

    def likeliest(self, pp: int, below_s: float, knobs: Mapping[str, object]) -> list[Deal]:
        """Those of the prefix that has most choices in common with some plan, smallest bounds first."""
        rows, cuts, free_s = self._open(pp, below_s)
        alike = {
            part: sum(
                str(knobs.get(slot)).lower() == c.value for slot, c in self.parts[part].tables.recipe.items()
            )
            for part in distinct(rows.part).tolist()
        }
        mine, counted = rows.part == max(alike, key=lambda part: alike[part]), dict(self.excluded)
        mine &= np.any(free_s < below_s, axis=0)
        found = sorted(self._bounded(*some_of(rows, free_s, mine), cuts, below_s), key=Deal.rank)
        self.excluded = counted  # they are looked at again
        return found

    def _bounded(
        self,
        rows: DegreeRows,
        free_s: Array,
        cuts: Sequence[tuple[Choice, Layout | None, int]],
        below_s: float,
    ) -> Iterator[Deal]:
        """Deals of some rows whose bound is below a limit, each with its bound."""
        pp = rows.pp
        rows, free_s = some_of(rows, free_s, np.any(free_s < np.inf, axis=0))
        if not len(rows.row):
            return
        parts = distinct(rows.part).tolist()
        pooled_s = np.concatenate(
            [self._among(pp, part, rows.row[rows.part == part], below_s) for part in parts]
        )
        lost = np.isfinite(free_s) & (pooled_s >= below_s)
        self.excluded["memory"] += int(lost.sum())
        keep = pooled_s < below_s
        rows, free_s = some_of(rows, free_s, keep)
        if not len(rows.row):
            return
        pooled_s, priced = pooled_s[keep], self._priced_rows(rows)
        for (schedule, layout, v), alone_s in zip(cuts, free_s, strict=True):
            ask()
            bound_s = np.maximum(alone_s, pooled_s)
            if layout is not None:
                open_ = np.flatnonzero(bound_s < below_s)
                if not len(open_):
                    continue
                some, _ = rows.take(open_)
                flights = in_flight(pp, v, some.micro_batches)
                dearest_s = priced.dearest_s(open_, layout, flights, some.table)
                self.excluded["memory"] += int((dearest_s >= below_s).sum())
                bound_s[open_] = np.maximum(bound_s[open_], dearest_s)
            for place in np.flatnonzero(bound_s < below_s).tolist():
                where = int(rows.part[place]), int(rows.row[place])
                self._dealt[where[0]].add(where[1])
                yield Deal(float(bound_s[place]), *where, schedule, layout)

    def _among(self, pp: int, part: int, rows: NDArray[np.intp], below_s: float) -> Array:
        """What some rows of a prefix take at least with all devices' memory together; beyond the limit where it is not known."""
        known = self._pools.get((pp, part))
        if known is None or not below_s <= known.below_s <= below_s * _LOOSE:
            opened, _, free_s = self._open(pp, below_s)
            some, _ = opened.take(np.flatnonzero((opened.part == part) & np.any(free_s < below_s, axis=0)))
            if not len(some.row):
                return np.zeros(0)
            among, blocks, _ = self._blocks(part, below_s)
            parts = [blocks[:, :, np.searchsorted(among, some.row)]]
            bounds = self._bounds(parts, some.micro_batches, pp, some.communicators)
            found, left, priced = bounds.pooled(below_s)
            known = self._pools[pp, part] = _Pool(below_s, some.row, found, some.row[left], priced)
        found = np.full(len(rows), np.inf)
        at = np.minimum(np.searchsorted(known.rows, rows), len(known.rows) - 1)
        here = known.rows[at] == rows
        found[here] = known.work_s[at[here]]
        return found

    def _priced_rows(self, rows: DegreeRows) -> AtPrices:
        """What bounds the layouts of rows that all devices' memory leaves open."""
        found = []
        for part in distinct(rows.part).tolist():
            pool = self._pools[rows.pp, part]
            found.append(pool.priced.take(np.searchsorted(pool.open, rows.row[rows.part == part])))
        return AtPrices.joined(found)

    def _open(
        self, pp: int, below_s: float
    ) -> tuple[DegreeRows, list[tuple[Choice, Layout | None, int]], Array]:
        """Rows of a pipeline degree that may be below a limit without limits of memory; under which cuts, and their bounds."""
        if pp not in self._opened:
            rows = self._rows_of(pp)
            cuts = [cut for cut in self._free(rows, below_s) if np.isfinite(cut[-1]).any()]
            free_s = np.array([free_s for *_, free_s in cuts]).reshape(len(cuts), len(rows.row))
            self._opened[pp] = (
                *some_of(rows, free_s, np.isfinite(free_s).any(axis=0)), [cut[:-1] for cut in cuts]
            )  # fmt: skip
            self._floor_s[pp] = np.zeros(len(self._opened[pp][0].row))
        rows, free_s, those = self._opened[pp]
        return rows, those, free_s

    def _walk(self, pp: int, below_s: float) -> None:
        """Bounds the rows of a pipeline degree by paths through its schedules, without limits of memory."""
        self._walked.add(pp)
        rows, cuts, free_s = self._open(pp, below_s)
        for (schedule, layout, _), alone_s in zip(cuts, free_s, strict=True):
            if layout is not None and len(open_ := np.flatnonzero(alone_s < below_s)):
                some, _ = rows.take(open_)
                paths_s = tight_bound(some.table, layout, name_of(schedule), some.micro_batches)
                alone_s[open_] = np.maximum(alone_s[open_], paths_s)
        self._least.clear()

    def _blocks(self, part: int, below_s: float) -> tuple[Array, Array, Strategies]:
        """Rows of a prefix that are open at any pipeline degree, blocks under all strategies on them, and these: once, as limits
        fall."""
        if self._priced_below_s.get(part, 0.0) < below_s:
            self._priced_below_s[part] = below_s
            opened = [self._open(pp, below_s) for pp in self.least_s]
            mine = [
                rows.row[(rows.part == part) & np.any(free_s < below_s, axis=0)] for rows, _, free_s in opened
            ]
            at = distinct(np.concatenate(mine))
            taken = self.parts[part].take(at)
            self._priced[part] = at, taken.blocks(), taken
        return self._priced[part]

    def _bounds(
        self, parts: Sequence[Array], micro_batches: Array, pp: int, communicators: Array
    ) -> Relaxation:
        """Bounds of rows that stand part after part, each with strategies of its own; those with fewer than others have some
        that take for ever."""
        most = max(blocks.shape[1] for blocks in parts)
        every = np.zeros((len(parts[0]), most, len(micro_batches), len(self.layers)))
        every[0] = np.inf
        start = 0
        for blocks in parts:
            many, rows = blocks.shape[1:3]
            every[:, :many, start : start + rows] = blocks
            start += rows
        return Relaxation(every, self.layers, micro_batches, pp, *self._room(communicators))

    def _room(self, communicators: Array) -> tuple[Array, float, float]:
        """Bytes of a device for what is held and saved, what allocators make of these, and bytes of the host; as many as the
        fullest plan has that keeps the limits, so that bounds hold for plans whose layers are alike, too."""
        stack = self.problem.stack
        idle = stack.framework_bytes.value + stack.communicator_bytes.value * communicators
        budget = np.maximum(room_bytes(self.problem, idle, filled=False) - idle, 1.0)
        return budget, 1.0 + stack.fragmentation.value, self.problem.cluster.slower_bytes["host"]

    def sharper(self, part: int, deals: Sequence[Deal], below_s: float) -> list[float]:
        """What none of some deals of a prefix is faster than, by the tables of their meshes."""
        found = [deal.bound_s for deal in deals]
        meshes = self._made(part, [deal.row for deal in deals])
        for pp in sorted({mesh.pp for mesh in meshes}):
            mine = {deal.row: mesh for deal, mesh in zip(deals, meshes, strict=True) if mesh.pp == pp}
            several = list(mine.values())
            bounds = self._bounds(
                [mesh.blocks[:, :, None] for mesh in several],
                np.array([float(mesh.micro_batches) for mesh in several]), pp,
                np.array([mesh.communicators for mesh in several]),
            )  # fmt: skip
            batches = bounds.micro_batches
            pooled_s, left, priced = bounds.pooled(below_s)
            place = {row: at for at, row in enumerate(mine)}
            known = [row for at, row in enumerate(mine) if at in left]
            alone = self._tables[part].take(np.array(known, dtype=np.intp))
            alike: dict[int, list[int]] = {}
            for number, deal in enumerate(deals):
                if deal.row in mine:
                    found[number] = max(found[number], float(pooled_s[place[deal.row]]))
                    if deal.row in known:
                        alike.setdefault(id(deal.layout), []).append(number)
            for numbers in alike.values():
                layout = deals[numbers[0]].layout
                if layout is None:
                    continue
                rows = np.array([known.index(deals[number].row) for number in numbers])
                flights = in_flight(pp, layout.virtual_stages, batches[left[rows]])
                table = alone.take(rows)
                for number, bound_s in zip(
                    numbers, priced.dearest_s(rows, layout, flights, table).tolist(), strict=True
                ):
                    found[number] = max(found[number], bound_s)
        return found

    def made(self) -> dict[Named, tuple[NDArray[np.intp], BranchTables]]:
        """Tables of prefixes, and the places of their rows in the uniform space."""
        return {
            named(taken.tables.recipe): (self.at[part][rows], taken.tables)
            for part, (rows, _, taken) in self._priced.items()
        }

    def whole(self) -> bool:
        """Whether every plan of the uniform space is one of this space too, but for those on rows of :attr:`others`."""
        space = self.uniform.space
        known = all(name_of(schedule) in SCHEDULES for schedule in space.choices["schedule"])
        return known and "virtual_stages" not in space.fixed

    # -- meshes ------------------------------------------------------------------------------------------------------

    def _narrow(self, below_s: float) -> None:
        """Keeps the rows of every prefix on which the work alone leaves a chance."""
        uniform, space = self.uniform, self.uniform.space
        made: dict[tuple[str, ...], object] = {}
        mesh = space.rows.context(self.problem, {}).mesh
        for recipe in space.prefixes():
            knobs = space.knobs(recipe)
            whole = replace(space.rows.context(self.problem, knobs), mesh=mesh)
            active = np.ones(len(space.rows), dtype=bool)
            for slot, choice in recipe.items():
                technique = choice.technique
                if technique is not None and technique.active is not None and slot not in space.fixed:
                    active &= technique.active(whole)
            open_ = np.flatnonzero(active)
            open_ = open_[uniform.faults(recipe, whole.take(open_)).first < 0]
            if not len(open_):
                continue
            ctx = whole.take(open_)
            ledger = uniform.ledger(recipe, whole, made).take(open_, ctx.mesh.counterpart)  # type: ignore[arg-type]
            table = tabulate(ledger, uniform.pricer, self.kinds, len(open_), TIMES)
            each = table["forward_s"] + table["backward_s"] + table["weight_s"]
            work_s = ctx.micro_batches * (self.layers @ each[:-1]) / ctx.mesh.pp
            keep = np.flatnonzero(work_s < below_s)
            self.meshes += len(open_)
            self.excluded["work"] += len(open_) - len(keep)
            if len(keep):
                ctx = ctx.take(keep)
                ledger = ledger.take(keep, ctx.mesh.counterpart)
                tables = BranchTables(
                    space, uniform.branches, uniform.pricer, self.kinds, recipe, ctx, ledger
                )
                rows = space.rows.take(open_[keep])
                strategies = Strategies(tables, rows, uniform.branches, range(len(uniform.branches.swaps)))
                if not strategies.branches:
                    self.others[named(recipe)] = open_[keep]
                    continue  # recompute of some layers is all that is allowed: the uniform search has it
                for pp in distinct(ctx.mesh.pp).tolist():
                    least_s = float(work_s[keep][ctx.mesh.pp == pp].min())
                    self.least_s[int(pp)] = min(self.least_s.get(int(pp), np.inf), least_s)
                self.parts.append(strategies)
                self.at.append(open_[keep])
                self._tables.append(table.take(keep))

    # -- deals ---------------------------------------------------------------------------------------------------------

    def _rows_of(self, pp: int) -> DegreeRows:
        """All rows of a pipeline degree, whatever their prefix."""
        places = [np.flatnonzero(part.tables.ctx.mesh.pp == pp) for part in self.parts]
        values = [part.rows.take(at).values for part, at in zip(self.parts, places, strict=True)]
        groups = [sum((v[name] > 1).astype(float) for name in ("tp", "cp", "dp", "pp", "ep")) for v in values]
        return DegreeRows(
            pp,
            np.repeat(np.arange(len(places)), [len(at) for at in places]),
            np.concatenate(places),
            np.concatenate([part.tables.ctx.micro_batches[at] for part, at in zip(self.parts, places, strict=True)]),
            np.concatenate(groups),
            BlockTable(
                self.kinds,
                np.concatenate([t.values[:, :, at] for t, at in zip(self._tables, places, strict=True)], axis=2), TIMES,
            ),
        )  # fmt: skip

    def _free(self, rows: DegreeRows, below_s: float) -> Iterator[tuple[Choice, Layout | None, int, Array]]:
        """Every schedule and layout with its bounds without limits of memory; infinite where they exclude a row, or rules do."""
        pp, micro_batches = rows.pp, rows.micro_batches
        each = rows.table["forward_s"] + rows.table["backward_s"] + rows.table["weight_s"]
        fastest_s = self.layers @ each[:-1]  # what is additive only adds
        work_s = micro_batches * fastest_s
        runs: dict[str, Array] = {}
        for schedule, layout, v in cuts(self.uniform, pp, self._named_only):
            if schedule.value not in runs:
                runs[schedule.value] = self._runs(schedule, rows)
            if layout is None:
                free_s = np.maximum(
                    work_s / pp, fastest_s * path_factor(name_of(schedule), pp, micro_batches)
                )
            else:
                free_s = step_bound(rows.table, layout, micro_batches)
            late = runs[schedule.value] & (free_s >= below_s)
            self.excluded["work"] += int(late.sum())
            yield schedule, layout, v, np.where(runs[schedule.value] & ~late, free_s, np.inf)

    def _runs(self, schedule: Choice, rows: DegreeRows) -> Array:
        """Rows on which the schedule keeps its rules."""
        technique = schedule.technique
        assert technique is not None
        ok = np.ones(len(rows.row), dtype=bool)
        for part in distinct(rows.part).tolist():
            mine = rows.part == part
            ctx = self.parts[part].tables.ctx
            ctx = replace(ctx, knobs={**ctx.knobs, "schedule": schedule.value}).take(rows.row[mine])
            if technique.active is not None and "schedule" not in self.uniform.space.fixed:
                ok[mine] &= technique.active(ctx)
            for check in technique.valid(ctx):
                ok[mine] &= check.ok
        return ok
