"""Megatron 1-D tensor parallelism: column-parallel, then row-parallel products.

What it does: shards heads, feed-forward width and vocabulary over ``tp`` ranks. A product whose contraction is sharded leaves
    partial sums, which an all-reduce completes (forward of row-parallel, input gradient of column-parallel layers).
Saves: weights, products and their inputs, divided by tp.
Costs: 2 all-reduces of b·s·h elements forward and 2 backward per block; norms and residuals stay whole on every rank; one
    all-reduce in the embedding; two small fp32 all-reduces in the cross-entropy over a sharded vocabulary.
Assumes: KV heads are replicated when tp exceeds them; latent down-projections of MLA are replicated.
Source: Shoeybi et al. 2019 (arXiv:1909.08053); Narayanan et al. 2021 (arXiv:2104.04473) §3.2.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planner.ledger import Collective, Item, Ledger, Matmul, Phase, role
from planner.technique import Check, Context, Knob, Technique
from planner.techniques.training.tensor.weights import CUT, REPLICATED_WHEN_FEW, cut, partial_gradients

_COLUMN_INPUTS = ("qkv", "mlp", "shared_expert", "ssm", "head", "cross")


def valid(ctx: Context) -> Iterable[Check]:
    """Whole heads, whole columns, whole sequences per rank."""
    tp = ctx.mesh.tp
    for block in ctx.model.blocks.values():
        for attention in (block.attention, block.cross_attention):
            if attention is None:
                continue
            yield Check("attention heads not divisible by tp", attention.heads % tp == 0)
            kv = attention.kv_heads
            yield Check("KV heads neither a multiple nor a divisor of tp", (kv % tp == 0) | (tp % kv == 0))
        if block.mlp:
            yield Check("feed-forward width not divisible by tp", block.mlp.ffn % tp == 0)
        if block.moe and block.moe.shared_ffn:
            yield Check("shared expert width not divisible by tp", block.moe.shared_ffn % tp == 0)
        if block.ssm:
            yield Check("state-space width not divisible by tp", block.ssm.inner % tp == 0)
            if block.ssm.heads:
                yield Check("state-space heads not divisible by tp", block.ssm.heads % tp == 0)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shards by role, replicates surplus KV heads, pads the vocabulary, adds the all-reduces."""
    tp, group, dtype = ctx.mesh.tp, ctx.mesh.group("tp"), ctx.format.activation
    few = [name for name in ledger.axes.names() if role(name) in REPLICATED_WHEN_FEW]
    sharing = {name: np.maximum(tp / ledger.axes[name], 1.0) for name in few}  # ranks that hold the same head
    kv = {name: ledger.axes[name] / tp * sharing[name] for name in few}
    vocab = ledger.axes["vocab"]
    padded = np.where(
        tp > 1, np.ceil(vocab / (128 * tp)) * 128 * tp, vocab
    )  # Megatron pads to a multiple of 128·tp
    ledger = ledger.set_axes(**kv, vocab=padded).shard(**dict.fromkeys(CUT, tp))
    # A gain per head dimension (of query-key norms) is whole on every rank, which sees some of the heads.
    added: list[Item] = [
        *partial_gradients(
            ledger,
            ctx,
            group,
            lambda axes: "head_dim" in map(role, axes) and not cut(axes),
            "head",
            "megatron_tp_1d",
        )
    ]
    for name in few:
        if np.any(sharing[name] > 1):
            replicas = ctx.mesh.subgroup("tp", f"tp.{name}", sharing[name], inner=True)
            added += partial_gradients(
                ledger, ctx, replicas, lambda axes, name=name: name in axes, role(name), "megatron_tp_1d"
            )

    def all_reduce(
        what: str, block: str, phase: Phase, size: str, tags: frozenset[str], kind: str = dtype
    ) -> None:
        added.append(
            Collective(
                what=what, block=block, phase=phase, tags=tags | {"tp_reduce"}, by="megatron_tp_1d", source="arXiv:1909.08053",
                kind="all_reduce", group=group, size=size, dtype=kind,
            )
        )  # fmt: skip

    seen: set[tuple[str, str]] = set()
    for item in ledger.of(Matmul, phase="forward"):
        size = f"{item.m}*hidden" if item.n == "hidden" else item.m
        if "row" in item.tags and item.n == "hidden":
            all_reduce(f"{item.what}.all_reduce", item.block, "forward", size, item.tags - {"gemm", "row"})
        elif "column" in item.tags and item.k == "hidden":
            # Products that read the same input sum their input gradients before one all-reduce.
            source = next((tag for tag in _COLUMN_INPUTS if tag in item.tags), item.what)
            if (item.block, source) not in seen:
                seen.add((item.block, source))
                all_reduce(
                    f"{item.what}.input_gradient",
                    item.block,
                    "backward",
                    f"{item.m}*hidden",
                    item.tags - {"gemm", "column"},
                )
    head = next((i for i in ledger.of(Matmul, phase="forward", what="head.logits")), None)
    if head is not None:
        # Maximum, then sum of exponentials and target logit (Megatron's vocab-parallel cross-entropy).
        for name in ("max", "sum", "target"):
            all_reduce(f"head.loss_{name}", head.block, "forward", head.m, frozenset({"loss_reduce"}), "fp32")
    all_reduce("embedding.all_reduce", "embedding", "forward", "batch*seq*hidden", frozenset({"embedding"}))
    return ledger.add(added)


TECHNIQUE = Technique(
    key="megatron_tp_1d",
    name="Megatron 1-D tensor parallelism",
    slot="tensor",
    choices=("1d",),
    default=True,
    source="arXiv:1909.08053",
    summary="Column- and row-parallel linear layers",
    knobs=(Knob("tp", "tensor-parallel degree"),),
    valid=valid,
    apply=apply,
)
