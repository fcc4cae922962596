"""A model as a sequence of blocks: all that counting parameters, FLOP, bytes and activations needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Attention", "Block", "Mlp", "Model", "Moe", "Ssm"]


@dataclass(frozen=True, slots=True)
class Attention:
    """Self- or cross-attention. ``latent`` ranks make it MLA (multi-head latent attention, DeepSeek-V2 §2.1).

    ``index_heads`` make it sparse (DeepSeek-V3.2 §2.1): a small indexer scores all keys for each query, and
    attention then sees the best ``index_top_k`` of them.
    """

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
    v_head_dim: int = 0  # 0: as head_dim
    key_bias: bool = True  # false: the key projection has no bias where the others have (Whisper)
    qk_norm_full: bool = False  # qk_norm spans all heads at once instead of each head (OLMo-2, MiniMax-M2)
    output_gate: bool = False  # a query-sized gate on the attention's output (Qwen3-Next)
    relative_projection: bool = False  # a matrix for relative positions (Transformer-XL; Gopher, Chinchilla)
    index_heads: int = 0  # sparse attention: heads of the indexer, 0 for none
    index_head_dim: int = 0
    index_top_k: int = 0

    @property
    def latent(self) -> bool:
        """Whether this is multi-head latent attention."""
        return self.kv_lora_rank is not None

    @property
    def query_dim(self) -> int:
        """Width of one head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.latent else self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of one head's value."""
        return self.v_head_dim or self.head_dim


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
    limited: bool = False  # values of both halves are clamped before the activation (gpt-oss)
    latent: int = (
        0  # the routed experts work at this width, between two projections (Nemotron-3 Super); 0: hidden
    )


@dataclass(frozen=True, slots=True)
class Ssm:
    """A selective state-space mixer: Mamba 1 or 2, or with ``delta`` a gated DeltaNet.

    Gated DeltaNet (arXiv:2412.06464) has Mamba-2's shape: ``heads`` values of ``inner / heads``, ``groups``
    keys of ``state_size``; in addition one write strength per head, and no skip connection D.
    """

    version: int
    inner: int  # expand * hidden
    state_size: int
    conv_kernel: int = 4
    dt_rank: int = 0  # Mamba 1
    heads: int = 0  # Mamba 2
    groups: int = 1  # Mamba 2
    bias: bool = False  # of the input and output projection
    conv_bias: bool = True
    gated_norm: bool = True  # Mamba 2: a norm of inner width before the output projection
    inner_norms: bool = False  # Mamba 1: norms on dt, B and C (Jamba)
    delta: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """One layer: mixers (attention, SSM, cross-attention), then MLP or MoE; absent parts are None."""

    attention: Attention | None = None
    cross_attention: Attention | None = None
    ssm: Ssm | None = None
    mlp: Mlp | None = None
    moe: Moe | None = None
    norm: str = (
        "rmsnorm"  # rmsnorm (weight) | layernorm (weight and bias) | layernorm_nobias | none (no parameters)
    )
    norms: int = 2  # norms of hidden width per block
    parallel: bool = False  # attention and MLP read the same norm (GPT-J, PaLM, Falcon)
    extra_parameters: int = 0  # weights that belong to none of the parts above


@dataclass(frozen=True, slots=True)
class Model:
    """A model: named block kinds, and ``layers``, their order as runs of (block name, repeat).

    ``encoder_layers`` (encoder–decoder models only) is the same for the encoder; for encoder-only models use
    ``layers``. All sizes in elements. ``published_parameters`` is the printed total (0 digits means that none
    was printed), ``exception`` why our count differs from it by more than 1 % and its printed digits.
    ``extras`` holds what a reader assumed or left out, as text by topic.
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
    encoder_tokens: bool = True  # the encoder looks its input up; false: features enter it (Whisper)
    tied_embeddings: bool = False
    learned_positions: int = 0  # rows of the learned position table
    extra_embedding_parameters: int = (
        0  # token types, embedding norm, patch or audio front end, embedding projections
    )
    final_norm: str = "rmsnorm"
    head: bool = True  # an output projection to the vocabulary (tied or not)
    head_bias: bool = False
    mtp_layers: int = 0  # multi-token-prediction modules beyond the counted layers
    mtp_modules: int = 0  # how many of them are trained with it; parameter counts leave them out all the same
    checkpoint: str = "bf16"  # number format of linear layers as published: a key of formats.KERNEL_FORMATS
    dropout: bool = False  # hidden and attention dropout are active in training
    published_parameters: float | None = None
    published_active_parameters: float | None = None
    published_digits: int = 0  # significant digits of published_parameters
    published_active_digits: int = 0
    exception: str = ""
    source: str = ""
    extras: Mapping[str, str] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        """Layers of the (decoder) stack."""
        return sum(repeat for _, repeat in self.layers)

    @property
    def ahead(self) -> Block:
        """The layer inside a multi-token-prediction module: one more of the last kind."""
        return self.blocks[self.layers[-1][0]]

    def layer_in(self, block: str) -> Block:
        """The layer inside a block of the ledger: of the encoder, or the one ahead behind the head."""
        return self.ahead if block == "head" else self.blocks[block.removeprefix("encoder.")]
