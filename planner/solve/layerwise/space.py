"""The layer-wise space: meshes, how their stages may be cut, and what no plan of each is faster than.

A *deal* is a mesh (prefix and row), a schedule, and either one layout or, with one stage per device, any cuts. Interleaved
schedules take the layouts of the uniform search or, where it has none, virtual stages that are equal but for one layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from planner.assignment import UNEVEN
from planner.engine import BlockTable, tabulate
from planner.ledger import Array
from planner.pipeline import Layout, deal_layers, layouts, step_bound, tight_bound
from planner.solve.layerwise.relaxation import Relaxation, in_flight, path_factor, with_swaps
from planner.solve.layerwise.strategies import Mesh, Strategies
from planner.solve.space import Choice, order_of
from planner.solve.tables import BranchTables
from planner.solve.uniform import UniformSearch

__all__ = ["Deal", "LayerwiseSpace", "uneven_layout"]

_SCHEDULES = ("1f1b", "gpipe", "interleaved")


@dataclass(frozen=True, slots=True, eq=False)
class Deal:
    """One mesh under one schedule; ``layout`` None leaves the cuts open. No plan of it is faster than ``bound_s``."""

    bound_s: float
    part: int
    row: int
    schedule: Choice
    layout: Layout | None

    def rank(self) -> tuple[float, int, int]:
        """What deals are sorted by."""
        return self.bound_s, self.part, self.row

    @property
    def order(self) -> str:
        """Name of the schedule's order."""
        return _order(self.schedule)


