"""Exact parameter counts of a model, part by part, in closed form.

Conventions: every trained weight is counted once: norms, biases, router and learned positions included, the
input embedding once, the output projection only where it is not tied to it. Left out are buffers that no
gradient reaches (sinusoidal tables, DeepSeek-V3's balancing bias) and multi-token-prediction modules.
*Active* parameters are those that one token passes through: as the total, with ``top_k`` of the routed
experts; the whole embedding table counts.
"""

from __future__ import annotations

from planner.specs.model import Attention, Mlp, Model, Moe, Ssm

__all__ = [
    "active_parameter_count",
    "attention_parameters",
    "block_parameters",
    "embedding_parameters",
    "head_parameters",
    "mlp_parameters",
    "moe_parameters",
    "norm_parameters",
    "parameter_count",
    "ssm_parameters",
]


def parameter_count(model: Model) -> int:
    """All parameters of a model, without multi-token-prediction modules.

    >>> from planner.specs.models import load_model
    >>> parameter_count(load_model("llama3.1-405b"))
    405853388800
    """
    return _count(model, active=False)


def active_parameter_count(model: Model) -> int:
    """Parameters that one token passes through, the whole input embedding included.

    >>> from planner.specs.models import load_model
    >>> round(active_parameter_count(load_model("deepseek-v3")) / 1e9, 2)
    37.55
    """
    return _count(model, active=True)


def block_parameters(model: Model, block_name: str, *, active: bool = False) -> int:
    """Parameters of one layer of this kind; ``active`` counts the experts that one token uses."""
    block, hidden = model.blocks[block_name], model.hidden
    total = block.extra_parameters + block.norms * norm_parameters(block.norm, hidden)
    for attention in (block.attention, block.cross_attention):
        if attention is not None:
            total += attention_parameters(attention, hidden)
    if block.ssm is not None:
        total += ssm_parameters(block.ssm, hidden)
    if block.mlp is not None:
        total += mlp_parameters(block.mlp, hidden)
    if block.moe is not None:
        total += moe_parameters(block.moe, hidden, active=active)
    return total


def embedding_parameters(model: Model) -> int:
    """Token embedding, learned positions, and what else stands before (or beside) the layers."""
    # A vision model has no vocabulary: its patch projection is among the extra parameters.
    return (model.vocab + model.learned_positions) * model.hidden + model.extra_embedding_parameters


def head_parameters(model: Model) -> int:
    """Final norms (of both stacks in an encoder–decoder) and the output projection where it is not tied."""
    stacks = 2 if model.encoder_layers else 1
    total = stacks * norm_parameters(model.final_norm, model.hidden)
    if model.head:
        total += 0 if model.tied_embeddings else model.vocab * model.hidden
        total += model.vocab if model.head_bias else 0
    return total


def attention_parameters(attention: Attention, hidden: int) -> int:
    """Projections, biases and norms of one attention.

    MLA follows DeepSeek-V2 (arXiv:2405.04434) §2.1 with the norms of its released code; the indexer of sparse
    attention follows DeepSeek-V3.2 (arXiv:2512.02556) §2.1.
    """
    heads, kv_heads = attention.heads, attention.kv_heads
    context = heads * attention.value_dim
    total = context * hidden + (hidden if attention.out_bias else 0)
    if attention.latent:
        total += _latent_projections(attention, hidden)
    else:
        query = heads * attention.head_dim * (2 if attention.output_gate else 1)
        key, value = kv_heads * attention.head_dim, kv_heads * attention.value_dim
        total += hidden * (query + key + value)
        if attention.qkv_bias:
            total += query + value + (key if attention.key_bias else 0)
    if attention.qk_norm:
        widths = (heads, kv_heads) if attention.qk_norm_full else (1, 1)
        total += sum(widths) * attention.head_dim
    if attention.sinks:
        total += heads
    if attention.relative_projection:
        total += hidden * heads * attention.head_dim
    if attention.index_heads:
        source = attention.q_lora_rank or hidden
        width = attention.index_head_dim
        total += source * attention.index_heads * width + hidden * (width + attention.index_heads) + 2 * width
    return total


def _latent_projections(attention: Attention, hidden: int) -> int:
    """Query, key and value projections of multi-head latent attention, with the norms of the latents."""
    assert attention.kv_lora_rank is not None
    heads, rank, rope = attention.heads, attention.kv_lora_rank, attention.qk_rope_head_dim
    queries = heads * attention.query_dim
    down = rank + rope
    total = hidden * down + rank + rank * heads * (attention.qk_nope_head_dim + attention.value_dim)
    if attention.q_lora_rank:
        total += hidden * attention.q_lora_rank + attention.q_lora_rank + attention.q_lora_rank * queries
    else:
        total += hidden * queries
    if attention.qkv_bias:
        total += down + (attention.q_lora_rank or 0)
    return total


def mlp_parameters(mlp: Mlp, hidden: int) -> int:
    """Three matrices if gated, else two.

    >>> mlp_parameters(Mlp(ffn=16, gated=False, bias=True), hidden=4)
    148
    """
    wide = (2 if mlp.gated else 1) * mlp.ffn
    return hidden * (wide + mlp.ffn) + (wide + hidden if mlp.bias else 0)


def moe_parameters(moe: Moe, hidden: int, *, active: bool = False) -> int:
    """Router, routed experts (all, or the ``top_k`` that one token uses) and the shared expert."""
    experts = moe.top_k if active else moe.experts
    total = hidden * moe.experts + (moe.experts if moe.router_bias else 0)
    total += experts * mlp_parameters(Mlp(moe.expert_ffn, moe.gated, moe.bias), moe.latent or hidden)
    total += 2 * hidden * moe.latent
    if moe.shared_ffn:
        total += mlp_parameters(Mlp(moe.shared_ffn, moe.gated, moe.bias), hidden)
        total += hidden if moe.shared_gate else 0
    return total


def ssm_parameters(ssm: Ssm, hidden: int) -> int:
    """Mamba (arXiv:2312.00752 §3.4), Mamba-2 (arXiv:2405.21060 §7) or gated DeltaNet (arXiv:2412.06464)."""
    inner, state, kernel = ssm.inner, ssm.state_size, ssm.conv_kernel
    if ssm.version == 1:
        projected, convolved = 2 * inner, inner
        total = inner * (ssm.dt_rank + 2 * state)  # dt, B and C from the convolved input
        total += ssm.dt_rank * inner + inner  # dt of every channel, with its bias
        total += inner * state + inner  # A and D
        total += ssm.dt_rank + 2 * state if ssm.inner_norms else 0
    else:
        convolved = inner + 2 * ssm.groups * state
        projected = inner + convolved + ssm.heads * (2 if ssm.delta else 1)
        total = ssm.heads * (2 if ssm.delta else 3)  # A, the bias of dt, and D
        if ssm.gated_norm:
            total += inner // ssm.heads if ssm.delta else inner
    total += hidden * projected + convolved * kernel + inner * hidden
    total += convolved if ssm.conv_bias else 0
    total += projected + hidden if ssm.bias else 0
    return total


def norm_parameters(kind: str, width: int) -> int:
    """Weights of one norm: only ``layernorm`` has both scale and shift, ``none`` has neither."""
    return {"rmsnorm": 1, "layernorm": 2, "layernorm_nobias": 1, "none": 0}[kind] * width


def _count(model: Model, *, active: bool) -> int:
    total = embedding_parameters(model) + head_parameters(model)
    for name, repeat in (*model.encoder_layers, *model.layers):
        total += repeat * block_parameters(model, name, active=active)
    return total
