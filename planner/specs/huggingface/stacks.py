"""Encoder–decoder and vision models from a config.json."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from planner.specs.huggingface.parts import Parts
from planner.specs.layers import LayerPlan, arrange
from planner.specs.model import Attention, Block

__all__ = ["encoder_decoder", "vision"]


def encoder_decoder(parts: Parts, max_seq_len: int) -> tuple[LayerPlan, dict[str, Any]]:
    """Layers of both stacks (T5, BART, Whisper), and the fields of the model that only they have."""
    fields = parts.fields
    decoder = parts.attention()
    encoder_heads = fields.size("encoder_heads", decoder.heads)
    encoder = decoder
    if encoder_heads != decoder.heads:
        encoder = replace(
            decoder, heads=encoder_heads, kv_heads=encoder_heads, head_dim=parts.hidden // encoder_heads
        )
    decoder = replace(decoder, causal=True)
    depth, encoder_depth = fields.size("decoder_layers"), fields.size("encoder_layers")
    if max(depth, encoder_depth) > 10_000:
        fields.problem("num_layers", f"{max(depth, encoder_depth)}", "at most 10000 layers")
        depth = encoder_depth = 1
    plan = arrange(
        [
            _layer(parts, decoder, "ffn", _sparse(parts, depth, i, "decoder"), cross=True)
            for i in range(depth)
        ],
        [
            _layer(parts, encoder, "encoder_ffn", _sparse(parts, encoder_depth, i, "encoder"))
            for i in range(encoder_depth)
        ],
    )
    return plan, {
        "extra_embedding_parameters": _front_end(parts, max_seq_len),
        "encoder_tokens": fields.config.get("num_mel_bins") is None,
    }


def _layer(parts: Parts, attention: Attention, width: str, sparse: bool, *, cross: bool = False) -> Block:
    return Block(
        attention=attention,
        cross_attention=replace(attention, cross=True, causal=False) if cross else None,
        mlp=None if sparse else parts.mlp(width),
        moe=parts.moe if sparse else None,
        norm=parts.family.norm,
        norms=3 if cross else 2,
    )


def _sparse(parts: Parts, depth: int, index: int, stack: str) -> bool:
    """Switch Transformers: as many sparse layers as the stack has, evenly spread, the last of each group."""
    count = parts.fields.size(f"num_sparse_{stack}_layers", 0, minimum=0)
    if parts.moe is None or not count:
        return False
    every = max(1, depth // count)
    return bool(index % every == (1 if every > 1 else 0))


def _front_end(parts: Parts, max_seq_len: int) -> int:
    """What stands before the two stacks: relative positions, the encoder's table, norms, convolutions."""
    fields, family, hidden = parts.fields, parts.family, parts.hidden
    total = 0
    if (buckets := fields.size("relative_attention_num_buckets", None)) is not None:
        total += 2 * buckets * fields.size("heads")  # one table per stack
    if fields.config.get("num_mel_bins") is not None:
        mel, frames = fields.size("num_mel_bins"), fields.size("max_source_positions")
        total += 3 * mel * hidden + hidden + 3 * hidden * hidden + hidden + frames * hidden
    elif family.learned_positions is not None:
        total += (max_seq_len + family.learned_positions) * hidden  # the encoder's own table
    if fields.rule(family.embedding_norm):
        total += 2 * 2 * hidden  # a layernorm in front of each stack
    return int(total)


def vision(parts: Parts) -> tuple[LayerPlan, dict[str, Any]]:
    """A vision transformer: one learned position per patch and one for the class token."""
    fields, hidden = parts.fields, parts.hidden
    patch, channels = fields.size("patch_size"), fields.size("num_channels", 3)
    image = fields.size("image_size")
    tokens = (image // patch) ** 2 + 1
    plan = arrange([parts.block("G", "D")] * min(fields.size("layers"), 10_000))
    return plan, {
        "max_seq_len": tokens,
        "learned_positions": tokens,
        "head": False,
        "extra_embedding_parameters": channels * patch * patch * hidden + hidden + hidden,
    }
