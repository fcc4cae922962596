"""The pipeline composer: block tables in, step time and peak memory of every device out.

A layout says how many blocks of each kind every virtual stage holds. Because a stage is a sum of blocks, everything about it
is a small matrix times a block table, so that a million candidates that share a layout are composed with a few products.
:func:`step_bound` is a valid lower bound on the schedule's makespan, :func:`memory` the exact peak of its order; the schedule
engine then gives the exact makespan of the few candidates that matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.baseline import EMBEDDING, HEAD
from planner.costs.overlap import uniform_bucket_exposure_s
from planner.costs.pipeline_bounds import bound_1f1b_s, bound_interleaved_s
from planner.engine import POOLS, BlockTable
from planner.ledger import Array
from planner.schedule.live import live_vectors
from planner.specs.stack import Stack

__all__ = [
    "LAYOUT_NAMES",
    "Dealt",
    "Layout",
    "Layouts",
    "Split",
    "deal_layers",
    "held_bytes",
    "layout_of",
    "layouts",
    "memory",
    "memory_parts",
    "phase_seconds",
    "saturated",
    "step_bound",
    "tail_seconds",
    "tight_bound",
]

BOUNDARY = "boundary"  # the pseudo-block that stands for one hop between neighbouring stages


@dataclass(frozen=True, slots=True)
class Split:
    """How layers are dealt to virtual stages: how many fewer the first and the last get, to make room for embedding and head."""

    name: str
    first_fewer: int
    last_fewer: int


SPLITS = (
    Split("even", 0, 0),
    Split("short_ends", 1, 1),
    Split("short_first", 1, 0),
    Split("short_last", 0, 1),
)
LAYOUT_NAMES = (*(split.name for split in SPLITS), "balanced")


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Blocks per virtual stage, and what pricing reads off it.

    ``counts``: (virtual stages, kinds), stage ``chunk·pp + device``; ``chunks`` the same as (chunks, devices, kinds), and
    ``device_counts`` their sum. Equal neighbouring devices form a run, which is held to memory at its first device (most in
    flight: ``run_first``, ``first_counts``) and priced at its last (it waits longest: ``run_last``, ``last_counts``);
    ``ramp`` are the first chunks of all devices before it. ``layers``: most transformer layers on one device.
    """

    pp: int
    virtual_stages: int
    split: str
    counts: Array
    chunks: Array
    device_counts: Array
    run_first: NDArray[np.int64]
    run_last: NDArray[np.int64]
    first_counts: Array
    last_counts: Array
    ramp: Array
    layers: int

    def take(self, index: NDArray[np.intp]) -> Layout:
        """The layout of some of the rows: itself."""
        return self


class Layouts:
    """Layouts side by side, from which rows pick theirs."""

    def __init__(self, each: Sequence[Layout]) -> None:
        self.each = tuple(each)
        self.runs = max(len(layout.run_first) for layout in each)
        self._arrays: dict[str, Array] = {}

    def deal(self, of: NDArray[np.intp]) -> Layout | Dealt:
        """Rows with the layouts at ``of``."""
        return self.each[int(of[0])] if len(of) and np.all(of == of[0]) else Dealt(self, of)

    def stacked(self, name: str) -> Array:
        """An attribute of all layouts, along the last axis; the last run several times where others have more runs."""
        if name not in self._arrays:
            values = [getattr(layout, name) for layout in self.each]
            if name == "device_counts":
                values = [counts[:1] for counts in values]
            elif np.ndim(values[0]):
                values = [v[np.minimum(np.arange(self.runs), len(v) - 1)] for v in values]
            self._arrays[name] = np.ascontiguousarray(np.stack(values, axis=-1), dtype=np.float64)
        return self._arrays[name]


