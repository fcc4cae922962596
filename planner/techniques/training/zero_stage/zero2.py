"""ZeRO stage 2: gradients are sharded too.

What it does: each block's gradients are reduce-scattered as soon as its backward is done, in every micro-batch.
Saves: gradient memory, divided by the replicas.
Costs: the reduce-scatter of every micro-batch (volume × m under gradient accumulation), beside the backward; one block's
    whole gradients while it is at work.
Assumes: the per-block reduction runs beside the backward of the next block.
Source: Rajbhandari et al. 2020 (arXiv:1910.02054) §5.2.
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
    """Shards optimizer and gradients; reduces per block and micro-batch."""
    traffic: list[Item] = [
        *synchronise(ledger, ctx, "reduce_scatter", "zero2", phase="backward", track="reduce"),
        *gather_weights(ledger, ctx, "zero2"),
    ]
    whole = [
        replace(item, what=f"{item.what}.whole", pool="gathered", lifetime="block", by="zero2")
        for item in ledger.of(Resident, pool="gradients")
    ]
    ledger = shard_pool(with_degrees(ledger, ctx), ("optimizer", "gradients"), "zero2")
    return shard_update(ledger, "zero2").add([*traffic, *whole])


TECHNIQUE = Technique(
    key="zero2",
    name="ZeRO stage 2",
    slot="zero_stage",
    choices=("2",),
    source="arXiv:1910.02054",
    summary="Optimizer states and gradients sharded over the data-parallel ranks",
    apply=apply,
    active=lambda ctx: ctx.mesh.dp * ctx.mesh.cp > 1,
)
