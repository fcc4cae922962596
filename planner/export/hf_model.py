"""A model as the ``config.json`` of a Transformers class, so that a script can build it without weights.

A family's configuration is written from the sizes and read back by :mod:`planner.specs.huggingface`; it is taken only where the
same model comes back. Layer classes and whether a family has a plan for tensor parallelism (``base_model_tp_plan``) are those of
Transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from planner.errors import SpecError
from planner.export.rules import per_model
from planner.specs.huggingface import model_from_config
from planner.specs.model import Block, Model, Moe

__all__ = ["HfModel", "hf_model"]


@dataclass(frozen=True, slots=True)
class HfModel:
    """A Transformers model of the same shape.

    Attributes:
        config: its ``config.json``.
        layer_class: class of its layers, the unit that is sharded and recomputed.
        tensor_parallel: whether the family says how its weights are cut over tensor-parallel ranks.
    """

    config: Mapping[str, Any]
    layer_class: str
    tensor_parallel: bool


@per_model
def hf_model(model: Model) -> HfModel | None:
    """The Transformers model of this shape; None where no family that is known here has it.

    >>> from planner.specs.models import load_model
    >>> hf_model(load_model("llama3.1-8b")).layer_class
    'LlamaDecoderLayer'
    """
    if model.arch != "decoder" or not model.head:
        return None
    blocks = [model.blocks[name] for name, repeat in model.layers for _ in range(repeat)]
    if any(b.attention is None or b.ssm or (b.mlp is None) == (b.moe is None) for b in blocks):
        return None
    for family, (layer_class, cut, write) in _FAMILIES.items():
        config = {"model_type": family, "architectures": [_class_of(layer_class)], **write(model, blocks)}
        try:
            again = model_from_config(config)
        except SpecError:
            continue
        if _shape(again) == _shape(model):
            return HfModel(config, layer_class, cut)
    return None


def _class_of(layer_class: str) -> str:
    """The language model whose layers are of a class.

    >>> _class_of("Qwen3MoeDecoderLayer"), _class_of("GPT2Block")
    ('Qwen3MoeForCausalLM', 'GPT2LMHeadModel')
    """
    family = layer_class.removesuffix("DecoderLayer")
    return "GPT2LMHeadModel" if layer_class == "GPT2Block" else f"{family}ForCausalLM"


def _shape(model: Model) -> tuple[Any, ...]:
    """What of a model its config.json has to say: layer by layer, and around them."""
    order = [_without_routing(model.blocks[name]) for name, repeat in model.layers for _ in range(repeat)]
    positions = model.learned_positions
    ends = (model.final_norm, model.tied_embeddings, model.head_bias, model.extra_embedding_parameters)
    return model.hidden, model.vocab, order, positions, ends


def _without_routing(block: Block) -> Block:
    """The block with explicit widths."""
    attention = block.attention
    if attention is not None and not attention.latent:
        attention = replace(
            attention, v_head_dim=0 if attention.value_dim == attention.head_dim else attention.v_head_dim
        )
    return replace(block, attention=attention)


def _common(model: Model, blocks: list[Block]) -> dict[str, Any]:
    attention = blocks[0].attention
    assert attention is not None
    mlp = next((block.mlp for block in blocks if block.mlp), None)
    moe = next((block.moe for block in blocks if block.moe), None)
    return {
        "hidden_size": model.hidden,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": mlp.ffn if mlp else moe.expert_ffn if moe else 0,
        "vocab_size": model.vocab,
        "max_position_embeddings": model.max_seq_len,
        "tie_word_embeddings": model.tied_embeddings,
        "rms_norm_eps": 1e-5,
    }


def _llama(model: Model, blocks: list[Block]) -> dict[str, Any]:
    first = blocks[0]
    assert first.attention is not None
    biased = first.mlp is not None and first.mlp.bias
    return _common(model, blocks) | {"attention_bias": first.attention.out_bias, "mlp_bias": biased}


def _mistral(model: Model, blocks: list[Block]) -> dict[str, Any]:
    attention = blocks[0].attention
    return _common(model, blocks) | {"sliding_window": attention.window if attention else None}


def _qwen3(model: Model, blocks: list[Block]) -> dict[str, Any]:
    return _common(model, blocks) | {"attention_bias": False, "use_sliding_window": False}


def _mixtral(model: Model, blocks: list[Block]) -> dict[str, Any]:
    moe = _moe(blocks)
    return _common(model, blocks) | {
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "sliding_window": None,
    }


def _qwen3_moe(model: Model, blocks: list[Block]) -> dict[str, Any]:
    moe = _moe(blocks)
    return _qwen3(model, blocks) | {
        "num_experts": moe.experts, "num_experts_per_tok": moe.top_k, "moe_intermediate_size": moe.expert_ffn,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    }  # fmt: skip


def _deepseek(model: Model, blocks: list[Block]) -> dict[str, Any]:
    attention, moe = blocks[0].attention, _moe(blocks)
    assert attention is not None
    dense = sum(block.moe is None for block in blocks)
    sizes = _common(model, blocks)
    del sizes["head_dim"]
    return sizes | {
        "q_lora_rank": attention.q_lora_rank, "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim, "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.value_dim, "n_routed_experts": moe.experts, "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_ffn, "n_shared_experts": moe.shared_ffn // max(moe.expert_ffn, 1),
        "first_k_dense_replace": dense, "moe_layer_freq": 1, "attention_bias": False,
        "num_nextn_predict_layers": model.mtp_modules,  # one unless it says otherwise
    }  # fmt: skip


def _gpt2(model: Model, blocks: list[Block]) -> dict[str, Any]:
    attention, mlp = blocks[0].attention, blocks[0].mlp
    return {
        "n_embd": model.hidden, "n_layer": len(blocks), "n_head": attention.heads if attention else 0,
        "n_inner": mlp.ffn if mlp else 0, "vocab_size": model.vocab,
        "n_positions": model.learned_positions or model.max_seq_len, "tie_word_embeddings": model.tied_embeddings,
    }  # fmt: skip


def _moe(blocks: list[Block]) -> Moe:
    return next((block.moe for block in blocks if block.moe), Moe(1, 1, 1))


_FAMILIES: Mapping[str, tuple[str, bool, Callable[[Model, list[Block]], dict[str, Any]]]] = {
    "llama": ("LlamaDecoderLayer", True, _llama),
    "mistral": ("MistralDecoderLayer", True, _mistral),
    "qwen2": ("Qwen2DecoderLayer", True, _common),
    "qwen3": ("Qwen3DecoderLayer", True, _qwen3),
    "mixtral": ("MixtralDecoderLayer", True, _mixtral),
    "qwen3_moe": ("Qwen3MoeDecoderLayer", True, _qwen3_moe),
    "deepseek_v3": ("DeepseekV3DecoderLayer", True, _deepseek),
    "gpt2": ("GPT2Block", False, _gpt2),
}
