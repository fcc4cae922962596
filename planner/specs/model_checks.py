"""Relations that the sizes of a model must satisfy, whatever file they came from."""

from __future__ import annotations

from collections.abc import Iterator

from planner.specs.model import Attention, Model, Moe, Ssm

__all__ = ["Violation", "violations"]

Violation = tuple[str, str, str]
"""Key path, what was found, what was expected."""


def violations(model: Model) -> list[Violation]:
    """Everything about a model that cannot be, each problem once."""
    found: dict[Violation, None] = {}
    for block in model.blocks.values():
        for attention in (block.attention, block.cross_attention):
            if attention is not None:
                found.update(dict.fromkeys(_attention(attention)))
        if block.moe is not None:
            found.update(dict.fromkeys(_moe(block.moe)))
        if block.ssm is not None:
            found.update(dict.fromkeys(_ssm(block.ssm)))
        if not any((block.attention, block.ssm, block.mlp, block.moe)):
            found["layers", "has a layer with nothing in it", "an attention, ssm, mlp or moe table"] = None
    if model.mtp_modules and not (model.head and model.vocab):
        found["mtp_modules", f"{model.mtp_modules}", "0 where nothing predicts tokens"] = None
    if not model.layers:
        found["layers", "is empty", "at least one layer"] = None
    if model.head and model.vocab == 0:
        found["vocab", "0", "a vocabulary, or head = false"] = None
    active, total = model.published_active_parameters, model.published_parameters
    if active and total and active > total:
        found["published_active_parameters", f"{active:g}", f"at most published_parameters ({total:g})"] = (
            None
        )
    return list(found)


def _attention(attention: Attention) -> Iterator[Violation]:
    if attention.heads % attention.kv_heads:
        yield (
            "attention.kv_heads",
            f"{attention.kv_heads} does not divide heads = {attention.heads}",
            "a divisor of heads",
        )
    if attention.latent:
        for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if not getattr(attention, key):
                yield f"attention.{key}", "is missing", "a positive size, since kv_lora_rank is set"
    elif attention.q_lora_rank:
        yield (
            "attention.q_lora_rank",
            "is set without kv_lora_rank",
            "both ranks (latent attention) or neither",
        )
    # Layers that reuse an earlier layer's index have index_top_k alone.
    if attention.index_heads and not (attention.index_head_dim and attention.index_top_k):
        yield "attention.index_heads", "comes without its sizes", "index_head_dim and index_top_k too"


def _moe(moe: Moe) -> Iterator[Violation]:
    if moe.top_k > moe.experts:
        yield "moe.top_k", f"{moe.top_k}", f"at most experts = {moe.experts}"
    if moe.shared_gate and not moe.shared_ffn:
        yield "moe.shared_gate", "is set without a shared expert", "shared_ffn too"


def _ssm(ssm: Ssm) -> Iterator[Violation]:
    if ssm.version == 1:
        if not ssm.dt_rank:
            yield "ssm.dt_rank", "is missing", "a positive rank (Mamba 1)"
        return
    if not ssm.heads or ssm.inner % ssm.heads:
        yield "ssm.heads", f"{ssm.heads} does not divide inner = {ssm.inner}", "a divisor of inner (Mamba 2)"
    if ssm.heads and ssm.heads % ssm.groups:
        yield "ssm.groups", f"{ssm.groups} does not divide heads = {ssm.heads}", "a divisor of heads"
