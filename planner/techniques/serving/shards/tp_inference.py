"""Tensor parallelism of an iteration: heads, widths and vocabulary are cut over ``tp`` ranks.

What it does: every rank computes its heads and columns; an all-reduce completes each branch, one the embedding, and logits are
    gathered. Small messages go through the engine's own all-reduce where the link has one.
Saves: weights, products and cache of the heads, divided by tp.
Costs: 2 all-reduces of a layer's tokens (1 where attention and network run in parallel), bound by latency in generation.
Assumes: key heads are copied where tp exceeds them; latents and recurrent groups likewise; the vocabulary is padded to 64 · tp.
Source: Shoeybi et al. 2019 (arXiv:1909.08053); vLLM ``vocab_parallel_embedding.py``, ``custom_all_reduce.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.ledger import Array, Collective, Ledger, Matmul, role, times
from planner.technique import Check, Figure, Knob, ServingContext, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.runs import Pass

_CUT = ("heads", "ffn", "shared_ffn", "vocab", "ssm_inner", "ssm_heads")
_COPIED_WHEN_FEW = ("kv_heads", "ssm_groups")
_PADDING = 64


def valid(ctx: ServingContext) -> Iterable[Check]:
    """Whole heads and whole columns per rank."""
    tp = ctx.mesh.tp
    for block in ctx.model.blocks.values():
        if block.attention is not None:
            yield Check("attention heads not divisible by tp", block.attention.heads % tp == 0)
            yield Check(
                "KV heads neither a multiple nor a divisor of tp", _shares(block.attention.kv_heads, tp)
            )
        if block.mlp:
            yield Check("feed-forward width not divisible by tp", block.mlp.ffn % tp == 0)
        if block.moe and block.moe.shared_ffn:
            yield Check("shared expert width not divisible by tp", block.moe.shared_ffn % tp == 0)
        if block.ssm:
            yield Check("state-space width not divisible by tp", block.ssm.inner % tp == 0)
            yield Check(
                "state-space heads not divisible by tp", (block.ssm.heads or block.ssm.inner) % tp == 0
            )


def _shares(count: int, tp: Array) -> NDArray[np.bool_]:
    return np.asarray((count % tp == 0) | (tp % count == 0))


def apply(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """Cuts axes by role, copies surplus heads, pads the vocabulary, adds the collectives."""
    tp = ctx.mesh.tp
    axes = ledger.axes
    few = {name: np.maximum(axes[name] / tp, 1.0) for name in axes.names() if role(name) in _COPIED_WHEN_FEW}
    whole = axes["vocab"]
    padded = np.where(tp > 1, np.ceil(whole / (_PADDING * tp)) * _PADDING * tp, whole)
    ledger = ledger.set_axes(**few, vocab=padded, whole_vocab=padded).shard(**dict.fromkeys(_CUT, tp))
    return ledger.add(_collectives(ledger, ctx))


def _collectives(ledger: Ledger, ctx: ServingContext) -> Iterator[Collective]:
    own = ctx.stack.serving is None or ctx.stack.serving.all_reduce == "own"

    def collective(what: str, block: str, kind: Any, size: str) -> Collective:
        return Collective(
            what=what, block=block, tags=frozenset({"tp"}), by="tp_inference", source="arXiv:1909.08053",
            kind=kind, group=ctx.mesh.group("tp"), size=size, dtype=ctx.format.activation, custom=own and kind == "all_reduce",
        )  # fmt: skip

    seen: set[tuple[str, str]] = set()
    for item in ledger.of(Matmul, phase="forward"):
        if "row" not in item.tags:
            continue
        spec = ctx.model.blocks[item.block]
        region = "" if spec.parallel else item.what.partition(".")[0]
        if region == "shared_expert" or (item.block, region) in seen:
            continue  # summed with the routed experts before they are reduced
        seen.add((item.block, region))
        yield collective(f"{item.what}.all_reduce", item.block, "all_reduce", times(item.n, item.m))
    if ctx.model.vocab:
        yield collective("embedding.all_reduce", "embedding", "all_reduce", "batch*residual_seq*hidden")
    if ledger.of(Matmul, what="head.logits"):
        yield collective("head.all_gather", "head", "all_gather", "batch*logit_seq*whole_vocab")


def _messages(subject: Pass) -> float:
    """Elements that a rank sends per layer and token of GPT-3 175B on 8 ranks, in hidden states."""
    ledger = runs.run("shards", subject, model="gpt3-175b", tp=8, decodes=1.0)
    return runs.sent_elements(ledger, "tp", layers_only=True) / 12288


TECHNIQUE = Technique(
    key="tp_inference",
    name="Tensor parallel inference",
    slot="shards",
    job="serving",
    choices=("1d",),
    default=True,
    source="arXiv:1909.08053",
    summary="Heads, widths and vocabulary cut over tp ranks",
    knobs=(Knob("tp", "tensor-parallel degree"),),
    figures=(
        Figure(
            "hidden states that a rank sends per layer and token, t = 8: 2 all-reduces of 2(t - 1)/t",
            4 * 7 / 8,
            1e-9,
            "Shoeybi et al. 2019 (arXiv:1909.08053), section 3: two all-reduces in the forward pass",
            _messages,
        ),
    ),
    valid=valid,
    apply=apply,
)
