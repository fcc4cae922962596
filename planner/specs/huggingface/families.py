"""What a ``model_type`` implies and its config.json does not say: norms, biases, gates, tied embeddings.

Read off the modelling code of transformers 5 (one class per ``model_type``) or, for types that live on the
hub, the code beside the weights. A field is a fixed answer or the config key that gives it (see
:data:`fields.Rule`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from planner.specs.huggingface.fields import Rule

__all__ = ["FAMILIES", "INEXPRESSIBLE", "Family"]


@dataclass(frozen=True, slots=True)
class Family:
    """Conventions of one ``model_type``; the defaults are LLaMA's."""

    arch: str = "decoder"
    norm: str = "rmsnorm"
    final_norm: str = ""  # empty: as norm
    norms: int = 0  # per layer; 0: one before each part, one in all if parallel
    two_norms: Rule = False  # two norms although parallel
    parallel: Rule = False
    gated: Rule = True
    tied: bool = False  # where tie_word_embeddings is absent
    qkv_bias: Rule = False
    key_bias: bool = True
    out_bias: Rule = False
    mlp_bias: Rule = False
    head_bias: Rule = False
    qk_norm: Rule = False
    qk_norm_full: bool = False
    output_gate: bool = False
    sinks: Rule = False
    local_sinks: Rule = False
    learned_positions: int | None = None  # rows beyond max_seq_len; None: no table
    embedding_norm: Rule = False
    token_types: bool = False
    masked_lm_head: bool = False  # a dense layer and a norm before the tied projection
    moe_bias: bool = False
    router_bias: bool = False
    limited: bool = False
    shared_experts: int = 0  # always-on experts where the config gives no number
    shared_gate: bool = False
    moe_beside_mlp: bool = False
    window: Rule = True  # whether a window in the config is in use
    mixers: str = (
        ""  # pattern where the config gives none: G, L or M per layer, H for attention beside a mixer
    )
    mixer_only: bool = False  # layers have no network (Mamba)
    ssm: int = 0  # Mamba version
    ssm_bias: Rule = "mamba_proj_bias"
    ssm_conv_bias: Rule = "mamba_conv_bias?"
    ssm_norm: Rule = True
    ssm_inner_norms: bool = False
    delta: bool = False  # gated DeltaNet
    scalars: int = 0  # learned scalars of a layer


_LLAMA = Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
_QWEN3 = replace(_LLAMA, qk_norm=True, window="use_sliding_window")
_GPT2 = Family(
    norm="layernorm", gated=False, tied=True, qkv_bias=True, out_bias=True, mlp_bias=True, learned_positions=0
)  # fmt: skip
_DEEPSEEK = Family(qkv_bias="attention_bias", out_bias="attention_bias")
_GEMMA = Family(tied=True, qkv_bias="attention_bias", out_bias="attention_bias")
_GEMMA2 = replace(_GEMMA, norms=4, mixers="LG")
_GEMMA3 = replace(_GEMMA, norms=4, mixers="LLLLLG", qk_norm=True)
_GLM = Family(qkv_bias="attention_bias")
_GRANITE = replace(_LLAMA, tied=True)
_OLMO2 = replace(_LLAMA, qk_norm=True, qk_norm_full=True, mlp_bias=False)
_COHERE = Family(
    norm="layernorm_nobias", parallel=True, tied=True, qkv_bias="attention_bias", out_bias="attention_bias",
    qk_norm="use_qk_norm",
)  # fmt: skip
_BERT = replace(
    _GPT2, arch="encoder", final_norm="none", embedding_norm=True, token_types=True, masked_lm_head=True,
    head_bias=True
)  # fmt: skip
_MAMBA = Family(
    mixers="M", mixer_only=True, ssm=1, tied=True, ssm_bias="use_bias", ssm_conv_bias="use_conv_bias?"
)
_MAMBA2_HYBRID = replace(_LLAMA, ssm=2)
_QWEN3_NEXT = replace(_QWEN3, output_gate=True, shared_gate=True, delta=True, ssm=2, ssm_conv_bias=False)
_T5 = Family(arch="encoder-decoder", tied=True, gated=False)
_BART = replace(_GPT2, arch="encoder-decoder", learned_positions=2, embedding_norm=True, final_norm="none")
_PHIMOE = Family(
    norm="layernorm", qkv_bias="attention_bias", out_bias="attention_bias", head_bias="lm_head_bias"
)

