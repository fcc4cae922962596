"""One device of a pipeline: its layers, its budgets, and the best strategies for them.

A device's time in a step is its micro-batches' work, then what nothing hides of gradients and weights. With traffic ``g`` in
``1/σ`` buckets beside ``b`` seconds of work, ``max(σ·g, g − (1 − σ)·b)`` of it is exposed
(:func:`planner.costs.overlap.uniform_bucket_exposure_s`), so that the time is the largest of four sums over layers, with ``σ`` for
the most buckets that they may have. Its bytes are sums too, but for the largest transient of a block at work: strategies are limited to those with no larger
a transient than each of those there are, in turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from planner.assignment import Runs
from planner.layout import Layout
from planner.ledger import Array
from planner.pipeline import saturated
from planner.schedule.critical import Path
from planner.schedule.live import live_vectors
from planner.solve.layerwise.counts import SLACK, CountProblem, Counts, Group, bound, hull
from planner.solve.layerwise.duals import Cells, dual_s
from planner.solve.layerwise.relaxation import in_flight
from planner.solve.layerwise.solvers import Solver
from planner.solve.layerwise.stages import Line
from planner.solve.layerwise.strategies import Mesh
from planner.specs.problem import Problem

__all__ = ["Device", "DeviceCosts", "Solved"]

_RANGE = 0.005  # of a device's memory, by which transients may differ and be bounded together
_DEARER = (2.0, 4.0, 16.0, 1e6)
_LONGEST_S = 1e12  # stands for strategies that are not allowed
_BYTES = ("always_bytes", "saved_bytes", "step_bytes", "host_bytes", "host_saved_bytes")


@dataclass(frozen=True, slots=True)
class Device:
    """What one device of a pipeline holds.

    Attributes:
        number: its place in the pipeline.
        layers: of each kind, per chunk.
        embedding, head: whether it holds them.
    """

    number: int
    layers: tuple[tuple[int, ...], ...]
    embedding: bool
    head: bool


@dataclass(frozen=True, slots=True)
class Solved:
    """The best strategies of a device: runs per chunk and kind, and those of the ends that it holds."""

    seconds: float
    runs: tuple[tuple[Runs, ...], ...]
    embedding: int | None
    head: int | None


class DeviceCosts:
    """Costs and budgets of the devices of one mesh under one schedule."""

    def __init__(
        self, problem: Problem, mesh: Mesh, schedule: str, virtual_stages: int, solver: Solver, tolerance: float = 0.0
    ) -> None:  # fmt: skip
        self.mesh, self.schedule, self.virtual_stages, self.solver = mesh, schedule, virtual_stages, solver
        self.tolerance = tolerance
        stack = problem.stack
        self.growth = 1.0 + stack.fragmentation.value
        idle = stack.framework_bytes.value + stack.communicator_bytes.value * mesh.communicators
        self.room = problem.memory_budget_bytes - idle
        self.host_room = float(problem.cluster.host_memory_bytes)
        self.transient = mesh["block_bytes"] + mesh["recomputed_bytes"]
        self.work = mesh.micro_batches * mesh.micro_batch_s
        self.buckets = {
            track: mesh[f"{track}_messages"].max(axis=0) for track in ("gradients", "weights")
        }
        self.hosted = bool(mesh["host_bytes"].any() or mesh["host_saved_bytes"].any())
        depth = saturated(schedule, mesh.pp, virtual_stages, mesh.micro_batches)
        self.depth = int(depth)
        self._solved: dict[tuple[object, ...], Solved | None] = {}
        self.fronts = _front(mesh)
        self.useful = sorted({s for front in self.fronts for s in front})

    def flights(self, device: int) -> Array:
        """Micro-batches in flight of each chunk at each of the device's fullest moments, (moments, chunks)."""
        return _flights(self.schedule, self.mesh.pp, self.depth, self.virtual_stages, device)

    def least_s(self, layout: Layout) -> tuple[Array, Array]:
        """No strategies make a layout's devices faster, (devices,) each; infinite where none fit.

        First their work, and on the first device what follows it; then their work with all that follows it.
        """
        m, once = self.mesh.micro_batches, np.ones((layout.virtual_stages, layout.pp))
        cells = self._cells(layout, m * once, m * once)
        s, kind = self.useful, cells.kind
        alone = self.work[s][:, kind]
        after = self._after(layout.device_counts, cells.device, kind)
        whole_s = self._within_limits(alone + after[3], cells)
        work_s = self._within_limits(alone + np.where(cells.device == 0, after[0], 0.0), cells)
        work_s[0] = max(work_s[0], whole_s[0])
        return work_s, whole_s

    def along_s(self, layout: Layout, path: Path) -> float:
        """No strategies of a layout make a path through its schedule shorter, without hops; infinite where none fit."""
        shape = layout.virtual_stages, layout.pp
        cells = self._cells(layout, path.counts[0].reshape(shape), path.counts[1].reshape(shape))
        s, kind = self.useful, cells.kind
        forward_s = self.mesh["forward_s"][s]
        backward_s = self.mesh.micro_batch_s[s] - forward_s
        cost = cells.forwards * forward_s[:, kind] + cells.backwards * backward_s[:, kind]
        after = np.where(
            cells.device == path.device, self._after(layout.device_counts, cells.device, kind), 0.0
        )
        return max(float(self._within_limits(cost + each, cells).sum()) for each in after)

    def update_s(self, counts: Array) -> float:
        """No strategies of a device's blocks leave less to do after their last backward."""
        kinds = np.flatnonzero(counts)
        after = self._after(counts[None], np.zeros(len(kinds), dtype=np.intp), kinds).min(axis=1)
        return float((after @ counts[kinds]).max())

    def _after(self, counts: Array, device: Array, kind: Array) -> Array:
        """What follows a device's last backward, of one block of some kinds: four sums, (4, useful strategies, places).

        Args:
            counts: (devices, kinds) blocks.
            device, kind: of every place.
        """
        shares = (1.0 / np.maximum(counts @ self.buckets[track], 1.0) for track in ("gradients", "weights"))
        return _exposed(self.mesh, *(share[device] for share in shares), kind)[:, self.useful]

    def _cells(self, layout: Layout, forwards: Array, backwards: Array) -> Cells:
        """A layout's blocks, in flight as at a full moment of every device."""
        if layout.virtual_stages == 1:
            flights = np.array([[self.flights(device).max() for device in range(layout.pp)]])
        else:
            batches = np.array([float(self.mesh.micro_batches)])
            flights = in_flight(layout.pp, layout.virtual_stages, batches).reshape(forwards.shape)
        return Cells.of(layout.chunks[:, :, :-1], flights, forwards, backwards)

    def _within_limits(self, cost: Array, cells: Cells) -> Array:
        """The dual of every device under each limit on its transient, the smallest of them: (devices,)."""
        always, saved = (self.mesh[name][self.useful][:, cells.kind] for name in ("always_bytes", "saved_bytes"))
        held = always + self.growth * cells.flights * saved
        transient = self.transient[self.useful][:, cells.kind]
        low, high = self._limits(np.unique(cells.kind).tolist())
        many, devices = len(low), int(cells.device[-1]) + 1
        costs = np.where(transient <= high[:, None, None], cost, np.inf).transpose(1, 0, 2)
        every = replace(
            cells,
            device=(cells.device + devices * np.arange(many)[:, None]).ravel(),
            number=np.tile(cells.number, many),
        )
        rooms = np.repeat(self.room - self.growth * low, devices)
        found = dual_s(costs.reshape(len(cost), -1), np.tile(held, many), every, rooms)
        least: Array = found.reshape(many, devices).min(axis=0)
        return least

    def _limits(self, kinds: Sequence[int]) -> tuple[Array, Array]:
        """Ranges of the largest transient of a device's blocks, (low, high]: with strategies up to the upper end of its range, it
        takes at least the lower end."""
        found = np.unique(np.concatenate([self.transient[self.fronts[kind], kind] for kind in kinds]))
        starts = [0]
        for at in range(1, len(found)):
            if self.growth * (found[at] - found[starts[-1]]) > _RANGE * self.room:
                starts.append(at)
        return found[starts], found[[*(at - 1 for at in starts[1:]), len(found) - 1]]

    def solve(self, device: Device, ramp_s: float = 0.0) -> Solved | None:
        """The best strategies that fit; None where none do."""
        key = (self.flights(device.number).tobytes(), device.layers, device.embedding, device.head, ramp_s)
        if key not in self._solved:
            self._solved[key] = self._solve(device, ramp_s)
        return self._solved[key]

    def line(self, device: int, order: Sequence[int], ends: Sequence[int], work_only: bool = False) -> Line:
        """A lower bound of a device's seconds by the layers it holds, for pipelines with one stage per device.

        The dual of the linear relaxation at every price that some trade of memory for time would fetch, under every limit on the
        transient.

        Args:
            order: kind of every layer.
            ends: kinds of what the device holds besides: embedding, head.
            work_only: the micro-batches' work without what follows the last.
        """
        weight = float(self.flights(device).max())
        held = self.mesh["always_bytes"] + self.growth * weight * self.mesh["saved_bytes"]
        kinds = sorted({*order, *ends})
        costs = self.work[None]
        if not work_only:
            costs = self.work + _exposed(self.mesh, 0.0, 0.0, np.arange(len(self.mesh.kinds)))
        low, high = self._limits(kinds)
        prices = self._prices(costs, held, kinds)[:, None, None, None]
        small = self.transient[self.useful] <= high[:, None, None]
        offsets, sums = [], []
        for cost in costs[:, self.useful]:
            # (prices, limits, kinds)
            priced = np.where(small, cost + prices * held[self.useful], _LONGEST_S).min(axis=2)
            offsets.append(priced[:, :, list(ends)].sum(axis=2) - prices[:, :, 0, 0] * (self.room - self.growth * low))
            sums.append(np.cumsum(priced[:, :, list(order)], axis=2))
        zero = np.zeros((len(low), len(prices) * len(sums), 1))
        lines = np.concatenate([zero, np.concatenate(sums).transpose(1, 0, 2)], axis=2)
        return Line(np.concatenate(offsets).T, lines)

    # -- details ---------------------------------------------------------------------------------------------------

    def _prices(self, costs: Array, held: Array, kinds: Sequence[int]) -> Array:
        """Those of every trade of bytes for seconds on a hull, more where limits leave dearer trades only, and one that no plan pays."""
        found = {0.0}
        for cost in costs:
            for kind in kinds:
                c, h = cost[:, kind], held[:, kind]
                chain = hull(c, h)
                found |= {float((c[b] - c[a]) / (h[a] - h[b])) for a, b in itertools.pairwise(chain)}
        most = max(max(found), 1.0 / self.room)
        return np.array(sorted(found | {most * x for x in _DEARER}))

    def _fullest(self, device: int) -> int:
        """The moment that stands for all until another proves to be fuller."""
        return int(np.argmax(self.flights(device).sum(axis=1)))

    def _groups(self, device: Device, moments: Sequence[int]) -> list[_Group]:
        """Layers of one kind in chunks that are in flight alike at some moments; what stands at the ends."""
        flights = self.flights(device.number)[list(moments)]
        alike: dict[tuple[bytes, int], _Group] = {}
        for chunk, layers in enumerate(device.layers):
            for kind, n in enumerate(layers):
                if n:
                    key = (flights[:, chunk].tobytes(), kind)
                    group = alike.get(key, _Group(kind, (), 0, flights[:, chunk]))
                    alike[key] = _Group(kind, (*group.chunks, chunk), group.size + n, group.flights)
        groups = list(alike.values())
        embedding, head = len(self.mesh.kinds) - 3, len(self.mesh.kinds) - 2
        if device.embedding:
            groups.append(_Group(embedding, (0,), 1, flights[:, 0]))
        if device.head:
            groups.append(_Group(head, (self.virtual_stages - 1,), 1, flights[:, -1]))
        return groups

    def _problem(
        self, groups: Sequence[_Group], small: Sequence[Sequence[int]], limit: float, ramp_s: float
    ) -> CountProblem:
        """The choice among some strategies of every group, with transients up to a limit."""
        mesh = self.mesh
        offset, sums = self._sums(groups, ramp_s)
        costs = [sums[:, some, place] for place, some in enumerate(small)]
        largest = _largest(offset, costs)
        made = []
        for group, some, cost in zip(groups, small, costs, strict=True):
            weights = group.flights[:, None]
            always, saved, step, host, host_saved = (mesh[name][None, some, group.kind] for name in _BYTES)
            rows = [always + self.growth * weights * saved, always + step]
            rows += [host + weights * host_saved] if self.hosted else []
            made.append(Group(group.size, cost[largest], np.concatenate(rows)))
        moments = len(groups[0].flights)
        budget = [self.room - self.growth * limit] * moments + [self.room]
        budget += [self.host_room] * moments if self.hosted else []
        return CountProblem(tuple(made), np.array(budget), offset[largest])

    def _solve(self, device: Device, ramp_s: float) -> Solved | None:
        """Solves under each limit on the transient that may hold the best, in the order of their bounds."""
        groups = self._groups(device, [self._fullest(device.number)])
        if not groups:
            return None  # no device is left without work
        best: Solved | None = None
        limits, bounds = self._limit_bounds(groups, ramp_s)
        for index in np.argsort(bounds, kind="stable").tolist():
            if bounds[index] >= (np.inf if best is None else best.seconds * (1.0 - self.tolerance)):
                break
            found = self._within(device, float(limits[index]), ramp_s)
            if found is not None and (best is None or found.seconds < best.seconds):
                best = found
        return best

    def _limit_bounds(self, groups: Sequence[_Group], ramp_s: float) -> tuple[Array, Array]:
        """Limits on the transient, and what the relaxation proves of each."""
        kinds = np.array([group.kind for group in groups])
        limits = np.unique(np.concatenate([self.transient[self.fronts[kind], kind] for kind in kinds.tolist()]))
        always, saved = (self.mesh[name][self.useful][:, kinds] for name in ("always_bytes", "saved_bytes"))
        held = always + self.growth * np.array([group.flights[0] for group in groups]) * saved
        allowed = self.transient[self.useful][:, kinds] <= limits[:, None, None]
        offset, sums = self._sums(groups, ramp_s)
        some = _largest(offset, list(sums[:, self.useful].transpose(2, 0, 1)))
        cost = np.where(allowed, sums[some][:, None, self.useful], np.inf)  # (sums, limits, strategies, groups)
        many = cost.shape[0] * cost.shape[1]
        size = np.array([float(group.size) for group in groups])
        cells = Cells(
            np.repeat(np.arange(many), len(groups)), np.tile(kinds, many), np.tile(size, many), *[size] * 3
        )
        found = dual_s(
            cost.transpose(2, 0, 1, 3).reshape(len(self.useful), -1), np.tile(held, many), cells,
            np.tile(self.room - self.growth * limits, len(some)),
        )  # fmt: skip
        bounds: Array = (found.reshape(len(some), -1) + offset[some][:, None]).max(axis=0)
        return limits, bounds

    def _sums(self, groups: Sequence[_Group], ramp_s: float) -> tuple[Array, Array]:
        """The sums whose largest a device takes: what is added to each, and (5, strategies, groups) of one block."""
        counts = np.zeros(len(self.mesh.kinds))
        for group in groups:
            counts[group.kind] += group.size
        shares = [1.0 / max(float(counts @ each), 1.0) for each in self.buckets.values()]
        kinds = np.array([group.kind for group in groups])
        whole = self.work[:, kinds] + _exposed(self.mesh, *shares, kinds)
        return np.array([0.0] * 4 + [ramp_s]), np.concatenate([whole, self.work[None, :, kinds]])

    def _small(self, groups: Sequence[_Group], limit: float) -> list[list[int]]:
        """Strategies of every group whose transients keep a limit."""
        return [[s for s in self.fronts[g.kind] if self.transient[s, g.kind] <= limit] for g in groups]

    def _within(self, device: Device, limit: float, ramp_s: float) -> Solved | None:
        """The best strategies under a limit on the transient."""
        moments = [self._fullest(device.number)]
        while True:
            groups = self._groups(device, moments)
            small = self._small(groups, limit)
            if not all(small):
                return None
            found = self.solver(self._problem(groups, small, limit, ramp_s))
            if found is None:
                return None
            solved = self._named(device, groups, small, *found)
            fuller = self._overfull(device, solved, limit)
            if fuller is None:
                return solved
            moments.append(fuller)

    def _overfull(self, device: Device, solved: Solved, limit: float) -> int | None:
        """The moment at which the strategies exceed a budget by most, if they do at any."""
        mesh, flights = self.mesh, self.flights(device.number)
        embedding, head = len(mesh.kinds) - 3, len(mesh.kinds) - 2
        taken = [
            (chunk, kind, s, n)
            for chunk, by_kind in enumerate(solved.runs)
            for kind, runs in enumerate(by_kind)
            for s, n in runs
        ]
        taken += [] if solved.embedding is None else [(0, embedding, solved.embedding, 1)]
        taken += [] if solved.head is None else [(self.virtual_stages - 1, head, solved.head, 1)]
        chunk, kind, s, n = (np.array(column) for column in zip(*taken, strict=True))
        always, saved, _, host, host_saved = (mesh[name][s, kind] * n for name in _BYTES)
        held = (always.sum() + self.growth * (flights[:, chunk] @ saved)) / (self.room - self.growth * limit)
        if self.hosted:
            held = np.maximum(held, (host.sum() + flights[:, chunk] @ host_saved) / max(self.host_room, 1.0))
        worst = int(np.argmax(held))
        return worst if held[worst] > 1.0 + SLACK * 10 else None

    def _named(
        self, device: Device, groups: Sequence[_Group], small: Sequence[Sequence[int]], seconds: float, counts: Counts
    ) -> Solved:  # fmt: skip
        """Counts per group as runs per chunk and kind; the strategies that save least come first."""
        saved = self.mesh["saved_bytes"]
        runs: list[list[Runs]] = [[() for _ in layers] for layers in device.layers]
        ends: dict[int, int] = {}
        for group, some, taken in zip(groups, small, counts, strict=True):
            kind = group.kind
            used = [(float(saved[s, kind]), s, n) for s, n in zip(some, taken, strict=True) if n]
            left = [[s, n] for _, s, n in sorted(used)]
            if kind >= len(device.layers[0]):
                ends[kind] = left[0][0]
                continue
            for chunk in group.chunks:
                room = device.layers[chunk][kind]
                mine: list[tuple[int, int]] = []
                while room:
                    n = min(room, left[0][1])
                    mine.append((left[0][0], n))
                    left[0][1] -= n
                    room -= n
                    if not left[0][1]:
                        left.pop(0)
                runs[chunk][kind] = tuple(mine)
        embedding, head = len(self.mesh.kinds) - 3, len(self.mesh.kinds) - 2
        return Solved(seconds, tuple(map(tuple, runs)), ends.get(embedding), ends.get(head))


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Layers of one kind in some chunks, and their micro-batches in flight at some moments."""

    kind: int
    chunks: tuple[int, ...]
    size: int
    flights: Array


def _exposed(mesh: Mesh, gradients: Array | float, weights: Array | float, kind: Array) -> Array:
    """What follows the last backward of one block of some kinds, (4, strategies, places): the update and, of gradients and of
    weights, their last bucket or what is left of them after the work beside them.

    Args:
        gradients, weights: share of a bucket in the traffic.
        kind: of every place.
    """
    beside = (mesh["backward_s"] + mesh["weight_s"] + mesh["recompute_s"])[:, kind]
    g, w, forward = (mesh[name][:, kind] for name in ("gradients_step_s", "weights_step_s", "forward_s"))
    main = mesh["main_step_s"][:, kind]
    of_gradients = (gradients * g, g - (1.0 - gradients) * beside)
    of_weights = (weights * w, w - (1.0 - weights) * forward)
    return np.stack([main + x + y for x, y in itertools.product(of_gradients, of_weights)])


@lru_cache(maxsize=64)
def _front(mesh: Mesh) -> list[list[int]]:
    """Per kind, strategies that no other equals or beats in all of time and memory, whatever the share of a bucket."""
    every, work = np.arange(len(mesh.kinds)), mesh.micro_batches * mesh.micro_batch_s
    transient = mesh["block_bytes"] + mesh["recomputed_bytes"]
    # What is exposed is linear in both shares: what holds at their ends holds between them.
    times = [work + _exposed(mesh, g, w, every) for g, w in itertools.product((0.0, 1.0), repeat=2)]
    held = np.stack([*(mesh[name] for name in _BYTES), transient, work])
    columns = np.concatenate([*times, held])
    fronts = []
    for kind in range(len(mesh.kinds) - 1):
        values = np.unique(columns[:, :, kind], axis=0).T
        kept: list[int] = []
        for s in np.lexsort(values.T[::-1]).tolist():
            if not kept or not np.any(np.all(values[kept] <= values[s], axis=1)):
                kept.append(s)
        fronts.append(sorted(kept))
    return fronts


def _largest(offset: Array, costs: Sequence[Array]) -> list[int]:
    """Sums that may be the largest: no other is as large for every strategy."""
    rows = np.concatenate([offset[:, None], *costs], axis=1)
    kept: list[int] = []
    for i in np.lexsort(rows.T[::-1])[::-1].tolist():
        if not any(np.all(rows[j] >= rows[i]) for j in kept):
            kept.append(i)
    return sorted(kept)


@lru_cache(maxsize=4096)
def _flights(schedule: str, pp: int, depth: int, virtual_stages: int, device: int) -> Array:
    return live_vectors(schedule, pp, depth, virtual_stages, device, np.eye(virtual_stages))