@dataclass(frozen=True, slots=True, eq=False)
class Dealt:
    """Rows that have each a layout of their own (its place in ``among`` is ``of``), in the terms of :class:`Layout`.

    What a layout has per run and kind is (runs, kinds, rows) here; ``device_counts`` are of the first device alone.
    """

    among: Layouts
    of: NDArray[np.intp]

    def take(self, index: NDArray[np.intp]) -> Layout | Dealt:
        """Some of the rows."""
        return self.among.deal(self.of[index])

    def __getattr__(self, name: str) -> Array:
        if name not in Layout.__slots__:
            raise AttributeError(name)
        return self.among.stacked(name).take(self.of, axis=-1)


def _over(counts: Array, values: Array) -> Array:
    """Sums over kinds: counts (runs, kinds), or (runs, kinds, rows), times values (kinds, rows); (runs, rows)."""
    total: Array = counts @ values if counts.ndim == 2 else np.einsum("rka,ka->ra", counts, values)
    return total


def _per_row(values: NDArray[Any]) -> Array:
    """What a layout (runs) or every row (runs, rows) has per run, to go with (runs, rows)."""
    return values[:, None] if values.ndim == 1 else values


@lru_cache(maxsize=4096)
def layouts(
    order: tuple[str, ...], kinds: tuple[str, ...], pp: int, virtual_stages: int
) -> tuple[Layout, ...]:
    """Every way to deal the layers evenly to ``pp·virtual_stages`` stages.

    Even, with one layer fewer on the first and/or last stage (which also hold embedding and head); where nothing divides, a
    balanced split whose ends get the smaller share.
    """
    stages, n = pp * virtual_stages, len(order)
    found = []
    for split in SPLITS:
        total = n + split.first_fewer + split.last_fewer
        if total % stages or (stages == 1 and split.name != "even") or total // stages < 1:
            continue
        sizes = [total // stages] * stages
        sizes[0] -= split.first_fewer
        sizes[-1] -= split.last_fewer
        found.append(deal_layers(order, kinds, pp, virtual_stages, split.name, sizes))
    if not found and n >= stages:
        small, longer = divmod(n, stages)
        start = (stages - longer) // 2
        sizes = [small + (start <= stage < start + longer) for stage in range(stages)]
        found.append(deal_layers(order, kinds, pp, virtual_stages, "balanced", sizes))
    return tuple(found)


def deal_layers(
    order: Sequence[str],
    kinds: tuple[str, ...],
    pp: int,
    virtual_stages: int,
    split: str,
    sizes: Sequence[int],
) -> Layout:
    """The layout of some numbers of layers per virtual stage, which add up to all layers."""
    ends = np.cumsum(sizes)
    counts = np.diff(_cumulative(tuple(order), kinds)[np.concatenate([[0], ends])], axis=0)
    counts[0, kinds.index(EMBEDDING)] = 1
    counts[-1, kinds.index(HEAD)] = 1
    return layout_of(counts, pp, virtual_stages, split)


def layout_of(counts: Array, pp: int, virtual_stages: int, split: str) -> Layout:
    """The layout of given blocks per virtual stage, (pp·virtual_stages, kinds); the last three kinds are no layers."""
    chunks = counts.reshape(virtual_stages, pp, -1)
    changes = np.flatnonzero(np.any(chunks[:, 1:] != chunks[:, :-1], axis=(0, 2)))
    first, last = np.concatenate([[0], changes + 1]), np.concatenate([changes, [pp - 1]])
    device_counts = chunks.sum(axis=0)
    before = np.cumsum(chunks[0], axis=0) - chunks[0]
    layers = int(device_counts[first][:, :-3].sum(axis=1).max())
    return Layout(
        pp, virtual_stages, split, counts, chunks, device_counts, first, last, device_counts[first], device_counts[last],
        before[last], layers,
    )  # fmt: skip


@lru_cache(maxsize=16)
def _cumulative(order: tuple[str, ...], kinds: tuple[str, ...]) -> Array:
    """Layers of each kind before each position: (layers + 1, kinds)."""
    one_hot = np.array([[kind == name for kind in kinds] for name in order], dtype=np.float64)
    return np.concatenate([np.zeros((1, len(kinds))), np.cumsum(one_hot, axis=0)])


def step_bound(
    table: BlockTable,
    layout: Layout | Dealt,
    micro_batches: Array,
    recompute_layers: Array | float | None = None,
) -> Array:
    """A lower bound on the step time of candidates that share a layout, per row; never above the schedule engine's.

    Device ``i`` cannot start before the first micro-batch has passed the stages before it, works ``m·T_i``, and is followed
    by the last micro-batch's backward through them and the first device's tail, or by its own:
    ``max_i (Σ_{j<i} F_j + i·c + m·T_i + max(tail_i, Σ_{j<i} B_j + i·c + tail_0))`` with chunk 0 of device ``j`` in the ramps
    and ``c`` one hop. It is exact for equal stages without hops.

    Args:
        table: block totals, (kinds, rows).
        layout: blocks per virtual stage, of all rows or of each.
        micro_batches: m, per row.
        recompute_layers: of each device's layers, how many are recomputed (None: all that the ledger recomputes).
    """
    forward, backward, again = phase_seconds(table)
    backward = backward + again * recomputed_fraction(layout, recompute_layers)
    hop_s = table["forward_s"][table.kinds.index(BOUNDARY)]
    forward_work_s, backward_work_s = (_over(layout.last_counts, each) for each in (forward, backward))
    tail_s = tail_seconds(table, layout.last_counts, forward_work_s, backward_work_s)
    if len(layout.run_first) > 1 and np.all(layout.run_last[0] == 0):
        first_tail_s = tail_s[0]
    else:
        counts = layout.device_counts[:1]
        first_tail_s = tail_seconds(table, counts, _over(counts, forward), _over(counts, backward))[0]
    hops_s = _per_row(layout.run_last) * hop_s
    before_s, after_s = _over(layout.ramp, forward) + hops_s, _over(layout.ramp, backward) + hops_s
    work_s = micro_batches * (forward_work_s + backward_work_s)
    bound_s: Array = np.max(before_s + work_s + np.maximum(tail_s, after_s + first_tail_s), axis=0)
    return bound_s


def tight_bound(
    table: BlockTable,
    layout: Layout,
    schedule: str,
    micro_batches: Array,
    recompute_layers: Array | float | None = None,
) -> Array:
    """A lower bound that also knows the schedule's own cycles, hops included; dearer than :func:`step_bound`.

    Its paths begin and end on the first device, whose tail follows them. ``recompute_layers`` may hold infinities: all layers.
    """
    forward, backward, again = phase_seconds(table)
    backward = backward + again * recomputed_fraction(layout, recompute_layers)
    counts = layout.device_counts[:1]
    tail_s: Array = tail_seconds(table, counts, counts @ forward, counts @ backward)[0]
    hop_s = table["forward_s"][table.kinds.index(BOUNDARY)]
    runs, lengths = layout.run_first, np.diff([*layout.run_first, layout.pp])
    if layout.pp == 1 or schedule not in _CYCLE_BOUNDS:
        return tail_s
    chunks = layout.chunks[:, runs] if layout.virtual_stages > 1 else layout.chunks[0, runs]
    price = _CYCLE_BOUNDS[schedule]
    bound_s: Array = tail_s + price(chunks @ forward, chunks @ backward, micro_batches, hop_s, lengths)
    return bound_s


_CYCLE_BOUNDS = {"1f1b": bound_1f1b_s, "interleaved": bound_interleaved_s}


def recomputed_fraction(layout: Layout | Dealt, recompute_layers: Array | float | None) -> Array | float:
    """Share of a device's layers that is recomputed."""
    return 1.0 if recompute_layers is None else np.minimum(np.divide(recompute_layers, layout.layers), 1.0)


def phase_seconds(table: BlockTable) -> tuple[Array, Array, Array]:
    """Forward, full backward, and recompute seconds per block: (kinds, rows) each.

    A stage holds no boundary, so hops drop out wherever these meet a layout's counts.
    """
    return table["forward_s"], table["backward_s"] + table["weight_s"], table["recompute_s"]


def tail_seconds(table: BlockTable, counts: Array, forward_s: Array, backward_s: Array) -> Array:
    """What follows each device's last backward: exposed gradient traffic, the update, exposed weight gathers.

    Gradients hide behind the last micro-batch's backward, weights behind the next step's first forward.

    Args:
        table: block totals.
        counts: (devices, kinds), or (devices, kinds, rows).
        forward_s, backward_s: (devices, rows), one micro-batch through all of a device's chunks.
    """
    total: Array = _over(counts, table["main_step_s"])
    for track, beside_s in (("gradients", backward_s), ("weights", forward_s)):
        messages = np.maximum(_over(counts, table[f"{track}_messages"]), 1.0)
        total = total + uniform_bucket_exposure_s(_over(counts, table[f"{track}_step_s"]), beside_s, messages)
    return total


def held_bytes(layout: Layout | Dealt, each: Array) -> Array:
    """Sums over the blocks of the first device of each run: (runs, rows) of (kinds, rows)."""
    return _over(layout.first_counts, each)


def memory(
    table: BlockTable,
    layout: Layout | Dealt,
    schedule: str,
    micro_batches: Array,
    stack: Stack,
    communicators: Array | float,
    recompute_layers: Array | float | None = None,
) -> tuple[Array, Array]:
    """Peak device bytes and host bytes, the largest over devices, per row."""
    live, at_work, host = _dynamic(table, layout, schedule, micro_batches, recompute_layers)
    held = held_bytes(layout, table["always_bytes"])
    idle = stack.framework_bytes.value + stack.communicator_bytes.value * communicators
    passes = (1.0 + stack.fragmentation.value) * (live + at_work)
    peak = (held + np.maximum(passes, held_bytes(layout, table["step_bytes"]))).max(axis=0) + idle
    return peak, host.max(axis=0)


def memory_parts(
    table: BlockTable,
    layout: Layout,
    schedule: str,
    micro_batches: Array,
    stack: Stack,
    communicators: Array | float,
    recompute_layers: Array | float | None = None,
) -> dict[str, Array]:
    """The same by pool, on the first device of each run of equal devices: (runs, rows); ``host`` is host memory.

    ``activations`` is the schedule's exact peak of saved bytes; ``workspace`` the largest transient of a block, taken to
    coincide with it; ``update`` what the optimizer step needs beyond both. ``cached`` is no part of the peak: freed blocks that
    an allocator keeps because later tensors are larger than each of them. Layers run before the head, whose logits are larger
    than a layer's tensors; the update's flat buffers are larger than both.
    """
    live, at_work, host = _dynamic(table, layout, schedule, micro_batches, recompute_layers)
    ends = table.kinds.index(EMBEDDING)
    layers, head = (
        _transients(table, layout, recompute_layers, part) for part in (slice(0, ends), slice(ends, None))
    )
    parts: dict[str, Array] = {pool: layout.first_counts @ table[f"{pool}_bytes"] for pool in POOLS}
    parts["activations"] = live
    parts["workspace"] = at_work
    parts["framework"] = np.full_like(live, stack.framework_bytes.value)
    parts["communicators"] = np.broadcast_to(stack.communicator_bytes.value * communicators, live.shape)
    parts["fragmentation"] = stack.fragmentation.value * (live + at_work)
    passes, step = live + at_work + parts["fragmentation"], layout.first_counts @ table["step_bytes"]
    parts["update"] = np.maximum(step - passes, 0.0)
    freed = np.stack([np.max(table["freed_bytes"][there], axis=0) for there in layout.first_counts > 0])
    parts["cached"] = np.minimum(step, passes) + np.minimum(layers, head) + freed
    parts["host"] = host
    return parts


def _dynamic(
    table: BlockTable,
    layout: Layout | Dealt,
    schedule: str,
    micro_batches: Array,
    recompute_layers: Array | float | None,
) -> tuple[Array, Array, Array]:
    """Saved activations at their peak, the largest transient, and host bytes: (runs, rows) each."""
    fraction = recomputed_fraction(layout, recompute_layers)
    recomputed = table["recomputed_bytes"]
    saved = table["saved_bytes"] + (1.0 - fraction) * recomputed
    live = _peak(saved, layout, schedule, micro_batches)
    at_work = _transients(table, layout, recompute_layers, slice(None))
    host = held_bytes(layout, table["host_bytes"])
    saved_on_host = table["host_saved_bytes"]
    if saved_on_host.any():
        host = host + _peak(saved_on_host, layout, schedule, micro_batches)
    return live, at_work, host


def _transients(
    table: BlockTable, layout: Layout | Dealt, recompute_layers: Array | float | None, part: slice
) -> Array:
    """The largest transient of a block among a part of the kinds, on the first device of each run: (runs, rows)."""
    recomputed = np.greater(recomputed_fraction(layout, recompute_layers), 0) * table["recomputed_bytes"]
    transient = (table["block_bytes"] + recomputed)[part]
    present = layout.first_counts[:, part] > 0
    if present.ndim == 2:
        return np.stack([np.max(transient[there], axis=0, initial=0.0) for there in present])
    largest: Array = np.max(present * transient, axis=1, initial=0.0)
    return largest


def _peak(saved: Array, layout: Layout | Dealt, schedule: str, micro_batches: Array) -> Array:
    """Largest sum of live activations on the first device of each run: (runs, rows)."""
    if np.all(layout.virtual_stages == 1):
        depth = saturated(schedule, layout.pp, 1, micro_batches)
        return _in_flight(layout, schedule, depth) * held_bytes(layout, saved)
    if isinstance(layout, Dealt):
        live = np.zeros((layout.among.runs, saved.shape[1]))
        for which in np.unique(layout.of).tolist():
            at, own = np.flatnonzero(layout.of == which), layout.among.each[which]
            live[: len(own.run_first), at] = _peak(saved[:, at], own, schedule, micro_batches[at])
        return live
    depth = saturated(schedule, layout.pp, layout.virtual_stages, micro_batches)
    live = np.empty((len(layout.run_first), saved.shape[1]))
    for m in np.unique(depth):
        at = np.flatnonzero(depth == m)
        layers, starts = _live_layers(layout, schedule, int(m))
        live[:, at] = np.maximum.reduceat(layers @ saved[:, at], starts, axis=0)
    return live


def _in_flight(layout: Layout | Dealt, schedule: str, depth: Array) -> Array:
    """Micro-batches in flight on the first device of each run, one chunk per device: (runs, rows)."""
    if schedule == "gpipe":
        return depth
    held: Array = np.minimum(depth, layout.pp - _per_row(layout.run_first))
    return held


@lru_cache(maxsize=16384)
def _live_layers(layout: Layout, schedule: str, m: int) -> tuple[Array, NDArray[np.int64]]:
    """Combinations of live blocks per kind, run after run, and where each run's begin."""
    combinations = [
        live_vectors(schedule, layout.pp, m, layout.virtual_stages, int(device), layout.chunks[:, device])
        for device in layout.run_first
    ]
    starts = np.cumsum([0, *(len(c) for c in combinations[:-1])])
    return np.concatenate(combinations), starts


def saturated(schedule: str, pp: Array | int, virtual_stages: int, micro_batches: Array | int) -> Array:
    """As few micro-batches as have the live activations of that many, which stop growing with their number.

    Interleaved groups longer than ``pp``, and their shorter last one, are taken as they are.
    """
    if schedule == "gpipe":
        return np.asarray(micro_batches)
    most = pp if virtual_stages == 1 else np.where(np.mod(micro_batches, pp) == 0, 2 * pp, np.inf)
    return np.minimum(micro_batches, most)
