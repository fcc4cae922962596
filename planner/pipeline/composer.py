"""The pipeline composer: block tables in, step time and peak memory of every device out.

A million candidates that share a :class:`~planner.pipeline.layout.Layout` are composed with a few products of counts and block
tables. :func:`step_bound` is a valid lower bound on the schedule's makespan, :func:`memory` the exact peak of its order; the
schedule engine then gives the exact makespan of the few candidates that matter.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from planner.costs.arrays import distinct
from planner.costs.overlap import uniform_bucket_exposure_s
from planner.engine.block_table import POOLS, BlockTable
from planner.ledger import Array
from planner.operators.baseline import EMBEDDING
from planner.pipeline.layout import BOUNDARY, Dealt, Layout, over_blocks, per_row
from planner.schedule.live import live_vectors
from planner.schedule.order import Generator, generator_of
from planner.specs.stack import Stack

__all__ = [
    "SLOWER",
    "held_bytes",
    "memory",
    "memory_parts",
    "phase_seconds",
    "saturated",
    "step_bound",
    "tail_seconds",
    "tail_traffic",
    "tight_bound",
]

SLOWER = ("host", "cxl", "nvme")  # tiers below device memory, as residents name them


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
    backward = backward + again * _least_fraction(layout, recompute_layers)
    hop_s = table["forward_s"][table.kinds.index(BOUNDARY)]
    last_counts, ramp = layout.last_counts, layout.ramp
    forward_work_s, backward_work_s = (over_blocks(last_counts, each) for each in (forward, backward))
    tail_s = tail_seconds(table, last_counts, forward_work_s, backward_work_s)
    share = micro_batches if np.all(np.equal(layout.copies, 1)) else micro_batches / layout.copies
    work_s = share * (forward_work_s + backward_work_s)
    if not generator.barrier:
        alone_s: Array = np.max(work_s + tail_s, axis=0)
        return alone_s
    if len(layout.run_first) > 1 and np.all(layout.run_last[0] == 0):
        first_tail_s = tail_s[0]
    else:
        counts = layout.device_counts[:1]
        first_tail_s = tail_seconds(
            table, counts, over_blocks(counts, forward), over_blocks(counts, backward)
        )[0]
    hops_s = per_row(layout.ramp_hops) * hop_s
    before_s, after_s = (
        over_blocks(ramp, forward) + hops_s,
        over_blocks(ramp, backward) + hops_s,
    )
    if generator.splits_backward:
        weight = table["weight_s"]
        after_s = after_s - over_blocks(ramp, weight) - share * over_blocks(last_counts, weight)
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
    backward = backward + again * _least_fraction(layout, recompute_layers)
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


def recomputed_fraction(counts: Array, recompute_layers: Array | float | None) -> Array:
    """Share of each device's layers that is recomputed, where so many are if it has them: (devices, rows), or (devices, 1).

    Args:
        counts: the devices' blocks, (devices, kinds), or (devices, kinds, rows).
        recompute_layers: of each device's layers, how many are recomputed; infinite or None: all.
    """
    layers = per_row(np.maximum(counts[:, :-3].sum(axis=1), 1.0))
    return np.minimum((np.inf if recompute_layers is None else recompute_layers) / layers, 1.0)


def _least_fraction(layout: Layout | Dealt, recompute_layers: Array | float | None) -> Array | float:
    """The share on the device with most layers: what no device recomputes less than, and no step takes longer with."""
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
    total: Array = over_blocks(counts, table["main_step_s"])
    for _, exposed_s in tail_traffic(table, counts, forward_s, backward_s).values():
        total = total + exposed_s
    return total


def tail_traffic(
    table: BlockTable, counts: Array, forward_s: Array, backward_s: Array
) -> dict[str, tuple[Array, Array]]:
    """Seconds of gradient and weight traffic per step, and what of them nothing hides: (devices, rows) each; as above."""
    found: dict[str, tuple[Array, Array]] = {}
    for track, beside_s in (("gradients", backward_s), ("weights", forward_s)):
        if not table[f"{track}_step_s"].any():  # as before a state has been chosen
            found[track] = np.zeros_like(beside_s), np.zeros_like(beside_s)
            continue
        messages = np.maximum(over_blocks(counts, table[f"{track}_messages"]), 1.0)
        whole_s = over_blocks(counts, table[f"{track}_step_s"])
        found[track] = whole_s, np.asarray(uniform_bucket_exposure_s(whole_s, beside_s, messages))
    return found


def held_bytes(layout: Layout | Dealt, each: Array) -> Array:
    """Sums over the blocks of the first device of each run: (runs, rows) of (kinds, rows)."""
    return over_blocks(layout.first_counts, each)


def memory(
    table: BlockTable,
    layout: Layout | Dealt,
    schedule: Generator | str,
    micro_batches: Array,
    stack: Stack,
    communicators: Array | float,
    recompute_layers: Array | float | None = None,
) -> tuple[Array, Array, dict[str, Array]]:
    """Peak device bytes and those among them that the software holds, and bytes in each slower tier, per row.

    On the fullest device; slower tiers on theirs.
    """
    live, at_work, slower = _dynamic(table, layout, schedule, micro_batches, recompute_layers)
    held = held_bytes(layout, table["always_bytes"])
    idle = stack.framework_bytes.value + stack.communicator_bytes.value * communicators
    fragments = stack.fragmentation.value * (live + at_work)
    peaks = held + np.maximum(live + at_work + fragments, held_bytes(layout, table["step_bytes"]))
    software = fragments + held_bytes(layout, table["buffers_bytes"])
    fullest = (peaks.argmax(axis=0), np.arange(peaks.shape[1]))
    away = {tier: held_there.max(axis=0) for tier, held_there in slower.items()}
    return peaks[fullest] + idle, software[fullest] + idle, away


def memory_parts(
    table: BlockTable,
    layout: Layout,
    schedule: Generator | str,
    micro_batches: Array,
    stack: Stack,
    communicators: Array | float,
    recompute_layers: Array | float | None = None,
) -> dict[str, Array]:
    """The same by pool, on the first device of each run of equal devices: (runs, rows); slower tiers by their names.

    ``activations`` is the schedule's exact peak of saved bytes; ``workspace`` the largest transient of a block, taken to
    coincide with it; ``update`` what the optimizer step needs beyond both. ``cached`` is no part of the peak: freed blocks that
    an allocator keeps because later tensors are larger than each of them, or work on another stream. Layers run before the head,
    whose logits are larger than a layer's tensors, and grow out of what these have freed where segments can; the update's flat
    buffers are larger than both.
    """
    live, at_work, slower = _dynamic(table, layout, schedule, micro_batches, recompute_layers)
    ends, some = (
        table.kinds.index(EMBEDDING),
        True if recompute_layers is None else np.greater(recompute_layers, 0),
    )
    transient, apart = table["block_bytes"] + some * table["recomputed_bytes"], table["apart_bytes"]
    lent = transient - np.where(
        np.arange(len(apart))[:, None] < ends, apart, 0.0
    )  # the ends hold nothing apart
    layers, head = _largest(layout, lent[:ends]), _largest(layout, transient[ends:], ends)
    parts: dict[str, Array] = {pool: layout.first_counts @ table[f"{pool}_bytes"] for pool in POOLS}
    parts["activations"] = live
    parts["workspace"] = at_work
    parts["framework"] = np.full_like(live, stack.framework_bytes.value)
    parts["communicators"] = np.broadcast_to(stack.communicator_bytes.value * communicators, live.shape)
    parts["fragmentation"] = stack.fragmentation.value * (live + at_work)
    passes, step = live + at_work + parts["fragmentation"], layout.first_counts @ table["step_bytes"]
    parts["update"] = np.maximum(step - passes, 0.0)
    stranded = np.minimum(layers, head) if stack.habits["segments"] == "fixed" else 0.0
    parts["cached"] = (
        np.minimum(step, passes) + stranded + np.maximum(layers, head) + _largest(layout, apart) - at_work
    )
    parts["cached"] += np.stack([np.max(table["freed_bytes"][on], axis=0) for on in layout.first_counts > 0])
    return parts | slower


def _dynamic(
    table: BlockTable,
    layout: Layout | Dealt,
    schedule: Generator | str,
    micro_batches: Array,
    recompute_layers: Array | float | None,
) -> tuple[Array, Array, dict[str, Array]]:
    """Saved activations at their peak, the largest transient, and what slower tiers hold: (runs, rows) each."""
    generator = generator_of(schedule)
    kept = None
    if recompute_layers is not None:
        kept = 1.0 - recomputed_fraction(layout.first_counts, recompute_layers), table["recomputed_bytes"]
    live = _peak(table["saved_bytes"], table["weight_input_bytes"], layout, generator, micro_batches, kept)
    any_again = True if recompute_layers is None else np.greater(recompute_layers, 0)
    at_work = _largest(layout, table["block_bytes"] + any_again * table["recomputed_bytes"])
    slower = {}
    for tier in SLOWER:
        held = table[f"{tier}_bytes"]
        slower[tier] = held_bytes(layout, held) if held.any() else np.broadcast_to(0.0, live.shape)
        away = table[f"{tier}_saved_bytes"]
        if away.any():
            slower[tier] = slower[tier] + _peak(away, np.zeros_like(away), layout, generator, micro_batches)
    return live, at_work, slower


def _largest(layout: Layout | Dealt, each: Array, first: int = 0) -> Array:
    """The largest of a block among the kinds from the ``first`` on, on the first device of each run: (runs, rows)."""
    present = np.minimum(
        layout.first_counts[:, first : first + len(each)], 1.0
    )  # of ends that all stages share, a part
    if present.ndim == 2:
        held = ((there > 0, there) for there in present)
        return np.stack([np.max(each[on] * there[on, None], axis=0, initial=0.0) for on, there in held])
    largest: Array = np.max(present * each, axis=1, initial=0.0)
    return largest


def _peak(
    saved: Array, weight_input: Array, layout: Layout | Dealt, generator: Generator, micro_batches: Array,
    kept: tuple[Array, Array] | None = None,
) -> Array:  # fmt: skip
    """Largest sum of live activations, and of what weight gradients wait for, on the first device of each run: (runs, rows).

    ``kept``: what recomputed layers would hold, (kinds, rows), and the share of each run's that is not, (runs, rows).
    """
    if generator.in_flight is not None and np.all(layout.virtual_stages == 1):
        depth = saturated(generator, layout.pp, 1, micro_batches)
        one_each: Array = generator.in_flight(layout.pp, depth, per_row(layout.run_first))
        held = held_bytes(layout, saved)
        return one_each * (held if kept is None else held + kept[0] * held_bytes(layout, kept[1]))
    if isinstance(layout, Dealt):
        live = np.zeros((layout.among.runs, saved.shape[1]))
        for which in distinct(layout.of).tolist():
            at, own = np.flatnonzero(layout.of == which), layout.among.each[which]
            runs = len(own.run_first)
            less = None if kept is None else (kept[0][:runs, at], kept[1][:, at])
            live[:runs, at] = _peak(
                saved[:, at], weight_input[:, at], own, generator, micro_batches[at], less
            )
        return live
    depth = saturated(generator, layout.pp, layout.virtual_stages, micro_batches)
    held = np.concatenate([saved, weight_input]) if generator.splits_backward else saved
    live = np.empty((len(layout.run_first), saved.shape[1]))
    for m in distinct(depth):
        at = np.flatnonzero(depth == m)
        layers, starts = _live_layers(layout, generator, int(m))
        alive = layers @ held[:, at]
        if kept is not None:
            run = np.repeat(np.arange(len(starts)), np.diff([*starts, len(layers)]))
            alive = alive + kept[0][run][:, at] * (layers[:, : len(saved)] @ kept[1][:, at])
        live[:, at] = np.maximum.reduceat(alive, starts, axis=0)
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
