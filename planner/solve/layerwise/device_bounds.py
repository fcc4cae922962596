"""What a device of a pipeline takes and holds, and what no strategies of its layers undercut.

A device's time in a step is its micro-batches' work, then what nothing hides of gradients and weights. Of traffic ``g`` in
``1/σ`` buckets beside ``b`` seconds of work, ``max(σ·g, g − (1 − σ)·b)`` is exposed
(:func:`planner.costs.overlap.uniform_bucket_exposure_s`), so that the time is the largest of four sums over layers, with the
``σ`` of the most buckets that they may have. Its bytes are sums too, but for the largest transient of a block at work, whose
range is taken in turn.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from planner.costs.arrays import distinct
from planner.ledger import Array
from planner.pipeline.composer import SLOWER, saturated
from planner.pipeline.layout import Layout
from planner.schedule.critical import Path
from planner.schedule.live import live_vectors
from planner.solve.layerwise.counts import unbeaten
from planner.solve.layerwise.duals import Cells, dual_at, dual_s
from planner.solve.layerwise.planes import Planes, Ranges
from planner.solve.layerwise.relaxation import in_flight
from planner.solve.layerwise.stages import Line
from planner.solve.layerwise.strategies import Mesh
from planner.specs.problem import Problem
from planner.uncertainty.memory_limit import room_bytes

__all__ = ["BYTES", "DeviceBounds", "Known", "exposed", "in_tier", "largest"]

BYTES = ("always_bytes", "saved_bytes", "step_bytes")
"""Fields of device memory that are held to budgets."""

_RANGE = 0.005  # of a device's memory, by which transients may differ and be bounded together
_KEPT = 8  # prices of a device that are tried first the next time
_FEW = 6  # layouts whose prices are found, of those that are bounded side by side
_STEEP = 4096.0  # price of a byte that no plan pays, in seconds of all blocks per byte of the device
_LONGEST_S = 1e9  # of a block under a strategy whose transient a range does not allow
_SIZES = (-4.0, -1.0, 0.0, 1.0, 4.0)  # layers more than even stages have, at which bounds of stages are tight


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What is known of a row's devices, whatever the layout; grows.

    Attributes:
        prices: of bytes, that proved most of a device, by its number.
        least: seconds by mesh, room and cells, of :meth:`DeviceBounds.least_s`.
    """

    prices: defaultdict[int, list[Array]] = field(default_factory=partial(defaultdict, list))
    least: dict[tuple[Mesh, float, bytes], tuple[Array, Array]] = field(default_factory=dict)


