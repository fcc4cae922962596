"""Unified sequence parallelism (a2a+p2p): heads are swapped inside a scale-up domain, keys travel between domains.

What it does: of the cp ranks, as many as the heads and the innermost tier allow (c_u) swap tokens for heads; the others (c_r)
    form rings of such groups.
Saves: activations and token-wise work, divided by cp; the ring carries 1/c_u of the KV heads.
Costs: the all-to-alls of c_u ranks on their tokens, exposed, and the ring's K and V between c_r groups, beside attention.
Assumes: the swap group is the largest that fits heads and domain; zig-zag chunks balance the ring.
Source: Fang, Zhao 2024 (USP, arXiv:2405.07719); Gu et al. 2024 (LoongTrain, arXiv:2406.18485); Megatron
    ``--cp-comm-type a2a+p2p``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from planner.costs.collectives import group_members
from planner.ledger import Array, Ledger
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.context.exchange import (
    divides,
    pass_keys,
    sequence_checks,
    shard_sequence,
    swap_heads,
)


def valid(ctx: Context) -> Iterable[Check]:
    """Two zig-zag chunks per ring position, KV heads that can be dealt or copied."""
    swapped = swap_degree(ctx)
    yield from sequence_checks(ctx, 2 * ctx.mesh.cp)
    for block in ctx.model.blocks.values():
        if block.attention is not None:
            kv_heads = np.maximum(block.attention.kv_heads / ctx.mesh.tp, 1.0)
            yield Check(
                "KV heads per rank neither a multiple nor a divisor of the swap group",
                divides(kv_heads, swapped),
            )


def swap_degree(ctx: Context) -> Array:
    """c_u: ranks that swap heads, the largest common divisor of heads per rank and of the cp ranks inside a domain."""
    group = ctx.mesh.group("cp")
    size = group_members(group.size, group.stride, ctx.cluster.tiers[0].size, float(ctx.cluster.devices))
    degree = np.asarray(size).astype(np.int64)
    for block in ctx.model.blocks.values():
        for attention in (block.attention, block.cross_attention):
            if attention is not None:
                heads = np.maximum(attention.heads / ctx.mesh.tp, 1.0)
                degree = np.where(heads % 1 == 0, np.gcd(degree, heads.astype(np.int64)), 1)
    return degree.astype(np.float64)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Swaps heads in the inner groups, passes keys around the outer ones."""
    cp, swapped = ctx.mesh.cp, swap_degree(ctx)
    inner = ctx.mesh.subgroup("cp", "cp.swap", swapped, inner=True)
    outer = ctx.mesh.subgroup("cp", "cp.ring", cp / swapped, inner=False)
    ledger = swap_heads(shard_sequence(ledger, ctx, "usp"), ctx, swapped, inner, "usp")
    return pass_keys(ledger, ctx, cp / swapped, outer, "usp")


def _volume(subject: Pass) -> float:
    """Elements sent per layer and forward by 32 ranks in nodes of 8, in N·h."""
    case: dict[str, Any] = {
        "model": "gpt3-13b",
        "seq": 65536,
        "cp": 32,
        "attention_kernel": "flash",
        "context": "a2a+p2p",
        "cluster": "a100-sxm-80gb:4x8",
    }
    ledger, ctx = figures.run("context", subject, **case)
    return figures.sent_elements(ledger, lambda i: i.phase == "forward" and "cp" in i.tags) / (
        65536 * ctx.model.hidden
    )


TECHNIQUE = Technique(
    key="usp",
    name="Unified sequence parallelism (Ulysses inside nodes, ring between)",
    slot="context",
    choices=("a2a+p2p",),
    source="arXiv:2405.07719",
    summary="Heads swapped inside a scale-up domain, keys and values travel between domains",
    figures=(
        Figure(
            "elements sent per layer and forward, c_u = 8, c_r = 4, in N·h: 4/P·7/8 and 2/c_u·3/4",
            4 / 32 * 7 / 8 + 2 / 8 * 3 / 4,
            0.002,
            "Jacobs et al. 2023 (arXiv:2309.14509) §3.2 inside, Liu et al. 2023 (arXiv:2310.01889) §3 between groups",
            _volume,
        ),
    ),
    valid=valid,
    apply=apply,
    active=lambda ctx: (swap_degree(ctx) > 1) & (swap_degree(ctx) < ctx.mesh.cp),
)