class LayerwiseSpace:
    """All deals of a problem that bounds do not exclude at once.

    Args:
        uniform: the uniform search of the problem, which knows its prefixes and rules.
        below_s: deals that cannot be faster are left out.
        uneven: whether cuts are open.
    """

    def __init__(self, uniform: UniformSearch, below_s: float, uneven: bool) -> None:
        self.uniform, self.uneven = uniform, uneven
        self.problem, self.order, self.kinds = uniform.problem, uniform.order, uniform.kinds
        self.layers = np.array([float(self.order.count(kind)) for kind in self.kinds[:-1]])
        self.layers[-2:] = 1.0
        self.excluded = {"work": 0, "memory": 0}
        self.meshes = 0
        self.parts: list[Strategies] = []
        self.least_s: list[float] = []
        self._tables: list[BlockTable] = []
        self._meshes: dict[tuple[int, int, bool], Mesh] = {}
        self._narrow(below_s)

    def deals(self, below_s: float) -> list[Deal]:
        """Deals whose bound is below a limit, smallest bounds first."""
        found = [deal for part in range(len(self.parts)) for deal in self.deals_of(part, below_s)]
        return sorted(found, key=Deal.rank)

    def deals_of(self, part: int, below_s: float) -> Iterator[Deal]:
        """The same of one prefix; none of its deals is faster than ``least_s[part]``."""
        return self._deals(part, self.parts[part], self._tables[part], below_s)

    def mesh(self, deal: Deal, swaps: bool) -> Mesh:
        """The deal's mesh with all of its strategies; without ``swaps``, those that leave everything on the device."""
        key = (deal.part, deal.row, swaps)
        if key not in self._meshes:
            self._meshes[key] = self._mesh(deal, swaps)
        return self._meshes[key]

    def _mesh(self, deal: Deal, swaps: bool) -> Mesh:
        part = self.parts[deal.part]
        if not swaps:
            return part.meshes([deal.row])[0]
        tables = part.tables.take(np.array([deal.row]))
        rows = part.rows.take(np.array([deal.row]))
        every = range(len(self.uniform.branches.swaps))
        return Strategies(tables, rows, self.uniform.branches, every).meshes([0])[0]

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
            table = tabulate(ledger, uniform.pricer, self.kinds, len(open_))
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
                self.least_s.append(float(work_s[keep].min()))
                self.parts.append(Strategies(tables, rows, uniform.branches, [0]))
                self._tables.append(BlockTable(self.kinds, np.ascontiguousarray(table.values[:, :, keep])))

    # -- deals ---------------------------------------------------------------------------------------------------------

    def _deals(self, part: int, strategies: Strategies, table: BlockTable, below_s: float) -> Iterator[Deal]:
        if not strategies.branches:
            return
        ctx = strategies.tables.ctx
        totals = strategies.totals()
        relaxed = with_swaps(
            totals,
            table,
            self.uniform.branches,
            self.problem.cluster,
            self.problem.stack.overlap_slowdown.value,
        )
        for degree in np.unique(ctx.mesh.pp):
            at = np.flatnonzero(ctx.mesh.pp == degree)
            some = BlockTable(table.kinds, np.ascontiguousarray(table.values[:, :, at]))
            parts = tuple(values[:, at] for values in relaxed)
            yield from self._of_degree(part, strategies, at, int(degree), parts, some, below_s)

    def _of_degree(
        self, part: int, strategies: Strategies, at: Array, pp: int, relaxed: tuple[Array, ...], table: BlockTable,
        below_s: float,
    ) -> Iterator[Deal]:  # fmt: skip
        """Deals of one pipeline degree: first without, then with limits of memory."""
        seconds, step, held, saved = relaxed
        stack, micro_batches = self.problem.stack, strategies.tables.ctx.micro_batches[at]
        fastest_s = seconds.min(axis=0) @ self.layers
        work_s = micro_batches * fastest_s + step.min(axis=0) @ self.layers
        cuts: list[tuple[Choice, Layout | None, int, Array]] = []
        runs: dict[str, Array] = {}
        for schedule, layout, v in self._cuts(pp):
            if schedule.value not in runs:
                runs[schedule.value] = self._runs(schedule, strategies, at)
            if layout is None:
                free_s = np.maximum(work_s / pp, fastest_s * path_factor(_order(schedule), pp, micro_batches))
            else:
                free_s = step_bound(table, layout, micro_batches)
                some = np.flatnonzero(runs[schedule.value] & (free_s < below_s))
                if len(some):
                    part_of = BlockTable(table.kinds, table.values[:, :, some], table.fields)
                    paths_s = tight_bound(part_of, layout, _order(schedule), micro_batches[some])
                    free_s[some] = np.maximum(free_s[some], paths_s)
            late = runs[schedule.value] & (free_s >= below_s)
            self.excluded["work"] += int(late.sum())
            open_s = np.where(runs[schedule.value] & ~late, free_s, np.inf)
            if np.isfinite(open_s).any():
                cuts.append((schedule, layout, v, open_s))
        if not cuts:
            return
        rows = np.flatnonzero(np.min([open_s for *_, open_s in cuts], axis=0) < np.inf)
        values = strategies.rows.values
        groups = sum((values[name][at[rows]] > 1).astype(float) for name in ("tp", "cp", "dp", "pp", "ep"))
        idle = stack.framework_bytes.value + stack.communicator_bytes.value * groups
        budget = np.maximum(self.problem.memory_budget_bytes - idle, 1.0)
        bounds = Relaxation(
            seconds[:, rows], step[:, rows], held[:, rows], saved[:, rows], layers=self.layers,
            micro_batches=micro_batches[rows], pp=pp, budget=budget, growth=1.0 + stack.fragmentation.value,
        )  # fmt: skip
        each_s = fastest_s[rows] * micro_batches[rows] / self.layers.sum()
        table = BlockTable(table.kinds, np.ascontiguousarray(table.values[:, :, rows]))
        for schedule, layout, v, open_s in cuts:
            flights = in_flight(pp, v, micro_batches[rows])
            if layout is None:
                most = np.maximum(np.floor(below_s / each_s), 1.0)
                limited_s = bounds.work_s(flights, most) / pp
            else:
                limited_s = bounds.dearest_s(layout, flights, table)
            bound_s = np.maximum(open_s[rows], limited_s)
            self.excluded["memory"] += int((np.isfinite(open_s[rows]) & (bound_s >= below_s)).sum())
            for place in np.flatnonzero(bound_s < below_s).tolist():
                yield Deal(float(bound_s[place]), part, int(at[rows[place]]), schedule, layout)

    def _cuts(self, pp: int) -> Iterator[tuple[Choice, Layout | None, int]]:
        """Schedules with their layouts; one stage per device is left open where cuts are."""
        space = self.uniform.space
        wanted = space.fixed.get("pipeline_layout")
        for schedule in space.choices["schedule"]:
            order = _order(schedule)
            if order not in _SCHEDULES or (pp == 1 and order != "1f1b" and "schedule" not in space.fixed):
                continue
            interleaved = order == "interleaved"
            for v in order_of(schedule).chunks((len(self.order) + 2) // pp if pp > 1 else 1):
                if not space.allows("virtual_stages", np.array([float(v)]))[0]:
                    continue
                if v == 1 and self.uneven and wanted is None:
                    yield schedule, None, v
                    continue
                named = layouts(self.order, self.kinds, pp, v)
                if interleaved and all(layout.split == "balanced" for layout in named):
                    other = uneven_layout(self.order, self.kinds, pp, v) if self.uneven else None
                    named = () if other is None else (other,)
                for layout in named:
                    if wanted in (None, layout.split):
                        yield schedule, layout, v

    def _runs(self, schedule: Choice, strategies: Strategies, at: Array) -> Array:
        """Rows on which the schedule keeps its rules."""
        technique = schedule.technique
        assert technique is not None
        ctx = strategies.tables.ctx
        ctx = replace(ctx, knobs={**ctx.knobs, "schedule": schedule.value}).take(at)
        ok = np.ones(len(at), dtype=bool)
        if technique.active is not None and "schedule" not in self.uniform.space.fixed:
            ok &= technique.active(ctx)
        for check in technique.valid(ctx):
            ok &= check.ok
        return ok


@lru_cache(maxsize=1024)
def uneven_layout(
    order: tuple[str, ...], kinds: tuple[str, ...], pp: int, virtual_stages: int
) -> Layout | None:
    """Virtual stages that are equal but for one layer; the longer ones on devices in the middle, from the last chunk on."""
    small, longer = divmod(len(order), pp * virtual_stages)
    if not small:
        return None
    sizes = [small] * (pp * virtual_stages)
    for stage in _middle_first(pp, virtual_stages)[:longer]:
        sizes[stage] += 1
    return deal_layers(order, kinds, pp, virtual_stages, UNEVEN, sizes)


def _middle_first(pp: int, virtual_stages: int) -> list[int]:
    """Virtual stages by chunk from the last, and by their device's distance from the middle of the pipeline."""
    devices = sorted(range(pp), key=lambda device: (abs(2 * device - (pp - 1)), device))
    return [chunk * pp + device for chunk in reversed(range(virtual_stages)) for device in devices]


def _order(schedule: Choice) -> str:
    """Name of a schedule's order."""
    return order_of(schedule).name
