"""Ulysses: all-to-alls trade the sequence shard for a head shard around attention.

What it does: before attention every rank swaps its tokens of all heads for all tokens of its heads; after it, back.
Saves: activations and token-wise work, divided by cp; attention is balanced without zig-zag.
Costs: (2h + 2h_kv)·b·s/cp·(cp−1)/cp elements per pass; KV heads are copied where ranks outnumber them.
Assumes: all-to-alls are exposed.
Source: Jacobs et al. 2023 (arXiv:2309.14509) §3.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from planner.ledger import Collective, Ledger
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.context.exchange import divides, sequence_checks, shard_sequence, swap_heads


def valid(ctx: Context) -> Iterable[Check]:
    """Whole query heads per rank."""
    tp, cp = ctx.mesh.tp, ctx.mesh.cp
    yield from sequence_checks(ctx, cp)
    for block in ctx.model.blocks.values():
        for attention in (block.attention, block.cross_attention):
            if attention is not None:
                yield Check(
                    "attention heads not divisible by tp·cp (Ulysses)", attention.heads % (tp * cp) == 0
                )
                kv_heads = np.maximum(attention.kv_heads / tp, 1.0)
                yield Check(
                    "KV heads per rank neither a multiple nor a divisor of cp (Ulysses)",
                    divides(kv_heads, cp),
                )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shards the sequence everywhere but inside attention, where heads are sharded instead."""
    return swap_heads(
        shard_sequence(ledger, ctx, "ulysses"), ctx, ctx.mesh.cp, ctx.mesh.group("cp"), "ulysses"
    )


def _message(subject: Pass) -> float:
    """Elements in a rank's all-to-alls of one layer's forward, over those of the whole activation."""
    case: dict[str, Any] = {
        "model": "gpt3-13b",
        "seq": 65536,
        "cp": 8,
        "attention_kernel": "flash",
        "context": "a2a",
    }
    ledger, ctx = figures.run("context", subject, **case)
    swaps = [item for item in ledger.of(Collective, phase="forward") if item.kind == "all_to_all"]
    return sum(float(ledger.axes[item.size][0]) for item in swaps) / (65536 * ctx.model.hidden)


TECHNIQUE = Technique(
    key="ulysses",
    name="Ulysses sequence parallelism (all-to-all)",
    slot="context",
    choices=("a2a",),
    source="arXiv:2309.14509",
    summary="All-to-alls swap the sequence shard for a head shard around attention",
    figures=(
        Figure(
            "message elements per layer and forward on 8 ranks, in N·h: 4/P",
            4 / 8,
            0.002,
            "Jacobs et al. 2023 (arXiv:2309.14509), section 3.2",
            _message,
        ),
    ),
    valid=valid,
    apply=apply,
    active=lambda ctx: ctx.mesh.cp > 1,
)
