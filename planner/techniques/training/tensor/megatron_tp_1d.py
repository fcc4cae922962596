"""Megatron 1-D tensor parallelism: column-parallel, then row-parallel products.

What it does: shards heads, feed-forward width and vocabulary over ``tp`` ranks. A product whose contraction is sharded leaves
    partial sums, which an all-reduce completes (forward of row-parallel, input gradient of column-parallel layers).
Saves: weights, products and their inputs, divided by tp.
Costs: 2 all-reduces of b·s·h elements forward and 2 backward per block (1 forward where attention and network run in parallel,
    1 backward where they read the same norm as well); norms and residuals stay whole on every rank; one all-reduce in the
    embedding of each stack; two sums per token and direction where a norm spans all heads; three small fp32 all-reduces in
    the cross-entropy over a sharded vocabulary.
Assumes: KV heads are replicated when tp exceeds them; latent down-projections of MLA are replicated, and the gradients of
    latents are summed instead of the hidden state's.
Source: Shoeybi et al. 2019 (arXiv:1909.08053); Narayanan et al. 2021 (arXiv:2104.04473) §3.2; parallel blocks: Chowdhery et al.
    2022 (PaLM, arXiv:2204.02311) §2 (fused input products), GPT-NeoX ``megatron/model/transformer.py`` (two norms); norms
    over all heads: vLLM ``MiniMaxText01RMSNormTP``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from planner.ledger import Array, Collective, Item, Ledger, Matmul, Phase, Stream, role, times
from planner.technique import Check, Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.tensor.weights import CUT, REPLICATED_WHEN_FEW, cut, partial_gradients


def valid(ctx: Context) -> Iterable[Check]:
    """Whole heads and whole columns per rank."""
    tp = ctx.mesh.tp
    for block in ctx.model.blocks.values():
        for attention in (block.attention, block.cross_attention):
            if attention is not None:
                yield Check("attention heads not divisible by tp", attention.heads % tp == 0)
                yield Check(
                    "KV heads neither a multiple nor a divisor of tp", _shares(attention.kv_heads, tp)
                )
        if block.mlp:
            yield Check("feed-forward width not divisible by tp", block.mlp.ffn % tp == 0)
        if block.moe and block.moe.shared_ffn:
            yield Check("shared expert width not divisible by tp", block.moe.shared_ffn % tp == 0)
        if block.ssm:
            yield Check("state-space width not divisible by tp", block.ssm.inner % tp == 0)
            if block.ssm.heads:
                yield Check("state-space heads not divisible by tp", block.ssm.heads % tp == 0)
                yield Check(
                    "state-space groups neither a multiple nor a divisor of tp", _shares(block.ssm.groups, tp)
                )


def _shares(count: int, tp: Array) -> NDArray[np.bool_]:
    return np.asarray((count % tp == 0) | (tp % count == 0))


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shards by role, replicates surplus KV heads, pads the vocabulary, adds the all-reduces."""
    tp = ctx.mesh.tp
    few = [name for name in ledger.axes.names() if role(name) in REPLICATED_WHEN_FEW]
    sharing = {name: np.maximum(tp / ledger.axes[name], 1.0) for name in few}  # ranks that hold the same head
    kv = {name: ledger.axes[name] / tp * sharing[name] for name in few}
    vocab = ledger.axes["vocab"]
    # Megatron pads the vocabulary to a multiple of 128·tp.
    padded = np.where(tp > 1, np.ceil(vocab / (128 * tp)) * 128 * tp, vocab)
    ledger = ledger.set_axes(**kv, vocab=padded).shard(**dict.fromkeys(CUT, tp))
    return ledger.add([*_activation_sums(ledger, ctx), *_gradient_sums(ledger, ctx, sharing)])


