"""ZeRO stage 1 (distributed optimizer): optimizer states and the update are sharded over the replicas.

What it does: gradients are reduce-scattered, each rank updates its shard, and the new weights are gathered.
Saves: optimizer states and update time, divided by the replicas.
Costs: no more bytes than DDP (reduce-scatter + all-gather) where weights and gradients have one dtype.
Assumes: the reduce-scatter hides behind the last backward, the gather behind the next forward, save for one bucket each.
Source: Rajbhandari et al. 2020 (arXiv:1910.02054) §5.1; Megatron-Core distributed optimizer.
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.technique import Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.training.zero_stage.states import (
    accumulated,
    accumulated_in_place,
    gather_updated,
    shard,
    share_of_sum,
    synchronise,
    with_buckets,
    with_shards_apart,
)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shards the optimizer, replaces the all-reduce by its two halves."""
    traffic = synchronise(ledger, ctx, share_of_sum(ctx), "zero1")
    ledger = gather_updated(ledger, ctx, "zero1")
    ledger = with_shards_apart(accumulated_in_place(ledger, ctx), ctx, "zero1")
    return with_buckets(shard(ledger, ctx, ("optimizer",), "zero1"), ctx, "zero1").add(traffic)


TECHNIQUE = Technique(
    key="zero1",
    name="ZeRO stage 1 (distributed optimizer)",
    slot="zero_stage",
    choices=("1",),
    default=True,
    source="arXiv:1910.02054",
    summary="Optimizer states sharded over the data-parallel ranks",
    knobs=(
        Knob("zero_stage", "what is sharded over the data-parallel ranks", ("0", "1", "2", "3", "fsdp"), "1"),
    ),
    figures=(
        Figure(
            "GB of model states, 7.5B parameters on 64 ranks",
            31.4,
            2e-3,
            "Rajbhandari et al. 2020 (arXiv:1910.02054), Figure 1",
            lambda subject: figures.zero_states_gb("1", subject),
        ),
    ),
    valid=accumulated,
    apply=apply,
    active=lambda ctx: ctx.mesh.dp * ctx.mesh.cp > 1,
)