class DeviceBounds:
    """Costs and budgets of the devices of one mesh under one schedule, and bounds by duality.

    Args:
        known: of the same row, in other layouts or with other strategies.
        filled: whether devices have the room of one that activations fill, which every plan within keeps; or that of one without,
            which no plan goes beyond (:func:`~planner.uncertainty.memory_limit.room_bytes`).
    """

    def __init__(
        self, problem: Problem, mesh: Mesh, schedule: str, virtual_stages: int, known: Known | None = None,
        filled: bool = True,
    ) -> None:  # fmt: skip
        self.problem = problem
        self.mesh, self.schedule, self.virtual_stages = mesh, schedule, virtual_stages
        stack = problem.stack
        self.growth = 1.0 + stack.fragmentation.value
        self.idle = stack.framework_bytes.value + stack.communicator_bytes.value * mesh.communicators
        self.room = float(room_bytes(problem, self.idle, filled=filled)) - self.idle
        self.transient = mesh["block_bytes"] + mesh["recomputed_bytes"]
        self.work = mesh.micro_batches * mesh.micro_batch_s
        self.buckets = [mesh[f"{track}_messages"].max(axis=0) for track in ("gradients", "weights")]
        self.slower = {
            tier: float(capacity)
            for tier, capacity in problem.cluster.slower_bytes.items()
            if mesh[f"{tier}_bytes"].any() or mesh[f"{tier}_saved_bytes"].any()
        }
        self.names = [
            ("always_bytes", "saved_bytes", self.growth),
            *((*in_tier(tier), 1.0) for tier in self.slower),
        ]
        """Fields of what counts against each budget: the device's, and those of slower tiers; and what allocators make of it."""
        self.depth = int(saturated(schedule, mesh.pp, virtual_stages, mesh.micro_batches))
        self.fronts = _front(mesh)
        self._known = Known() if known is None else known
        self._afters: dict[bytes, Array] = {}
        self.useful = sorted({s for front in self.fronts for s in front})

    def flights(self, device: int) -> Array:
        """Micro-batches in flight of each chunk at each of the device's fullest moments, (moments, chunks)."""
        return _flights(self.schedule, self.mesh.pp, self.depth, self.virtual_stages, device)

    def least_s(self, layout: Layout, enough_s: float = np.inf) -> tuple[Array, Array]:
        """No strategies make a layout's devices faster, (devices,) each; infinite where none fit.

        First their work, and on the first device what follows it; then their work with all that follows it. Once one of them
        takes ``enough_s``, the others are not bounded more closely.
        """
        m, once = self.mesh.micro_batches, np.ones((layout.virtual_stages, layout.pp))
        cells, least = self._cells(layout, m * once, m * once), self._known.least
        key = self.mesh, self.room, cells.key()
        if key in least:
            return least[key]
        s, kind = self.useful, cells.kind
        alone = self.work[s][:, kind]
        after = self._after(layout.device_counts, cells.device, kind)
        work_s = self._within_limits(alone + np.where(cells.device == 0, after[0], 0.0), cells, enough_s)
        whole_s = self._within_limits(alone + after[3], cells, enough_s if work_s.max() < enough_s else 0.0)
        work_s[0] = max(work_s[0], whole_s[0])
        least[key] = work_s, whole_s
        return work_s, whole_s

    def along_s(self, layout: Layout, path: Path, enough_s: float = np.inf) -> float:
        """No strategies of a layout make a path through its schedule shorter, without hops; infinite where none fit. A bound of
        ``enough_s`` is not tightened."""
        costs, cells = self._along(layout, path)
        least = self._duals(costs, cells)[0].min(axis=0)
        # Prices that are known may prove enough.
        for tight_s in (0.0, np.inf) if enough_s < np.inf else (np.inf,):
            if _together(least, layout.pp, path) >= enough_s:
                break
            least = self._tightened(least, costs, cells, np.inf, tight_s)
        return _together(least, layout.pp, path)

    def along_each_s(self, layouts: Sequence[Layout], paths: Sequence[Path]) -> list[float]:
        """:meth:`along_s` of several layouts side by side, each along a path of its own, by device memory alone and at the prices
        of its bytes that prove most of a few of them."""
        every = [self._along(layout, path) for layout, path in zip(layouts, paths, strict=True)]
        costs, cells, starts = _side_by_side(every)
        found, prices = self._duals(*_side_by_side(every[:: -(-len(every) // _FEW)])[:2])
        steep = _STEEP * np.max(found, where=np.isfinite(found), initial=0.0) / max(self.room, 1.0)
        prices = np.minimum(prices, steep)  # where nothing fits
        # Hardly any of the blocks differ in more than how many there are.
        columns, alike = _classes(np.concatenate([cells.kind[None], cells.flights[None], costs]))
        cost, held = (
            costs[:, columns],
            self._held(cells.kind[columns], cells.flights[columns], self.names[:1])[0],
        )
        low, high = self._limits(distinct(cells.kind).tolist())
        transient = self.transient[self.useful][:, cells.kind[columns]]
        least = np.min(
            [
                dual_at(
                    np.where(transient <= upper, cost, _LONGEST_S), held, cells, self.room - self.growth * lower,
                    distinct(prices[number]), alike,
                )
                for number, (lower, upper) in enumerate(zip(low, high, strict=True))
            ],
            axis=0,
        )  # fmt: skip
        ends = [*starts[1:].tolist(), len(least)]
        return [
            _together(least[start:stop], layout.pp, path)
            for start, stop, layout, path in zip(starts.tolist(), ends, layouts, paths, strict=True)
        ]

    def _along(self, layout: Layout, path: Path) -> tuple[Array, Cells]:
        """What blocks take on a path, (useful strategies, cells); behind the devices, copies of the one where it ends, each with
        one of the sums that may follow."""
        shape = layout.virtual_stages, layout.pp
        cells = self._cells(layout, path.counts[0].reshape(shape), path.counts[1].reshape(shape))
        s, kind = self.useful, cells.kind
        forward_s = self.mesh["forward_s"][s]
        backward_s = self.mesh.micro_batch_s[s] - forward_s
        cost = cells.forwards * forward_s[:, kind] + cells.backwards * backward_s[:, kind]
        at_end = np.flatnonzero(cells.device == path.device)
        sums = [each[:, kind[at_end]] for each in self._sums_after(layout.device_counts[path.device])]
        every = cells.take(np.concatenate([np.arange(len(kind)), *([at_end] * len(sums))]))
        copies = np.repeat(layout.pp + np.arange(len(sums)), len(at_end))
        every = replace(every, device=np.concatenate([cells.device, copies]))
        return np.concatenate([cost, *(cost[:, at_end] + each for each in sums)], axis=1), every

    def _sums_after(self, counts: Array) -> Array:
        """What may follow the last backward of a device, of a block of each kind: (sums, useful strategies, kinds)."""
        key = counts.tobytes()
        if key not in self._afters:
            kinds = np.flatnonzero(counts)
            after = np.zeros((4, len(self.useful), len(counts)))
            after[:, :, kinds] = self._after(counts[None], np.zeros(len(kinds), dtype=np.intp), kinds)
            self._afters[key] = after[
                largest(np.zeros(len(after)), list(after[:, :, kinds].transpose(2, 0, 1)))
            ]
        return self._afters[key]

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
        gradients, weights = (1.0 / np.maximum(counts @ each, 1.0)[device] for each in self.buckets)
        return exposed(self.mesh, gradients, weights, kind)[:, self.useful]

    def _cells(self, layout: Layout, forwards: Array, backwards: Array) -> Cells:
        """A layout's blocks, in flight as at a full moment of every device."""
        if layout.virtual_stages == 1:
            flights = np.array([[self.flights(device).max() for device in range(layout.pp)]])
        else:
            batches = np.array([float(self.mesh.micro_batches)])
            flights = in_flight(layout.pp, layout.virtual_stages, batches).reshape(forwards.shape)
        return Cells.of(layout.chunks[:, :, :-1], flights, forwards, backwards)

    def _within_limits(self, cost: Array, cells: Cells, enough_s: float = np.inf) -> Array:
        """The dual of every device under each limit on its transient, the smallest of them: (devices,).

        Once a device takes ``enough_s``, no other is bounded more closely.
        """
        return self._tightened(self._duals(cost, cells)[0].min(axis=0), cost, cells, enough_s, enough_s)

    def _duals(self, cost: Array, cells: Cells) -> tuple[Array, Array]:
        """The dual of every device under each limit on its transient, by device memory alone, and the price that proves it:
        (limits, devices) each."""
        low, high = self._limits(distinct(cells.kind).tolist())
        transient = self.transient[self.useful][:, cells.kind]
        many, devices = len(low), int(cells.device[-1]) + 1
        every = replace(
            cells,
            device=(cells.device + devices * np.arange(many)[:, None]).ravel(),
            number=np.tile(cells.number, many),
        )
        costs = (
            np.where(transient <= high[:, None, None], cost, np.inf).transpose(1, 0, 2).reshape(len(cost), -1)
        )
        held = self._held(cells.kind, cells.flights, self.names[:1])[0]
        rooms = np.repeat(self.room - self.growth * low, devices)
        least, prices = dual_s(costs, np.tile(held, many), every, rooms)
        return least.reshape(many, devices), prices.reshape(many, devices)

    def _tightened(self, least: Array, cost: Array, cells: Cells, enough_s: float, tight_s: float) -> Array:
        """The same by slower memory too, where it is in use; none is beyond ``tight_s``."""
        if not self.slower or least.max() >= enough_s:
            return least
        low, high = self._limits(distinct(cells.kind).tolist())
        transient = self.transient[self.useful][:, cells.kind]
        held, least = self._held(cells.kind, cells.flights, self.names), least.copy()
        for device in np.flatnonzero(np.isfinite(least)).tolist():
            if least.max() >= enough_s:
                break
            own = cells.device == device
            ranges = Ranges(cost[None][:, :, own], held[:, :, own], transient[:, own], high, self._rooms(low))
            prices = self._known.prices[device]
            planes = Planes(ranges, cells.number[own][None], steep=False, prices=prices, enough_s=tight_s)
            least[device] = max(least[device], planes.bound(cells.number[own]))
            prices[:] = planes.prices[-_KEPT:]
        return least

    def _rooms(self, low: Array) -> Array:
        """Budgets under each range of the largest transient, (budgets, ranges)."""
        return np.array(
            [self.room - self.growth * low, *(np.full(len(low), size) for size in self.slower.values())]
        )

    def _held(self, kind: NDArray[np.intp], flights: Array, names: Sequence[tuple[str, str, float]]) -> Array:
        """Bytes of one block of some kinds against some budgets, (budgets, useful strategies, places)."""
        return np.stack(
            [
                self.mesh[always][self.useful][:, kind]
                + growth * flights * self.mesh[saved][self.useful][:, kind]
                for always, saved, growth in names
            ]
        )

    def _limits(self, kinds: Sequence[int]) -> tuple[Array, Array]:
        """Ranges of the largest transient of a device's blocks, (low, high]: with strategies up to the upper end of its range, it
        takes at least the lower end."""
        found = distinct(np.concatenate([self.transient[self.fronts[kind], kind] for kind in kinds]))
        starts = [0]
        for at in range(1, len(found)):
            if self.growth * (found[at] - found[starts[-1]]) > _RANGE * self.room:
                starts.append(at)
        return found[starts], found[[*(at - 1 for at in starts[1:]), len(found) - 1]]

    def line(self, device: int, order: Sequence[int], ends: Sequence[int], work_only: bool = False) -> Line:
        """A lower bound of a device's seconds by the layers it holds, for pipelines with one stage per device.

        Planes of the linear relaxation's dual for as many layers as it may well hold, under every limit on the transient.

        Args:
            order: kind of every layer.
            ends: kinds of what the device holds besides: embedding, head.
            work_only: the micro-batches' work without what follows the last.
        """
        functions = self.work[None]
        if not work_only:
            functions = self.work + exposed(self.mesh, 0.0, 0.0, np.arange(len(self.mesh.kinds)))
        functions = functions[:, self.useful]
        kinds = sorted({*order, *ends})
        functions = functions[
            largest(np.zeros(len(functions)), list(functions[:, :, kinds].transpose(2, 0, 1)))
        ]
        every = np.arange(len(self.mesh.kinds) - 1)
        held = self._held(every, np.full(len(every), float(self.flights(device).max())), self.names)
        low, high = self._limits(kinds)
        transient = self.transient[self.useful][:, :-1]
        ranges = Ranges(functions[:, :, :-1], held, transient, high, self._rooms(low))
        planes = Planes(ranges, self._samples(device, order, ends), steep=True)
        offset = planes.least[:, :, list(ends)].sum(axis=2) - planes.paid
        sums = np.cumsum(planes.least[:, :, list(order)], axis=2)
        lines = np.concatenate([np.zeros((*sums.shape[:2], 1)), sums], axis=2)
        # Differences of sums over all layers keep no more digits than the sums, which are larger than a device's share of them.
        offset = offset - np.finfo(float).eps * (len(order) + 2) * lines[:, :, -1]
        return Line(np.ascontiguousarray(offset.T), np.ascontiguousarray(lines.transpose(1, 0, 2)))

    def _samples(self, device: int, order: Sequence[int], ends: Sequence[int]) -> Array:
        """As many layers as a device may well hold, from where it may well begin, with its ends: (samples, kinds)."""
        layers, pp = len(order), self.mesh.pp
        begin = round(layers * device / pp)
        sizes = distinct(np.clip(layers / pp + np.array(_SIZES), 1, layers).round().astype(int))
        counts = np.zeros((len(sizes), len(self.mesh.kinds) - 1))
        for sample, n in enumerate(sizes.tolist()):
            start = min(begin, layers - n)
            np.add.at(counts[sample], [*order[start : start + n], *ends], 1.0)
        return counts


def _side_by_side(several: Sequence[tuple[Array, Cells]]) -> tuple[Array, Cells, NDArray[np.intp]]:
    """Costs and cells of several layouts, and the numbers at which their devices begin."""
    starts = np.cumsum([0, *(int(cells.device[-1]) + 1 for _, cells in several[:-1])])
    costs = np.concatenate([cost for cost, _ in several], axis=1)
    return costs, Cells.joined([cells for _, cells in several], starts), starts


def _classes(keys: Array) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Columns of a table that are not alike, and the one that each column is alike to, by its place among these."""
    numbers: dict[bytes, int] = {}
    of = [numbers.setdefault(key.tobytes(), len(numbers)) for key in np.ascontiguousarray(keys.T)]
    alike = np.array(of, dtype=np.intp)
    first = np.full(len(numbers), len(of), dtype=np.intp)
    np.minimum.at(first, alike, np.arange(len(of)))
    return first, alike


def _together(least: Array, devices: int, path: Path) -> float:
    """The sum along a path, whose last device stands behind the others too, once for every sum that may follow."""
    along = least[:devices].copy()
    along[path.device] = least[devices:].max()
    return float(along.sum())


def exposed(mesh: Mesh, gradients: Array | float, weights: Array | float, kind: Array) -> Array:
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


def largest(offset: Array, costs: Sequence[Array]) -> list[int]:
    """Sums that may be the largest: no other is as large for every strategy."""
    rows = np.concatenate([offset[:, None], *costs], axis=1)
    kept: list[int] = []
    for i in np.lexsort(rows.T[::-1])[::-1].tolist():
        if not any(np.all(rows[j] >= rows[i]) for j in kept):
            kept.append(i)
    return sorted(kept)


@lru_cache(maxsize=64)
def _front(mesh: Mesh) -> list[list[int]]:
    """Per kind, strategies that no other equals or beats in all of time and memory, whatever the share of a bucket."""
    every, work = np.arange(len(mesh.kinds)), mesh.micro_batches * mesh.micro_batch_s
    transient = mesh["block_bytes"] + mesh["recomputed_bytes"]
    # What is exposed is linear in both shares: what holds at their ends holds between them.
    times = [work + exposed(mesh, g, w, every) for g, w in itertools.product((0.0, 1.0), repeat=2)]
    names = (*BYTES, *(name for tier in SLOWER for name in in_tier(tier)))
    held = np.stack([*(mesh[name] for name in names), transient, work])
    columns = np.concatenate([*times, held])
    return [unbeaten(columns[:, :, kind].T).tolist() for kind in range(len(mesh.kinds) - 1)]


@lru_cache(maxsize=4096)
def _flights(schedule: str, pp: int, depth: int, virtual_stages: int, device: int) -> Array:
    return live_vectors(schedule, pp, depth, virtual_stages, device, np.eye(virtual_stages))


def in_tier(tier: str) -> tuple[str, str]:
    """Fields of what a slower tier holds: throughout, and per micro-batch in flight."""
    return f"{tier}_bytes", f"{tier}_saved_bytes"
