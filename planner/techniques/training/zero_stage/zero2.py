"""ZeRO stage 2: gradients are sharded too.

What it does: each block's gradients are reduce-scattered as soon as its backward is done, in every micro-batch. It is FSDP's
    ``SHARD_GRAD_OP`` with weights that stay gathered between micro-batches.
Saves: gradient memory, divided by the replicas.
Costs: the reduce-scatter of every micro-batch (volume × m under gradient accumulation), beside the backward; one block's
    whole gradients while it is at work.
Assumes: the reduction of one block runs beside the backward of the next.
Source: Rajbhandari et al. 2020 (arXiv:1910.02054) §5.2.
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.training.zero_stage.states import (
    accumulated,
    accumulated_in_place,
    gather_updated,
    shard,
    share_of_sum,
    synchronise,
    whole,
    with_whole,
)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shards optimizer and gradients; reduces per block and micro-batch."""
    ledger = accumulated_in_place(ledger, ctx, reduced_at_once=True)
    added = synchronise(ledger, ctx, share_of_sum(ctx), "zero2", phase="backward", track="reduce")
    ledger = gather_updated(ledger, ctx, "zero2")
    buffers = [*whole(ledger, "gradients", "zero2")]
    return with_whole(shard(ledger, ctx, ("optimizer", "gradients"), "zero2").add(added), buffers)


TECHNIQUE = Technique(
    key="zero2",
    name="ZeRO stage 2",
    slot="zero_stage",
    choices=("2",),
    source="arXiv:1910.02054",
    summary="Optimizer states and gradients sharded over the data-parallel ranks",
    figures=(
        Figure(
            "GB of model states, 7.5B parameters on 64 ranks",
            16.6,
            5e-3,
            "Rajbhandari et al. 2020 (arXiv:1910.02054), Figure 1",
            lambda subject: figures.zero_states_gb("2", subject),
        ),
    ),
    valid=accumulated,
    apply=apply,
    active=lambda ctx: ctx.mesh.dp * ctx.mesh.cp > 1,
)
