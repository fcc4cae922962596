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
from planner.engine import POOLS, BlockTable
from planner.ledger import Array
from planner.schedule.live import live_vectors
from planner.schedule.order import LOOPED, Generator, Placement, generator_of
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
    "tail_traffic",
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

    ``counts``: (virtual stages, kinds), stage ``chunk·pp + device`` (see :class:`~planner.schedule.order.Placement`); ``chunks``
    the same as (chunks, devices, kinds), and ``device_counts`` their sum. Of ``copies`` pipelines side by side, each runs its
    share of the micro-batches. Equal neighbouring devices form a run (or every device is one), which is held to memory at its
    first device (most in flight: ``run_first``, ``first_counts``) and priced at its last (it waits longest: ``run_last``,
    ``last_counts``); ``ramp`` are the ``ramp_hops`` stages that a micro-batch passes before it. ``layers``: most transformer
    layers on one device.
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
    ramp_hops: NDArray[np.int64]
    layers: int
    copies: int = 1

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
    order: tuple[str, ...], kinds: tuple[str, ...], pp: int, virtual_stages: int, placement: Placement = LOOPED,
    alike_in_order: bool = True,
) -> tuple[Layout, ...]:  # fmt: skip
    """Every way to deal the layers evenly to the stages of a pipeline: ``pp·virtual_stages`` of them, over its copies.

    Even, with one layer fewer on the first and/or last stage (which also hold embedding and head); where nothing divides, a
    balanced split whose ends get the smaller share. Unless equal devices are ``alike_in_order``, each is a run of its own.
    """
    stages, n = pp * virtual_stages // placement.copies, len(order)
    found = []
    for split in SPLITS:
        total = n + split.first_fewer + split.last_fewer
        if total % stages or (stages == 1 and split.name != "even") or total // stages < 1:
            continue
        sizes = [total // stages] * stages
        sizes[0] -= split.first_fewer
        sizes[-1] -= split.last_fewer
        found.append(
            deal_layers(order, kinds, pp, virtual_stages, split.name, sizes, placement, alike_in_order)
        )
    if not found and n >= stages:
        small, longer = divmod(n, stages)
        start = (stages - longer) // 2
        sizes = [small + (start <= stage < start + longer) for stage in range(stages)]
        found.append(
            deal_layers(order, kinds, pp, virtual_stages, "balanced", sizes, placement, alike_in_order)
        )
    return tuple(found)


def deal_layers(
    order: Sequence[str], kinds: tuple[str, ...], pp: int, virtual_stages: int, split: str, sizes: Sequence[int],
    placement: Placement = LOOPED, alike_in_order: bool = True,
) -> Layout:  # fmt: skip
    """The layout of some numbers of layers per stage of a pipeline, which add up to all layers."""
    ends = np.cumsum(sizes)
    pipeline = np.diff(_cumulative(tuple(order), kinds)[np.concatenate([[0], ends])], axis=0)
    pipeline[0, kinds.index(EMBEDDING)] = 1
    pipeline[-1, kinds.index(HEAD)] = 1
    return layout_of(pipeline, pp, virtual_stages, split, placement, alike_in_order)


def layout_of(
    pipeline: Array, pp: int, virtual_stages: int, split: str, placement: Placement = LOOPED, alike_in_order: bool = True
) -> Layout:  # fmt: skip
    """The layout of given blocks per stage of a pipeline, (stages, kinds), of whose kinds the last three are no layers."""
    counts = np.tile(pipeline, (placement.copies, 1))
    chunks = placement.by_chunk(counts, pp)
    differ = (
        np.any(chunks[:, 1:] != chunks[:, :-1], axis=(0, 2))
        if alike_in_order
        else np.ones(pp - 1, dtype=bool)
    )
    changes = np.flatnonzero(differ)
    first, last = np.concatenate([[0], changes + 1]), np.concatenate([changes, [pp - 1]])
    device_counts = chunks.sum(axis=0)
    depth = placement.depth(pp)[last]
    before = (np.cumsum(pipeline, axis=0) - pipeline)[depth]
    layers = int(device_counts[first][:, :-3].sum(axis=1).max())
    return Layout(
        pp, virtual_stages, split, counts, chunks, device_counts, first, last, device_counts[first], device_counts[last],
        before, depth, layers, placement.copies,
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
    schedule: Generator | str = "1f1b",
) -> Array:
    """A lower bound on the step time of candidates that share a layout, per row; never above the schedule engine's.

    Device ``i`` cannot start before the first micro-batch has passed the stages before it, works ``m·T_i``, and is followed
    by the last micro-batch's backward through them and the first device's tail, or by its own:
    ``max_i (Σ_{j<i} F_j + i·c + m·T_i + max(tail_i, Σ_{j<i} B_j + i·c + tail_0))`` with stages ``j`` before the device and ``c``
    one hop. It is exact for equal stages without hops under 1F1B. Weight gradients that the schedule splits off may follow the
    last backward, so they count with the device's own tail only; without a barrier between steps there are no ramps.

    Args:
        table: block totals, (kinds, rows).
        layout: blocks per virtual stage, of all rows or of each.
        micro_batches: m, per row.
        recompute_layers: of each device's layers, how many are recomputed (None: all that the ledger recomputes).
        schedule: which kind of order follows.
    """
    generator = generator_of(schedule)
    forward, backward, again = phase_seconds(table)
    backward = backward + again * recomputed_fraction(layout, recompute_layers)
    hop_s = table["forward_s"][table.kinds.index(BOUNDARY)]
    forward_work_s, backward_work_s = (_over(layout.last_counts, each) for each in (forward, backward))
    tail_s = tail_seconds(table, layout.last_counts, forward_work_s, backward_work_s)
    share = micro_batches if np.all(np.equal(layout.copies, 1)) else micro_batches / layout.copies
    work_s = share * (forward_work_s + backward_work_s)
    if not generator.barrier:
        alone_s: Array = np.max(work_s + tail_s, axis=0)
        return alone_s
    if len(layout.run_first) > 1 and np.all(layout.run_last[0] == 0):
        first_tail_s = tail_s[0]
    else:
        counts = layout.device_counts[:1]
        first_tail_s = tail_seconds(table, counts, _over(counts, forward), _over(counts, backward))[0]
    hops_s = _per_row(layout.ramp_hops) * hop_s
    before_s, after_s = _over(layout.ramp, forward) + hops_s, _over(layout.ramp, backward) + hops_s
    if generator.splits_backward:
        weight = table["weight_s"]
        after_s = after_s - _over(layout.ramp, weight) - share * _over(layout.last_counts, weight)
    bound_s: Array = np.max(before_s + work_s + np.maximum(tail_s, after_s + first_tail_s), axis=0)
    return bound_s


def tight_bound(
    table: BlockTable,
    layout: Layout,
    schedule: Generator | str,
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
    price = generator_of(schedule).bound_s
    if layout.pp == 1 or price is None:
        return tail_s
    hop_s = table["forward_s"][table.kinds.index(BOUNDARY)]
    runs, lengths = layout.run_first, np.diff([*layout.run_first, layout.pp])
    chunks = layout.chunks[:, runs] if layout.virtual_stages > 1 else layout.chunks[0, runs]
    bound_s: Array = tail_s + price(chunks @ forward, chunks @ backward, micro_batches, hop_s, lengths)
    return bound_s


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
    for _, exposed_s in tail_traffic(table, counts, forward_s, backward_s).values():
        total = total + exposed_s
    return total


def tail_traffic(
    table: BlockTable, counts: Array, forward_s: Array, backward_s: Array
) -> dict[str, tuple[Array, Array]]:
    """Seconds of gradient and weight traffic per step, and what of them nothing hides: (devices, rows) each; as above."""
    found: dict[str, tuple[Array, Array]] = {}
    for track, beside_s in (("gradients", backward_s), ("weights", forward_s)):
        messages = np.maximum(_over(counts, table[f"{track}_messages"]), 1.0)
        whole_s = _over(counts, table[f"{track}_step_s"])
        found[track] = whole_s, np.asarray(uniform_bucket_exposure_s(whole_s, beside_s, messages))
    return found


def held_bytes(layout: Layout | Dealt, each: Array) -> Array:
    """Sums over the blocks of the first device of each run: (runs, rows) of (kinds, rows)."""
    return _over(layout.first_counts, each)


def memory(
    table: BlockTable,
    layout: Layout | Dealt,
    schedule: Generator | str,
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
    schedule: Generator | str,
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
    schedule: Generator | str,
    micro_batches: Array,
    recompute_layers: Array | float | None,
) -> tuple[Array, Array, Array]:
    """Saved activations at their peak, the largest transient, and host bytes: (runs, rows) each."""
    generator = generator_of(schedule)
    fraction = recomputed_fraction(layout, recompute_layers)
    recomputed = table["recomputed_bytes"]
    saved = table["saved_bytes"] + (1.0 - fraction) * recomputed
    live = _peak(saved, table["weight_input_bytes"], layout, generator, micro_batches)
    at_work = _transients(table, layout, recompute_layers, slice(None))
    host = held_bytes(layout, table["host_bytes"])
    saved_on_host = table["host_saved_bytes"]
    if saved_on_host.any():
        host = host + _peak(saved_on_host, np.zeros_like(saved_on_host), layout, generator, micro_batches)
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


def _peak(
    saved: Array, weight_input: Array, layout: Layout | Dealt, generator: Generator, micro_batches: Array
) -> Array:
    """Largest sum of live activations, and of what weight gradients wait for, on the first device of each run: (runs, rows)."""
    if generator.in_flight is not None and np.all(layout.virtual_stages == 1):
        depth = saturated(generator, layout.pp, 1, micro_batches)
        one_each: Array = generator.in_flight(layout.pp, depth, _per_row(layout.run_first))
        return one_each * held_bytes(layout, saved)
    if isinstance(layout, Dealt):
        live = np.zeros((layout.among.runs, saved.shape[1]))
        for which in np.unique(layout.of).tolist():
            at, own = np.flatnonzero(layout.of == which), layout.among.each[which]
            part = _peak(saved[:, at], weight_input[:, at], own, generator, micro_batches[at])
            live[: len(own.run_first), at] = part
        return live
    depth = saturated(generator, layout.pp, layout.virtual_stages, micro_batches)
    held = np.concatenate([saved, weight_input]) if generator.splits_backward else saved
    live = np.empty((len(layout.run_first), saved.shape[1]))
    for m in np.unique(depth):
        at = np.flatnonzero(depth == m)
        layers, starts = _live_layers(layout, generator, int(m))
        live[:, at] = np.maximum.reduceat(layers @ held[:, at], starts, axis=0)
    return live


@lru_cache(maxsize=16384)
def _live_layers(layout: Layout, generator: Generator, m: int) -> tuple[Array, NDArray[np.int64]]:
    """Combinations of live blocks per kind, run after run, and where each run's begin."""
    combinations = [
        live_vectors(generator, layout.pp, m, layout.virtual_stages, int(device), layout.chunks[:, device])
        for device in layout.run_first
    ]
    starts = np.cumsum([0, *(len(c) for c in combinations[:-1])])
    return np.concatenate(combinations), starts


def saturated(
    schedule: Generator | str, pp: Array | int, virtual_stages: int, micro_batches: Array | int
) -> Array:
    """As few micro-batches as have the live activations of that many, where these stop growing with their number."""
    return np.asarray(generator_of(schedule).saturates(pp, virtual_stages, micro_batches))
