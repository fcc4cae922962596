"""Distributed data parallelism: replicated weights, gradients averaged once per step in buckets.

What it does: every data-parallel rank runs its share of the global batch; gradients are all-reduced over dp·cp (experts: edp).
Saves: time, divided by dp.
Costs: one all-reduce of the gradients per step, 2Ψ(d−1)/d elements sent per rank; all states, and the whole update, on
    every rank.
Assumes: buckets are reduced while the last micro-batch's backward still runs; the last bucket is never hidden; gradients of
    earlier micro-batches accumulate without communication (``no_sync``).
Source: Li et al. 2020 (VLDB 13(12), arXiv:2006.15704).
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.technique import Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.zero_stage.states import (
    accumulated_in_place,
    synchronise,
    whole_update,
    with_buckets,
    with_degrees,
)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Adds the bucketed all-reduce."""
    traffic = synchronise(ledger, ctx, "all_reduce", "dp_ddp")
    whole = whole_update(with_degrees(accumulated_in_place(ledger, ctx), ctx))
    return with_buckets(whole, ctx, "dp_ddp").add(traffic)


def _volume(subject: Pass) -> float:
    """Elements sent per step over parameters, 512 ranks."""
    ledger, _ = figures.run("zero_stage", subject, model="gpt2-xl", dp=512, zero_stage="0")
    return figures.sent_elements(ledger, lambda item: "data_parallel" in item.tags) / figures.parameters(
        ledger
    )


TECHNIQUE = Technique(
    key="dp_ddp",
    name="Distributed data parallelism (DDP)",
    slot="zero_stage",
    choices=("0",),
    source="arXiv:2006.15704",
    summary="Replicated weights, bucketed gradient all-reduce",
    knobs=(
        Knob("dp", "data-parallel degree (what the other degrees leave)"),
        Knob(
            "micro_batch_size",
            "sequences per forward; gradients accumulate over global batch / (dp · micro-batch)",
        ),
    ),
    figures=(
        Figure(
            "elements sent per parameter and step, W = 512: 2(W − 1)/W",
            1.99609,
            1e-4,
            "Zhao et al. 2023 (PyTorch FSDP, arXiv:2304.11277), section 3.2.2",
            _volume,
        ),
    ),
    apply=apply,
)
