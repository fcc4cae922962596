"""A model as a sequence of blocks: what is needed to count parameters, FLOP, bytes and activations, and no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Attention", "Block", "Mlp", "Model", "Moe", "Ssm"]


@dataclass(frozen=True, slots=True)
class Attention:
    """Self- or cross-attention. ``latent`` ranks make it MLA (multi-head latent attention, DeepSeek-V2 §2.1)."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None  # sliding window or chunk, tokens; None attends to everything
    causal: bool = True
    cross: bool = False  # keys and values come from the encoder
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False  # one learned logit per head (gpt-oss)
    q_lora_rank: int | None = None  # MLA; None or 0: queries are projected directly
    kv_lora_rank: int | None = None  # MLA when set
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0

    @property
    def latent(self) -> bool:
        """Whether this is multi-head latent attention."""
        return self.kv_lora_rank is not None


@dataclass(frozen=True, slots=True)
class Mlp:
    """A feed-forward network; ``gated`` has three matrices (SwiGLU, GeGLU), else two."""

    ffn: int
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Moe:
    """A mixture of experts with an optional always-on shared expert of width ``shared_ffn``."""

    experts: int
    top_k: int
    expert_ffn: int
    shared_ffn: int = 0
    gated: bool = True
    bias: bool = False
    shared_gate: bool = False  # a sigmoid gate of width 1 on the shared expert (Qwen2-MoE)
    router_bias: bool = False


@dataclass(frozen=True, slots=True)
class Ssm:
    """A selective state-space mixer (Mamba 1 or 2)."""

    version: int
    inner: int  # expand * hidden
    state_size: int
    conv_kernel: int = 4
    dt_rank: int = 0  # Mamba 1
    heads: int = 0  # Mamba 2
    groups: int = 1  # Mamba 2


@dataclass(frozen=True, slots=True)
class Block:
    """One layer: mixers in order (attention or SSM, cross-attention), then MLP or MoE; absent parts are None."""

    attention: Attention | None = None
    cross_attention: Attention | None = None
    ssm: Ssm | None = None
    mlp: Mlp | None = None
    moe: Moe | None = None
    norm: str = "rmsnorm"  # rmsnorm (weight) | layernorm (weight and bias) | layernorm_nobias | none (no parameters)
    norms: int = 2  # norms of hidden width per block
    parallel: bool = False  # attention and MLP read the same norm (GPT-J, PaLM, Falcon)


@dataclass(frozen=True, slots=True)
class Model:
    """A model: named block kinds, and ``layers``, their order as runs of (block name, repeat).

    ``encoder_layers`` (encoder–decoder models only) is the same for the encoder; for encoder-only models use
    ``layers``. All sizes in elements. ``published_parameters`` is the printed total, ``published_digits`` how many
    significant digits were printed, ``exception`` why the count may differ by more than 1 %.
    """

    name: str
    family: str
    arch: str  # decoder | encoder | encoder-decoder | vision
    hidden: int
    vocab: int
    max_seq_len: int
    blocks: Mapping[str, Block]
    layers: tuple[tuple[str, int], ...]
    encoder_layers: tuple[tuple[str, int], ...] = ()
    tied_embeddings: bool = False
    learned_positions: int = 0  # rows of the learned position table
    extra_embedding_parameters: int = 0  # token types, embedding norm, patch or audio front end, embedding projections
    final_norm: str = "rmsnorm"
    head: bool = True  # an output projection to the vocabulary (tied or not)
    head_bias: bool = False
    mtp_layers: int = 0  # multi-token-prediction modules beyond the counted layers
    dropout: bool = False  # hidden and attention dropout are active in training
    published_parameters: float | None = None
    published_active_parameters: float | None = None
    exception: str = ""
    source: str = ""
    extras: Mapping[str, str] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        """Layers of the (decoder) stack."""
        return sum(repeat for _, repeat in self.layers)