def _activation_sums(ledger: Ledger, ctx: Context) -> Iterator[Collective]:
    """All-reduces that complete partial sums. Sequence parallelism splits those tagged ``tp_reduce``."""

    def all_reduce(
        what: str, block: str, phase: Phase, size: str, tags: frozenset[str], dtype: str
    ) -> Collective:
        return Collective(
            what=f"{what}.all_reduce", block=block, phase=phase, tags=tags, by="megatron_tp_1d", source="arXiv:1909.08053",
            kind="all_reduce", group=ctx.mesh.group("tp"), size=size, dtype=dtype,
        )  # fmt: skip

    parallel = {name: block for name, block in ctx.model.blocks.items() if block.parallel}
    activation = ctx.format.activation
    seen: set[tuple[str, ...]] = set()
    for item in ledger.of(Matmul, phase="forward"):
        tags = item.tags - {"gemm", "row", "column"}
        # What is summed before it is reduced shares one all-reduce: the outputs of attention and network where they run in
        # parallel, and the input gradients of products that read the same tensor.
        region = item.what.partition(".")[0]
        block = parallel.get(item.block.removeprefix("encoder."))
        if block is not None and ("row" in item.tags or block.norms <= 1):
            region = ""
        if "row" in item.tags and item.n == "hidden":
            if (item.block, region, "output") not in seen:
                seen.add((item.block, region, "output"))
                yield all_reduce(
                    item.what, item.block, "forward", f"{item.m}*hidden", tags | {"tp_reduce"}, activation
                )
        elif "row" in item.tags:  # Mamba's step, B and C: small, read and produced inside the mixer
            size = times(item.n, item.m)
            yield all_reduce(item.what, item.block, "forward", size, tags | {"tp_inner"}, activation)
            yield all_reduce(item.what, item.block, "backward", size, tags | {"tp_inner"}, activation)
        elif (
            "column" in item.tags
            and role(item.k) != "ssm_rank"
            and (item.block, region, item.m, item.k) not in seen
        ):
            seen.add((item.block, region, item.m, item.k))
            width = item.k.replace("kv_rank@", "kv_down@")  # the rotary key travels with the latent
            yield all_reduce(
                item.what, item.block, "backward", f"{item.m}*{width}", tags | {"tp_reduce"}, activation
            )
    for head in ledger.of(Matmul, phase="forward", what="head.logits"):
        # Maximum, sum of exponentials, target logit (Megatron's vocab-parallel cross-entropy).
        for name in ("max", "sum", "target"):
            yield all_reduce(
                f"head.loss_{name}", head.block, "forward", head.m, frozenset({"loss_reduce"}), "fp32"
            )
    for norm in ledger.of(Stream):
        if (
            "all_heads" in norm.tags
        ):  # sums of squares of queries and keys; backward, of gradients times outputs
            tags = norm.tags - {"activation", "all_heads"} | {"tp_inner"}
            yield all_reduce(norm.what, norm.block, norm.phase, _rows(norm.size), tags, "fp32")
    tags = frozenset({"embedding", "tp_reduce"})
    for lookup in ledger.of(Stream, block="embedding", phase="forward"):
        if ctx.model.vocab:
            size = lookup.size.replace("residual_seq", "seq")
            yield all_reduce(lookup.what, "embedding", "forward", size, tags, activation)


def _rows(size: str) -> str:
    """Tokens behind a size: every term without the widths, whose axes belong to a block."""
    terms = (term.split("*") for term in size.split(" + "))
    return " + ".join("*".join(axis for axis in term if "@" not in axis) for term in terms)


def _gradient_sums(ledger: Ledger, ctx: Context, sharing: dict[str, Array]) -> Iterator[Item]:
    """Gradients of weights that several ranks hold whole, and see some of the heads of."""

    def of_head(axes: frozenset[str]) -> bool:
        return "head_dim" in map(role, axes) and not cut(axes)

    yield from partial_gradients(ledger, ctx, ctx.mesh.group("tp"), of_head, "head", "megatron_tp_1d")
    for name, ranks in sharing.items():
        if np.any(ranks > 1):
            group = ctx.mesh.subgroup("tp", f"tp.{name}", ranks, inner=True)
            yield from partial_gradients(
                ledger, ctx, group, partial(_has, name), role(name), "megatron_tp_1d"
            )


def _has(axis: str, axes: frozenset[str]) -> bool:
    return axis in axes


def _volume(subject: Pass) -> float:
    """Elements sent per layer and micro-batch, forward and backward."""
    ledger, _ = figures.run("tensor", subject, model="gpt3-175b", seq=2048, tp=8)
    return figures.sent_elements(
        ledger, lambda i: i.phase != "step" and i.group.name == "tp" and i.block not in ("embedding", "head")
    )


def _activation_bytes(subject: Pass) -> float:
    """Bytes saved per layer in units of sbh."""
    ledger, _ = figures.run("tensor", subject, model="gpt3-175b", seq=2048, tp=8, precision="fp16")
    return figures.saved_bytes(ledger) / (2048 * 12288)


TECHNIQUE = Technique(
    key="megatron_tp_1d",
    name="Megatron 1-D tensor parallelism",
    slot="tensor",
    choices=("1d",),
    default=True,
    source="arXiv:1909.08053",
    summary="Column- and row-parallel linear layers",
    knobs=(
        Knob("tp", "tensor-parallel degree"),
        Knob("tensor", "how products are cut over tensor ranks", ("1d", "2d", "2.5d", "3d"), "1d"),
    ),
    figures=(
        Figure(
            "elements sent per layer of GPT-3 175B, t = 8: 8bsh(t − 1)/t",
            8 * 2048 * 12288 * 7 / 8,
            1e-9,
            "Narayanan et al. 2021 (arXiv:2104.04473), section 3.2",
            _volume,
        ),
        Figure(
            "bytes saved per layer of GPT-3 175B, t = 8, in sbh: 10 + 24/t + 5as/(ht)",
            10 + 24 / 8 + 5 * 96 * 2048 / (12288 * 8),
            1e-9,
            "Korthikanti et al. 2022 (arXiv:2205.05198), Table 2",
            _activation_bytes,
        ),
    ),
    valid=valid,
    apply=apply,
)
