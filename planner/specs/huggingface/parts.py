"""The parts of a layer (attention, MLP, experts, state-space mixer) from a config.json."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from planner.specs.huggingface.families import Family
from planner.specs.huggingface.fields import Fields
from planner.specs.model import Attention, Block, Mlp, Moe, Ssm

__all__ = ["Parts"]


class Parts:
    """Builds the parts of one config, each once."""

    def __init__(self, fields: Fields, family: Family, hidden: int) -> None:
        self.fields = fields
        self.family = family
        self.hidden = hidden
        self.moe = self._moe()

    def block(self, mixer: str, network: str, shared_index: bool = False) -> Block:
        """The layer of these letters (see :mod:`pattern`); ``shared_index``: an earlier layer's indexer."""
        family = self.family
        attention = self.attention(local=mixer == "L") if mixer in "GLH" else None
        if attention is not None and shared_index:
            attention = replace(attention, index_heads=0, index_head_dim=0)
        moe = self.moe if network == "E" else None
        beside = network == "E" and family.moe_beside_mlp
        mlp = self.mlp() if network == "D" or beside else None
        return Block(
            attention=attention,
            ssm=self.ssm() if mixer in "MH" else None,
            mlp=mlp,
            moe=moe,
            norm=family.norm,
            norms=self.norms(2 if mixer.strip() and network.strip() else 1),
            parallel=self.fields.rule(family.parallel),
            extra_parameters=family.scalars,
        )

    def norms(self, parts: int) -> int:
        """Norms of a layer: as the family has them, else one before each part, or one in all if parallel."""
        if self.family.norms:
            return self.family.norms
        if self.fields.rule(self.family.parallel):
            # Falcon-2 has the new architecture with a single norm, and a key of its own for that.
            return int(
                self.fields.size(
                    "num_ln_in_parallel_attn", 2 if self.fields.rule(self.family.two_norms) else 1
                )
            )
        return parts

    # -- attention -----------------------------------------------------------------------------------------

    def attention(self, *, local: bool = False) -> Attention:
        """Self-attention; ``local`` layers may have sizes of their own (MiMo-V2)."""
        fields, family = self.fields, self.family
        own = "swa_" if local else "global_"
        heads = fields.size("heads", first=(f"{own}num_attention_heads",))
        common: dict[str, Any] = {
            "causal": family.arch == "decoder",
            "qkv_bias": fields.rule(family.qkv_bias),
            "key_bias": family.key_bias,
            "out_bias": fields.rule(family.out_bias),
            "window": fields.size("window") if local else None,
            "sinks": fields.rule(family.local_sinks if local else family.sinks),
        }
        if fields.config.get("kv_lora_rank") is not None:
            return self._latent_attention(heads, common)
        head_dim = fields.size("head_dim", None, first=(f"{own}head_dim",))
        if head_dim is None:
            if self.hidden % heads:
                fields.problem(
                    "num_attention_heads",
                    f"{heads} does not divide {self.hidden}",
                    "a divisor of hidden_size",
                )
            head_dim = max(1, self.hidden // heads)
        return Attention(
            heads,
            self._kv_heads(heads, own),
            head_dim,
            v_head_dim=fields.size("v_head_dim", 0, first=(f"{own}v_head_dim",)),
            qk_norm=fields.rule(family.qk_norm),
            qk_norm_full=family.qk_norm_full,
            output_gate=family.output_gate,
            **common,
        )

    def _kv_heads(self, heads: int, own: str) -> int:
        config = self.fields.config
        # Falcon and StarCoder say by a flag that there is a single one, but not in the new architecture.
        if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
            return 1
        return int(self.fields.size("kv_heads", heads, first=(f"{own}num_key_value_heads",)))

    def _latent_attention(self, heads: int, common: dict[str, Any]) -> Attention:
        fields = self.fields
        nope, rope = fields.size("qk_nope_head_dim"), fields.size("qk_rope_head_dim")
        indexed = fields.config.get("index_n_heads") is not None
        return Attention(
            heads,
            heads,
            nope + rope,
            q_lora_rank=fields.size("q_lora_rank", None, minimum=0) or None,
            kv_lora_rank=fields.size("kv_lora_rank"),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
            v_head_dim=fields.size("v_head_dim"),
            index_heads=fields.size("index_n_heads") if indexed else 0,
            index_head_dim=fields.size("index_head_dim") if indexed else 0,
            index_top_k=fields.size("index_topk") if indexed else 0,
            **common,
        )

    # -- networks ------------------------------------------------------------------------------------------

    def mlp(self, quantity: str = "ffn") -> Mlp:
        """The dense network; its width is four times the hidden width where the config gives none."""
        width = self.fields.size(quantity, None)
        if width is None:
            width = self.fields.size("expansion_ratio", 4) * self.hidden
        return Mlp(width, self.gated(), self.fields.rule(self.family.mlp_bias))

    def gated(self) -> bool:
        """Whether networks have a gate; T5 says so by name."""
        projection = self.fields.text("feed_forward_proj")
        return projection.startswith("gated") if projection else self.fields.rule(self.family.gated)

    def _moe(self) -> Moe | None:
        fields, family = self.fields, self.family
        experts = fields.size("experts", 0, minimum=0)
        if experts < 2:
            return None
        width = fields.size("expert_ffn")
        shared = fields.size("shared_ffn", None, minimum=0)
        if shared is None:
            shared = fields.size("shared_experts", family.shared_experts, minimum=0) * width
        return Moe(
            experts,
            fields.size("top_k", 1 if family.arch == "encoder-decoder" else None) or self._no_top_k(),
            width,
            shared_ffn=shared,
            gated=self.gated(),
            bias=family.moe_bias,
            shared_gate=family.shared_gate and shared > 0,
            router_bias=family.router_bias,
            limited=family.limited,
            latent=fields.size("moe_latent_size", 0, minimum=0),
        )

    def _no_top_k(self) -> int:
        self.fields.problem("num_experts_per_tok", "is missing", "how many experts each token takes")
        return 1

    # -- state-space mixers --------------------------------------------------------------------------------

    def ssm(self) -> Ssm:
        """The state-space mixer of this family (a Mamba-1 one in an unknown family)."""
        fields, family = self.fields, self.family
        state, kernel = fields.size("ssm_state", 16), fields.size("ssm_conv", 4)
        expanded = fields.size("ssm_expand", 2) * self.hidden
        common: dict[str, Any] = {
            "bias": fields.rule(family.ssm_bias),
            "conv_bias": fields.rule(family.ssm_conv_bias),
        }
        if family.ssm == 2:
            heads = fields.size("ssm_heads")
            inner = fields.size("mamba_d_ssm", heads * fields.size("ssm_head_dim"))
            norm = fields.rule(family.ssm_norm)
            groups = fields.size("ssm_groups", 1)
            own = {"heads": heads, "groups": groups, "gated_norm": norm, "delta": family.delta}
            return Ssm(2, inner, state, kernel, **own, **common)
        rank = fields.size("ssm_rank", -(-self.hidden // 16))
        return Ssm(1, expanded, state, kernel, dt_rank=rank, inner_norms=family.ssm_inner_norms, **common)
