"""Exact step times: block tables and layouts in, the schedule engine's makespan out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from planner.engine.block_table import BlockTable
from planner.ledger import Array
from planner.pipeline.composer import phase_seconds, recomputed_fraction, tail_seconds
from planner.pipeline.layout import BOUNDARY, Layout
from planner.schedule.engine import simulate
from planner.schedule.order import Generator, generator_of, make_order, repeated

__all__ = ["exact_step_s", "stage_seconds"]


def exact_step_s(
    tables: Sequence[BlockTable],
    layout: Layout,
    schedule: Generator | str,
    micro_batches: int,
    recompute_layers: Sequence[int | None],
    hops_s: Array | None = None,
) -> Array:
    """Step times of candidates that share layout, schedule and micro-batch count, by the schedule engine.

    Without a barrier between steps, what one more step adds to two, and the longest tail after it.

    Args:
        tables: one-row block tables.
        recompute_layers: per candidate, or None.
        hops_s: from every stage to the next one; None where all take what the tables say.
    """
    table = replace(tables[0], values=np.concatenate([t.values for t in tables], axis=2))
    again = np.array([np.inf if layers is None else float(layers) for layers in recompute_layers])
    generator = generator_of(schedule)
    stages_s, hop_s, tail_s = stage_seconds(
        table, layout, generator, recomputed_fraction(layout.device_counts, again)
    )
    if hops_s is not None:
        hop_s = np.broadcast_to(hops_s[:, None], (len(hops_s), len(tables)))
    if layout.pp == 1:
        step_s: Array = micro_batches * np.sum(stages_s, axis=(0, 1)) / layout.copies + tail_s[0]
        return step_s
    p, v = layout.pp, layout.virtual_stages
    if generator.barrier:
        return simulate(
            make_order(generator, p, micro_batches, v), *stages_s, hop_s=hop_s, tail_s=tail_s
        ).makespan_s
    two, three = (
        simulate(repeated(generator, p, micro_batches, v, steps), *stages_s, hop_s=hop_s) for steps in (2, 3)
    )
    # A slow device may still be catching up in the third step: no period is shorter than its work.
    busy_s = (three.busy_s - two.busy_s).max(axis=0)
    period_s: Array = np.maximum(three.makespan_s - two.makespan_s, busy_s) + tail_s.max(axis=0)
    return period_s


def stage_seconds(
    table: BlockTable, layout: Layout, generator: Generator, recomputed: Array
) -> tuple[list[Array], Array, Array]:
    """Seconds of a micro-batch in every virtual stage by operation (F, B and, where they are split, W), of a hop, and of each
    device's tail: [(stages, rows)], (rows,), (devices, rows).

    ``recomputed`` is the share of each device's layers that is recomputed, (devices, rows), which belongs to the backward.
    """
    forward, backward, again = phase_seconds(table)
    counts = layout.device_counts
    tail_s = tail_seconds(table, counts, counts @ forward, counts @ backward + recomputed * (counts @ again))
    device = generator.placement.device_of_stage(layout.pp, layout.virtual_stages)
    stages_s = [
        layout.counts @ forward,
        layout.counts @ backward + recomputed[device] * (layout.counts @ again),
    ]
    if generator.splits_backward:
        weight_s = layout.counts @ table["weight_s"]
        stages_s = [stages_s[0], stages_s[1] - weight_s, weight_s]
    return stages_s, table["forward_s"][table.kinds.index(BOUNDARY)], tail_s
