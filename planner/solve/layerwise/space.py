"""The layer-wise space: meshes, how their stages may be cut, and what no plan of each is faster than.

A *deal* is a mesh (prefix and row), a schedule, and either one layout or, with one stage per device, any cuts. Interleaved
schedules take the layouts of the uniform search and others whose virtual stages are equal but for one layer, with up to two layers
fewer at either end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from planner.engine import BlockTable, tabulate
from planner.ledger import Array
from planner.pipeline import Layout, deal_layers, layouts, step_bound
from planner.solve.layerwise.relaxation import Relaxation, in_flight, with_swaps
from planner.solve.layerwise.strategies import Mesh, Strategies
from planner.solve.space import Choice
from planner.solve.tables import BranchTables
from planner.solve.uniform import UniformSearch

__all__ = ["Deal", "LayerwiseSpace", "uneven_layouts"]

_SCHEDULES = ("1f1b", "gpipe", "interleaved")
_FEWER = (0, 1, 2)  # layers that the first and the last virtual stage of an interleaved schedule may lack


@dataclass(frozen=True, slots=True, eq=False)
class Deal:
    """One mesh under one schedule; ``layout`` None leaves the cuts open. No plan of it is faster than ``bound_s``."""

    bound_s: float
    part: int
    row: int
    schedule: Choice
    layout: Layout | None

    @property
    def order(self) -> str:
        """Name of the schedule's order."""
        assert self.schedule.technique is not None
        return self.schedule.technique.order


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
        self._tables: list[BlockTable] = []
        self._narrow(below_s)

    def deals(self, below_s: float) -> list[Deal]:
        """Deals whose bound is below a limit, smallest bounds first."""
        found: list[Deal] = []
        for part, (strategies, table) in enumerate(zip(self.parts, self._tables, strict=True)):
            found += self._deals(part, strategies, table, below_s)
        return sorted(found, key=lambda deal: (deal.bound_s, deal.part, deal.row))

    def mesh(self, deal: Deal, swaps: bool) -> Mesh:
        """The deal's mesh with all of its strategies; without ``swaps``, those that leave everything on the device."""
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
                self.parts.append(Strategies(tables, rows, uniform.branches, [0]))
                self._tables.append(BlockTable(self.kinds, np.ascontiguousarray(table.values[:, :, keep])))

    # -- deals ---------------------------------------------------------------------------------------------------------

    def _deals(self, part: int, strategies: Strategies, table: BlockTable, below_s: float) -> Iterator[Deal]:
        if not strategies.branches:
            return
        ctx = strategies.tables.ctx
        totals = strategies.totals()
        seconds, step, held, saved = with_swaps(
            totals, self.uniform.branches, self.problem.cluster
        )
        stack = self.problem.stack
        groups = sum((strategies.rows.values[name] > 1).astype(float) for name in ("tp", "cp", "dp", "pp", "ep"))
        idle = stack.framework_bytes.value + stack.communicator_bytes.value * groups
        budget = self.problem.memory_budget_bytes - idle
        for degree in np.unique(ctx.mesh.pp):
            pp, at = int(degree), np.flatnonzero((ctx.mesh.pp == degree) & (budget > 0.0))
            if not len(at):
                continue
            relaxed = Relaxation(
                seconds[:, at], step[:, at], held[:, at], saved[:, at], layers=self.layers,
                micro_batches=ctx.micro_batches[at], pp=pp, budget=budget[at],
                growth=1.0 + stack.fragmentation.value,
            )  # fmt: skip
            some = BlockTable(table.kinds, np.ascontiguousarray(table.values[:, :, at]))
            yield from self._of_degree(part, strategies, at, pp, relaxed, some, below_s)

    def _of_degree(
        self, part: int, strategies: Strategies, at: Array, pp: int, relaxed: Relaxation, table: BlockTable, below_s: float
    ) -> Iterator[Deal]:  # fmt: skip
        micro_batches = strategies.tables.ctx.micro_batches[at]
        known: dict[int, Array] = {}
        for schedule, layout, v in self._cuts(pp):
            runs = self._runs(schedule, strategies, at)
            if layout is None:
                ramp = np.where(micro_batches > pp, (pp - 1.0) / pp, 0.0)
                free = np.maximum(relaxed.free_s / pp, relaxed.seconds * (micro_batches / pp + ramp))
                free = np.maximum(free, relaxed.seconds)
            else:
                free = step_bound(table, layout, micro_batches)
            open_ = runs & (free < below_s)
            self.excluded["work"] += int((runs & ~open_).sum())
            if not open_.any():
                continue
            if v not in known:
                flights = np.stack(
                    [in_flight(pp, v, float(m)).ravel() for m in micro_batches], axis=1
                )
                most = (
                    np.maximum(np.floor(below_s / (relaxed.seconds * micro_batches / self.layers.sum())), 1.0)
                    if v == 1
                    else np.full(len(at), float((len(self.order) + 4) // (pp * v) + 1))
                )
                known[v] = relaxed.work_s(flights, most) / pp
            bound_s = np.maximum(free, known[v])
            late = open_ & (bound_s >= below_s)
            self.excluded["memory"] += int(late.sum())
            for place in np.flatnonzero(open_ & ~late).tolist():
                yield Deal(float(bound_s[place]), part, int(at[place]), schedule, layout)

    def _cuts(self, pp: int) -> Iterator[tuple[Choice, Layout | None, int]]:
        """Schedules with their layouts; one stage per device is left open where cuts are."""
        space = self.uniform.space
        wanted = space.fixed.get("pipeline_layout")
        for schedule in space.choices["schedule"]:
            order = schedule.technique.order if schedule.technique is not None else ""
            if order not in _SCHEDULES or (pp == 1 and order != "1f1b" and "schedule" not in space.fixed):
                continue
            interleaved = order == "interleaved"
            most = (len(self.order) + 2) // pp if interleaved and pp > 1 else 1
            for v in range(2 if interleaved else 1, most + 1):
                if not space.allows("virtual_stages", np.array([float(v)]))[0]:
                    continue
                if v == 1 and self.uneven and wanted is None:
                    yield schedule, None, v
                    continue
                named = [x for x in layouts(self.order, self.kinds, pp, v) if wanted in (None, x.split)]
                more = uneven_layouts(self.order, self.kinds, pp, v) if self.uneven and wanted is None else ()
                for layout in (*named, *more):
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
def uneven_layouts(
    order: tuple[str, ...], kinds: tuple[str, ...], pp: int, virtual_stages: int
) -> tuple[Layout, ...]:
    """Virtual stages that are equal but for one layer, and up to two fewer at either end; those of :func:`layouts` left out.

    Longer stages stand in the middle of the pipeline's devices, chunk after chunk from the last one.
    """
    stages = pp * virtual_stages
    known = {tuple(_sizes(layout)) for layout in layouts(order, kinds, pp, virtual_stages)}
    found = []
    for first in _FEWER:
        for last in _FEWER:
            small, longer = divmod(len(order) + first + last, stages)
            sizes = [small] * stages
            for stage in _middle_first(pp, virtual_stages)[:longer]:
                sizes[stage] += 1
            sizes[0] -= first
            sizes[-1] -= last
            if min(sizes) < 0 or min(sizes[1:-1], default=1) < 1 or tuple(sizes) in known:
                continue
            known.add(tuple(sizes))
            found.append(deal_layers(order, kinds, pp, virtual_stages, "uneven", sizes))
    return tuple(found)


def _middle_first(pp: int, virtual_stages: int) -> list[int]:
    """Virtual stages by chunk from the last, and by their device's distance from the middle of the pipeline."""
    devices = sorted(range(pp), key=lambda device: (abs(2 * device - (pp - 1)), device))
    return [chunk * pp + device for chunk in reversed(range(virtual_stages)) for device in devices]


def _sizes(layout: Layout) -> Sequence[int]:
    sizes: list[int] = layout.counts[:, :-3].sum(axis=1).astype(int).tolist()
    return sizes
