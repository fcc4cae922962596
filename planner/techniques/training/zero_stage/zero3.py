"""ZeRO stage 3 (FSDP full shard): weights, gradients and optimizer states are sharded; weights are gathered when used.

What it does: every block's weights are gathered before its forward and again before its backward, and dropped after use;
    gradients are reduce-scattered per block. One block is one unit.
Saves: all states, divided by the replicas.
Costs: 3Ψ elements per micro-batch instead of 2Ψ per step; the gathered weights of the block at work and of the next one, and
    one block's whole gradients.
Assumes: the next unit's gather runs beside the current unit's work (the first one is exposed); weights are dropped after the
    forward (``reshard_after_forward``).
Source: Rajbhandari et al. 2020 (arXiv:1910.02054) §5.3, §7.2; Zhao et al. 2023 (PyTorch FSDP, arXiv:2304.11277) §3.2.
"""

from __future__ import annotations

from dataclasses import replace

from planner.ledger import Item, Ledger, Resident
from planner.technique import Context, Technique
from planner.techniques.training.zero_stage.states import (
    gather_weights,
    shard_pool,
    shard_update,
    synchronise,
    with_degrees,
)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shards every state; gathers per block, forward and backward; reduces per block."""
    traffic: list[Item] = [
        *gather_weights(ledger, ctx, "zero3", phase="forward", track="gather"),
        *gather_weights(ledger, ctx, "zero3", phase="backward", track="gather"),
        *synchronise(ledger, ctx, "reduce_scatter", "zero3", phase="backward", track="gather"),
    ]
    live = [
        replace(
            item, what=f"{item.what}.live", pool="gathered", lifetime="block", by="zero3",
            bytes_per_element=item.bytes_per_element * (2.0 if item.pool == "parameters" else 1.0),
        )
        for pool in ("parameters", "gradients")
        for item in ledger.of(Resident, pool=pool)
    ]  # fmt: skip
    ledger = shard_pool(with_degrees(ledger, ctx), ("optimizer", "gradients", "parameters"), "zero3")
    return shard_update(ledger, "zero3").add([*traffic, *live])


TECHNIQUE = Technique(
    key="zero3",
    name="ZeRO stage 3 (FSDP full shard)",
    slot="zero_stage",
    choices=("3",),
    source="arXiv:1910.02054",
    summary="All states sharded over the data-parallel ranks, weights gathered on use",
    apply=apply,
    active=lambda ctx: ctx.mesh.dp * ctx.mesh.cp > 1,
)