FAMILIES: Mapping[str, Family] = {
    "apertus": replace(_LLAMA, gated=False, qk_norm=True, scalars=2),
    "arcee": replace(_LLAMA, gated=False),
    "baichuan": Family(),
    "bamba": replace(_MAMBA2_HYBRID, mixers="M"),
    "bart": _BART,
    "bert": _BERT,
    "bloom": replace(_GPT2, learned_positions=None, embedding_norm=True),
    "chatglm": Family(qkv_bias="add_qkv_bias", out_bias="add_bias_linear", mlp_bias="add_bias_linear"),
    "codegen": Family(norm="layernorm", parallel=True, gated=False, mlp_bias=True, head_bias=True),
    "cohere": _COHERE,
    "cohere2": replace(_COHERE, mixers="LLLG", qk_norm=False),
    "dbrx": Family(norm="layernorm_nobias"),
    "deepseek": _DEEPSEEK,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "distilbert": replace(_BERT, token_types=False),
    "dots1": replace(_DEEPSEEK, qk_norm=True),
    "ernie4_5": Family(tied=True, qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias"),
    "ernie4_5_moe": Family(
        tied=True, qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", router_bias=True
    ),
    "exaone4": replace(_LLAMA, qk_norm=True, mlp_bias=False, mixers="LLLG"),
    "falcon": Family(
        norm="layernorm", parallel="parallel_attn?", two_norms="new_decoder_architecture", gated=False,
        tied=True, qkv_bias="bias", out_bias="bias", mlp_bias="bias",
    ),
    "falcon_h1": replace(_MAMBA2_HYBRID, mixers="H", ssm_norm="mamba_rms_norm", out_bias="attention_bias"),
    "falcon_mamba": _MAMBA,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "glm": _GLM,
    "glm4": replace(_GLM, norms=4),
    "glm4_moe": replace(_GLM, qk_norm="use_qk_norm"),
    "glm_moe_dsa": _DEEPSEEK,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": replace(_GPT2, qkv_bias=False, mixers="GL"),
    "gpt_neox": Family(
        norm="layernorm", parallel="use_parallel_residual?", two_norms=True, gated=False,
        qkv_bias="attention_bias?", out_bias="attention_bias?", mlp_bias=True,
    ),
    "gpt_oss": Family(
        qkv_bias=True, out_bias=True, sinks=True, local_sinks=True, moe_bias=True, router_bias=True,
        limited=True, mixers="LG",
    ),
    "gptj": Family(norm="layernorm", parallel=True, gated=False, mlp_bias=True, head_bias=True),
    "granite": _GRANITE,
    "granitemoe": replace(_GRANITE, mlp_bias=False),
    "granitemoehybrid": replace(_GRANITE, ssm=2, mlp_bias=False),
    "helium": replace(_LLAMA, out_bias=False),
    "internlm2": Family(qkv_bias="bias", out_bias="bias"),
    "jamba": Family(ssm=1, ssm_inner_norms=True),
    "kimi_k2": _DEEPSEEK,
    "llama": _LLAMA,
    "llama4_text": replace(_LLAMA, mlp_bias=False, shared_experts=1, mixers="LLLG"),
    "mamba": _MAMBA,
    "mamba2": replace(_MAMBA, ssm=2, tied=False),
    "mbart": replace(_BART, final_norm="layernorm"),
    "mimo": Family(qkv_bias="attention_bias?", window="use_sliding_window"),
    "mimo_v2_flash": replace(
        _DEEPSEEK, out_bias=False, sinks="add_full_attention_sink_bias",
        local_sinks="add_swa_attention_sink_bias?"
    ),
    "minimax_m2": Family(qk_norm="use_qk_norm?", qk_norm_full=True),
    "ministral": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "mpt": Family(norm="layernorm_nobias", gated=False, tied=True),
    "mt5": replace(_T5, gated=True),
    "nemotron": Family(
        norm="layernorm", gated=False, qkv_bias="attention_bias", out_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "nemotron_h": replace(_LLAMA, gated=False, ssm=2, ssm_bias="use_bias", ssm_conv_bias="use_conv_bias?"),
    "olmo": Family(norm="none", qkv_bias="attention_bias", out_bias="attention_bias"),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, mixers="LLLG"),
    "olmoe": _OLMO2,
    "opt": replace(_GPT2, learned_positions=2),
    "phi": Family(
        norm="layernorm", parallel=True, gated=False, qkv_bias=True, out_bias=True, mlp_bias=True,
        head_bias=True,
    ),
    "phi3": Family(),
    "phimoe": _PHIMOE,
    "qwen2": Family(qkv_bias=True, window="use_sliding_window"),
    "qwen2_moe": Family(qkv_bias="qkv_bias?", shared_gate=True, window="use_sliding_window"),
    "qwen3": _QWEN3,
    "qwen3_5_moe_text": _QWEN3_NEXT,
    "qwen3_5_text": _QWEN3_NEXT,
    "qwen3_moe": _QWEN3,
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_vl_moe_text": _QWEN3,
    "qwen3_vl_text": _QWEN3,
    "roberta": _BERT,
    "seed_oss": replace(_LLAMA, qkv_bias="attention_bias?", out_bias="attention_out_bias"),
    "smollm3": replace(_LLAMA, tied=True, window="use_sliding_window"),
    "stablelm": Family(norm="layernorm", parallel="use_parallel_residual", qkv_bias="use_qkv_bias"),
    "starcoder2": Family(
        norm="layernorm", gated=False, tied=True, qkv_bias="use_bias?", out_bias="use_bias?",
        mlp_bias="use_bias?",
    ),
    "switch_transformers": _T5,
    "t5": _T5,
    "vit": replace(_GPT2, arch="vision", qkv_bias="qkv_bias?", learned_positions=1),
    "whisper": replace(
        _BART, learned_positions=0, embedding_norm=False, final_norm="layernorm", key_bias=False
    ),
    "xlm-roberta": _BERT,
}  # fmt: skip

INEXPRESSIBLE: Mapping[str, str] = {
    "albert": "layers that share one set of weights",
    "deepseek_ref": "compressed sparse attention and hyper-connections",
    "deepseek_v4": "compressed sparse attention and hyper-connections",
    "electra": "embeddings narrower than the layers",
    "gemma3n_text": "per-layer embeddings and nested feed-forward widths",
    "gemma4_text": "keys used as values, and experts beside a dense network",
    "kimi_k3": "Kimi delta attention",
    "kimi_linear": "Kimi delta attention",
    "lfm2": "short convolutions as mixers",
    "lfm2_moe": "short convolutions as mixers",
    "minimax": "lightning attention",
    "minimax_m3": "block-sparse attention with its own indexer",
    "minimax_m3_text": "block-sparse attention with its own indexer",
    "minimax_m3_vl": "block-sparse attention with its own indexer",
    "modernbert": "a first layer without attention norm",
    "nemotron-nas": "layers that each have their own width",
    "rwkv": "RWKV time mixing",
    "step3p7": "head-wise gates and per-layer attention groups",
    "step3p7_text": "head-wise gates and per-layer attention groups",
    "zamba2": "layers that share one set of weights",
}
"""Model types that our description cannot express, and why: an honest refusal beats a wrong count."""
