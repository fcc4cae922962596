"""Shapes of a named model's operators, as profiles of serving engines name them."""

from __future__ import annotations

from functools import lru_cache

from planner.errors import PlannerError
from planner.specs.model import Attention, Block, Model
from planner.specs.models import load_model
from planner.validation.table import Unsupported

__all__ = ["latent_shape", "layer_work", "model_heads"]

_LATENT, _ROPE, _NOPE, _VALUE = 512.0, 64.0, 128.0, 128.0
"""Latent attention of the tables: DeepSeek-V3's (arXiv:2412.19437, section 4.2), which their collectors name."""


def latent_shape(decode: bool, heads: float) -> tuple[float, float, float]:
    """Heads of keys, and widths of queries and values of a latent attention.

    Generation attends to the latent itself, with the projections absorbed in queries and output.
    """
    return (1.0, _LATENT + _ROPE, _LATENT) if decode else (heads, _NOPE + _ROPE, _VALUE)


def model_heads(name: str, tp: float) -> tuple[float, float, float]:
    """Heads of queries and of keys on one of ``tp`` ranks, and their width.

    Raises:
        Unsupported: no such model, or one without attention.
    """
    attention = _attention(_model(name))
    return attention.heads / tp, max(1.0, attention.kv_heads / tp), float(attention.head_dim)


def layer_work(name: str, layer: str, tp: float, count: float) -> float | tuple[float, float, float]:
    """Bytes that a memory-bound operator reads and writes in bf16, or (m, n, k) of a product, on one of ``tp`` ranks.

    Args:
        name: of the model.
        layer: as the profile names it.
        count: tokens, or sequences for what runs once per sequence.

    Raises:
        Unsupported: no such model or layer.
    """
    model = _model(name)
    attention, block = _attention(model), _block(model)
    width, hidden = float(attention.head_dim), float(model.hidden)
    query, key = attention.heads * width / tp, max(attention.kv_heads / tp, 1.0) * width
    ffn = (block.mlp.ffn if block.mlp else block.moe.expert_ffn if block.moe else 0) / tp
    products = {
        "qkv_proj": (query + 2.0 * key, hidden),
        "q_proj": (query, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "o_proj": (hidden, query),
        "gate_up_proj": (2.0 * ffn, hidden),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
        "expert.w1": (tp * ffn, hidden),  # whole experts are dealt to ranks
        "expert.w3": (tp * ffn, hidden),
        "expert.w2": (hidden, tp * ffn),
        "gate": (float(block.moe.experts) if block.moe else 0.0, hidden),
        "lm_head": (model.vocab / tp, hidden),
    }
    streams = {
        "embedding": 2.0 * hidden,
        "layernorm": 4.0 * hidden,  # with the residual: reads two tensors, writes two
        "final_layernorm": 4.0 * hidden,
        "input_layernorm": 4.0 * hidden,
        "post_layernorm": 4.0 * hidden,
        "qk_norm": 2.0 * (query + key) * tp,
        "rotary_emb": 2.0 * (query + key),
        "rope": 2.0 * (query + key),
        "act_fn": 3.0 * ffn,
        "sampler": 2.0 * model.vocab,  # logits in fp32
    }
    if streams.get(layer):
        return 2.0 * streams[layer] * count
    if layer not in products or not all(products[layer]):
        raise Unsupported(f"layer {layer!r}: not modelled")
    return (count, *products[layer])


@lru_cache(maxsize=64)
def _model(name: str) -> Model:
    try:
        return load_model(name)
    except PlannerError as error:
        raise Unsupported(str(error).splitlines()[0]) from None


def _block(model: Model) -> Block:
    return model.blocks[model.layers[-1][0]]


def _attention(model: Model) -> Attention:
    found = next((block.attention for block in model.blocks.values() if block.attention), None)
    if found is None:
        raise Unsupported(f"{model.name} has no attention")
    return found
