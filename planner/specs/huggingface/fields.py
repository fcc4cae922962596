"""Typed look-ups in a config.json, where one quantity has many names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from planner.errors import Problem

__all__ = ["NAMES", "Fields", "Rule"]

Rule = bool | str
"""A fixed answer, or the config key that gives it: ``"key"`` (absent: false) or ``"key?"`` (absent: true)."""

# The names of each quantity, first match first.
NAMES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    "encoder_layers": ("encoder_layers", "num_layers"),
    "decoder_layers": ("decoder_layers", "num_decoder_layers", "num_layers", "num_hidden_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "n_embed", "dim"),
    "vocab": ("vocab_size", "padded_vocab_size"),
    "max_seq_len": (
        "max_position_embeddings",
        "n_positions",
        "max_target_positions",
        "seq_length",
        "max_sequence_length",
        "max_seq_len",
        "n_ctx",
    ),
    "ffn": (
        "intermediate_size_mlp",
        "shared_intermediate_size",
        "dense_intermediate_size",
        "intermediate_size",
        "n_inner",
        "decoder_ffn_dim",
        "ffn_dim",
        "ffn_hidden_size",
        "d_ff",
        "hidden_dim",
    ),
    "encoder_ffn": ("encoder_ffn_dim", "d_ff", "intermediate_size"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"),
    "encoder_heads": ("encoder_attention_heads", "num_heads", "num_attention_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "kv_n_heads"),
    "head_dim": ("head_dim", "attention_head_dim", "kv_channels", "d_kv"),
    "window": ("sliding_window", "attention_chunk_size", "window_size"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_k"),
    "expert_ffn": ("moe_intermediate_size", "intermediate_size", "ffn_hidden_size", "d_ff"),
    "shared_experts": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "shared_ffn": (
        "moe_shared_expert_intermediate_size",
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
    ),
    "first_dense": ("first_k_dense_replace", "moe_layer_start_index"),
    "moe_every": ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval"),
    "mtp_layers": ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules"),
    "ssm_state": ("ssm_state_size", "mamba_d_state", "state_size", "linear_key_head_dim"),
    "ssm_conv": ("mamba_d_conv", "conv_kernel", "linear_conv_kernel_dim"),
    "ssm_expand": ("mamba_expand", "expand"),
    "ssm_rank": ("mamba_dt_rank", "time_step_rank"),
    "ssm_heads": ("mamba_num_heads", "mamba_n_heads", "linear_num_value_heads", "num_heads"),
    "ssm_head_dim": ("mamba_head_dim", "mamba_d_head", "linear_value_head_dim", "head_dim"),
    "ssm_groups": ("mamba_n_groups", "n_groups", "linear_num_key_heads"),
}
_MAX_SIZE = 10**9
_REQUIRED: Any = object()


class Fields:
    """One config, with all its problems collected.

    Args:
        config: the part of the file that describes the language model.
        where: the file that problems name.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where
        self.problems: list[Problem] = []

    def size(
        self, quantity: str, default: Any = _REQUIRED, *, minimum: int = 1, first: Iterable[str] = ()
    ) -> Any:
        """A positive whole number under any of its names; ``first`` are names to try before."""
        names = (*first, *NAMES.get(quantity, (quantity,)))
        for name in names:
            value = self.config.get(name)
            if value is None or value == "auto":
                continue
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if not isinstance(value, int) or isinstance(value, bool):
                self.problem(name, f"{value!r:.80} ({type(value).__name__})", "a whole number")
            elif not minimum <= value <= _MAX_SIZE:
                self.problem(name, f"{value}", f"a whole number from {minimum} to {_MAX_SIZE:g}")
            else:
                return value
            return minimum if default is _REQUIRED else default
        if default is _REQUIRED:
            self.problem(
                NAMES.get(quantity, (quantity,))[0],
                "is missing",
                f"a whole number under one of the names {', '.join(names)}",
            )
            return 1
        return default

    def rule(self, rule: Rule) -> bool:
        """The answer of a rule for this config."""
        if isinstance(rule, bool):
            return rule
        name, default = rule.removesuffix("?"), rule.endswith("?")
        value = self.config.get(name, default)
        if not isinstance(value, bool | int | None):
            self.problem(name, f"{value!r:.80} ({type(value).__name__})", "true or false")
            return default
        return bool(value)

    def row(self, name: str) -> list[Any] | None:
        """A non-empty list, if the config has one under this name."""
        value = self.config.get(name)
        return value if isinstance(value, list) and value else None

    def text(self, name: str) -> str:
        """A string, or the empty string."""
        value = self.config.get(name)
        return value if isinstance(value, str) else ""

    def problem(self, key: str, found: str, expected: str = "", try_: str = "") -> None:
        """Notes a problem at ``key``."""
        self.problems.append(Problem(f"{self.where}: {key}", found, expected, try_))
