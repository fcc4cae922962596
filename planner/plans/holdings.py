"""Where every byte of the fullest device goes: its residents, item by item, as the memory timeline counts them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.ledger import Array, Resident
from planner.pipeline.composer import SLOWER, recomputed_fraction, saturated
from planner.plans.assemble import Assembly
from planner.schedule.live import live_vectors

__all__ = ["Holding", "holdings"]


@dataclass(frozen=True, slots=True)
class Holding:
    """Bytes of one item at the peak; ``item`` None is what the software stack holds. ``pool`` may be a slower tier."""

    pool: str
    block: str
    item: Resident | None
    n_bytes: float


def holdings(assembly: Assembly) -> list[Holding]:
    """What the fullest device holds at its peak (and in slower tiers); pools add up to the plan's ``memory_bytes``."""
    run = assembly.fullest
    pools = assembly.device_memory[run]
    found = [held for held in _items(assembly, run) if held.n_bytes]
    named = {held.pool for held in found}
    return found + [Holding(pool, "", None, held) for pool, held in pools.items() if pool not in named]


def _items(assembly: Assembly, run: int) -> Iterator[Holding]:
    table, layout = assembly.table, assembly.layout
    kept = 1.0 - float(recomputed_fraction(layout.first_counts, assembly.recompute_layers)[run, 0])
    counts = layout.first_counts[run]
    in_flight, in_flight_away = _in_flight(assembly, run, kept)
    working = _largest_transient(assembly, counts, kept)
    for item, block, n_bytes in assembly.residents():
        kind = table.kinds.index(block)
        if item.tier != "device":
            times = counts[kind] if item.lifetime == "always" else in_flight_away[item.tier][kind]
            yield Holding(item.tier, block, item, float(times) * n_bytes)
        elif item.lifetime == "always":
            yield Holding(item.pool, block, item, float(counts[kind]) * n_bytes)
        elif item.lifetime == "micro_batch":
            yield Holding("activations", block, item, float(in_flight[kind]) * n_bytes)
        elif item.lifetime == "recomputed":
            yield Holding("activations", block, item, float(in_flight[kind]) * n_bytes * kept)
        elif item.lifetime == "weight_input" and len(in_flight) > len(counts):
            yield Holding("activations", block, item, float(in_flight[len(counts) + kind]) * n_bytes)
        if kind == working and (item.lifetime == "block" or (item.lifetime == "recomputed" and kept < 1.0)):
            yield Holding("workspace", block, item, min(float(counts[kind]), 1.0) * n_bytes)


def _in_flight(assembly: Assembly, run: int, kept: float) -> tuple[Array, dict[str, Array]]:
    """Blocks of each kind whose activations are alive when most bytes are, on the device and in each slower tier.

    Where the schedule splits the backward, blocks that wait for their weight gradient follow.
    """
    table, layout, order = assembly.table, assembly.layout, assembly.order
    index = int(layout.run_first[run])
    depth = int(saturated(order, layout.pp, layout.virtual_stages, assembly.micro_batches))
    if layout.virtual_stages == 1 and order.in_flight is not None:
        blocks = float(order.in_flight(layout.pp, depth, index)) * layout.first_counts[run]
        return blocks, dict.fromkeys(SLOWER, blocks)
    chunks = layout.chunks[:, index]
    blocks = live_vectors(order, layout.pp, depth, layout.virtual_stages, index, chunks)
    on_device = (table["saved_bytes"] + kept * table["recomputed_bytes"])[:, 0]
    away = {tier: table[f"{tier}_saved_bytes"][:, 0] for tier in SLOWER}
    if order.splits_backward:
        on_device = np.concatenate([on_device, table["weight_input_bytes"][:, 0]])
        away = {tier: np.concatenate([saved, np.zeros_like(saved)]) for tier, saved in away.items()}
    fullest = {tier: blocks[np.argmax(blocks @ saved)] for tier, saved in away.items()}
    return blocks[np.argmax(blocks @ on_device)], fullest


def _largest_transient(assembly: Assembly, counts: Array, kept: float) -> int:
    """The kind of block on the device whose work needs most room."""
    table = assembly.table
    transient = (table["block_bytes"] + (kept < 1.0) * table["recomputed_bytes"])[:, 0]
    return int(np.argmax(np.where(counts > 0, np.minimum(counts, 1.0) * transient, -1.0)))
