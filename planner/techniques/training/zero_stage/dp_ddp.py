"""Distributed data parallelism: replicated weights, gradients averaged once per step in buckets.

What it does: every data-parallel rank runs its share of the global batch; gradients are all-reduced over dp·cp (experts: edp).
Saves: time, divided by dp.
Costs: one all-reduce of the gradients per step, 2Ψ(d−1)/d elements sent per rank; all states whole on every rank.
Assumes: buckets are reduced while the last micro-batch's backward still runs; the last bucket is never hidden.
Source: Li et al. 2020 (VLDB 13(12), arXiv:2006.15704).
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.technique import Context, Knob, Technique
from planner.techniques.training.zero_stage.states import synchronise, with_degrees


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Adds the bucketed all-reduce."""
    return with_degrees(ledger, ctx).add(synchronise(ledger, ctx, "all_reduce", "dp_ddp"))


TECHNIQUE = Technique(
    key="dp_ddp",
    name="Distributed data parallelism (DDP)",
    slot="zero_stage",
    choices=("0",),
    source="arXiv:2006.15704",
    summary="Replicated weights, bucketed gradient all-reduce",
    knobs=(Knob("dp", "data-parallel degree (what the other degrees leave)"),),
    apply=apply,
)
