"""Ulysses: all-to-alls trade the sequence shard for a head shard around attention.

What it does: before attention every rank swaps its tokens of all heads for all tokens of its heads; after it, back.
Saves: activations and token-wise work, divided by cp; attention is balanced without zig-zag.
Costs: (2h + 2h_kv)·b·s/cp·(cp−1)/cp elements per pass; KV heads are replicated when the ranks outnumber them.
Assumes: all-to-alls are exposed.
Source: Jacobs et al. 2023 (arXiv:2309.14509).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from planner.ledger import Array, AttentionCore, Collective, Item, Ledger, Matmul, Stream, role
from planner.technique import Check, Context, Knob, Technique


def valid(ctx: Context) -> Iterable[Check]:
    """Whole query heads per rank."""
    tp, cp = ctx.mesh.tp, ctx.mesh.cp
    yield Check("sequence length not divisible by cp", ctx.workload.seq_len % cp == 0)
    for block in ctx.model.blocks.values():
        if block.attention is not None:
            yield Check(
                "query heads not divisible by tp·cp (Ulysses)", block.attention.heads % (tp * cp) == 0
            )
        yield Check(
            "context parallelism of state-space layers is not modelled", (cp == 1) | (block.ssm is None)
        )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shards the sequence everywhere but inside attention, where heads are sharded instead."""
    cp, group = ctx.mesh.cp, ctx.mesh.group("cp")
    ledger = ledger.shard(seq=cp, residual_seq=cp, logit_seq=cp, encoder_seq=cp, encoder_residual_seq=cp)
    # Inside attention: all tokens, heads/cp of them (KV heads at least one).
    inside: dict[str, Array] = {f"full_{name}": ledger.axes[name] * cp for name in ("seq", "encoder_seq")}
    for axis in ledger.axes.names():
        if axis.startswith("heads@"):
            inside[f"local_{axis}"] = ledger.axes[axis] / cp
        elif axis.startswith("kv_heads@"):
            inside[f"local_{axis}"] = np.maximum(ledger.axes[axis] / cp, 1.0)
    ledger = ledger.set_axes(**inside)
    added: list[Item] = []

    def attention(item: AttentionCore) -> Item:
        out = f"batch*{item.q}*{item.heads}*{item.v_dim}"
        qkv = f"batch*{item.q}*{item.heads}*{item.qk_dim} + batch*{item.q}*{item.kv_heads}*{item.qk_dim} + batch*{item.q}*{item.kv_heads}*{item.v_dim}"
        for what, size in (("swap_qkv", qkv), ("swap_output", out)):
            added.append(
                Collective(
                    what=f"{item.what}.{what}", block=item.block, phase=item.phase, tags=frozenset({"core_attn", "cp"}), by="ulysses",
                    source="arXiv:2309.14509", kind="all_to_all", group=group, size=size, dtype=ctx.format.activation,
                )
            )  # fmt: skip
        return replace(
            item, q=f"full_{item.q}", heads=f"local_{item.heads}", kv_heads=f"local_{item.kv_heads}"
        )

    def eager(item: Matmul) -> Item | None:
        if "core_attn" not in item.tags:
            return None
        sizes = {name: _whole(getattr(item, name)) for name in ("m", "n", "k", "groups")}
        return replace(item, **sizes)

    def softmax(item: Stream) -> Item | None:
        return replace(item, size=_whole(item.size)) if "core_attn" in item.tags else None

    return ledger.edit(AttentionCore, attention).edit(Matmul, eager).edit(Stream, softmax).add(added)


def _whole(size: str) -> str:
    """A product of axes with all tokens and the rank's heads in place of its tokens and all heads."""
    inside = []
    for axis in size.split("*"):
        prefix = (
            "full_"
            if axis in ("seq", "encoder_seq")
            else "local_"
            if role(axis) in ("heads", "kv_heads")
            else ""
        )
        inside.append(prefix + axis)
    return "*".join(inside)


TECHNIQUE = Technique(
    key="ulysses",
    name="Ulysses sequence parallelism (all-to-all)",
    slot="context",
    choices=("a2a",),
    source="arXiv:2309.14509",
    summary="All-to-alls swap the sequence shard for a head shard around attention",
    knobs=(Knob("cp", "context-parallel degree"),),
    valid=valid,
    apply=apply,
    active=lambda ctx: ctx.mesh.cp > 1,
)
