"""Megatron sequence parallelism: norms, dropouts and residuals sharded along the sequence over the tensor-parallel ranks.

What it does: turns every tensor-parallel all-reduce into a reduce-scatter and an all-gather around the sharded region.
Saves: the activations that tensor parallelism replicates (10sbh of 34sbh + 5as²b), and their kernels, divided by tp.
Costs: the same bytes on the wire, and one more all-gather per column-parallel input in the backward (the saved input is
    sharded), which runs beside the input gradient's product; a small all-reduce per step of the gradients of norms and biases.
Assumes: sequence divisible by tp.
Source: Korthikanti et al. 2022 (arXiv:2205.05198) §4.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from planner.ledger import Collective, Item, Ledger, role
from planner.technique import Check, Context, Knob, Technique
from planner.techniques.training.tensor.weights import cut, partial_gradients


def valid(ctx: Context) -> Iterable[Check]:
    """Sequence parallelism rides on tensor parallelism."""
    tp, cp = ctx.mesh.tp, ctx.mesh.cp
    yield Check(
        "sequence length not divisible by tp·cp (sequence parallel)", ctx.workload.seq_len % (tp * cp) == 0
    )
    if ctx.workload.encoder_seq_len:
        yield Check(
            "encoder length not divisible by tp·cp (sequence parallel)",
            ctx.workload.encoder_seq_len % (tp * cp) == 0,
        )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shards the residual stream; splits the all-reduces."""
    ledger = ledger.shard(residual_seq=ctx.mesh.tp, encoder_residual_seq=ctx.mesh.tp)
    items: list[Item] = []
    for item in ledger.items:
        if not (isinstance(item, Collective) and "tp_reduce" in item.tags and item.size.endswith("*hidden")):
            items.append(item)
            continue
        gather = replace(
            item, kind="all_gather", what=item.what.replace("all_reduce", "all_gather"), by="megatron_sp"
        )
        scatter = replace(
            item,
            kind="reduce_scatter",
            what=item.what.replace("all_reduce", "reduce_scatter"),
            by="megatron_sp",
        )
        tags = item.tags - {"tp_reduce"}
        if item.phase == "forward":
            # Row-parallel output: scattered; its gradient is gathered before the backward products.
            items += [
                replace(scatter, tags=tags | {"tp_scatter"}),
                replace(gather, phase="backward", tags=tags | {"tp_gather"}),
            ]
        else:
            # Column-parallel input: gather forward, again for the weight gradient, scatter its gradient.
            items += [
                replace(gather, phase="forward", tags=tags | {"tp_gather"}),
                replace(
                    gather,
                    what=f"{gather.what}.again",
                    phase="backward",
                    tags=tags | {"tp_regather"},
                    track="regather",
                ),
                replace(scatter, tags=tags | {"tp_scatter"}),
            ]
    # Norms, biases and replicated projections see their rank's part of the sequence; gains per head dimension already are summed.
    whole = partial_gradients(
        ledger,
        ctx,
        ctx.mesh.group("tp"),
        lambda axes: not cut(axes) and "head_dim" not in map(role, axes),
        "whole",
        "megatron_sp",
    )
    return replace(ledger, items=(*items, *whole))


TECHNIQUE = Technique(
    key="megatron_sp",
    name="Megatron sequence parallelism",
    slot="sequence_parallel",
    choices=("true",),
    source="arXiv:2205.05198",
    summary="Residual stream sharded over the tensor-parallel ranks",
    knobs=(Knob("sequence_parallel", "shard the residual stream over tp", (True, False), True),),
    valid=valid,
    apply=apply,
    active=lambda ctx: ctx.mesh.tp > 1,
)
