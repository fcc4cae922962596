"""Multi-head latent attention generates on the latent: up-projections are absorbed into queries and outputs.

What it does: a generating sequence multiplies its queries by the keys' up-projection, attends to the cached latent as if all
    heads shared one key, and multiplies the result by the values' up-projection. Prompts keep per-head keys.
Saves: the up-projection of every cached token, at every step; per-head keys and values are never read.
Costs: two small products per head and token; scores over the latent's width instead of a head's.
Assumes: the latent is whole on every tensor rank; absorbed products run in 16 bits.
Source: DeepSeek-V2 (arXiv:2405.04434) §2.1.2; DeepSeek-V3's inference code (absorbed form).
"""

from __future__ import annotations

from typing import Any

from planner.ledger import AttentionCore, Item, Ledger, Matmul
from planner.technique import Figure, Knob, ServingContext, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.runs import Pass

_LABEL = {"bf16": "bfloat16", "fp16": "float16"}


def apply(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """Rewrites generation in blocks with latent attention."""
    latent = {
        name: block.attention
        for name, block in ctx.model.blocks.items()
        if block.attention is not None and block.attention.latent
    }
    if not latent:
        return ledger
    sizes = {
        name: float(value)
        for block, spec in latent.items()
        for name, value in (
            (f"nope@{block}", spec.qk_nope_head_dim),
            (f"latent_key@{block}", (spec.kv_lora_rank or 0) + spec.qk_rope_head_dim),
        )
    }
    added: list[Item] = []
    for block in latent:
        common: dict[str, Any] = {
            "block": block, "tags": frozenset({"gemm", "qkv", "absorbed"}), "by": "mla", "m": "decodes*step_tokens",
            "groups": f"heads@{block}", "dtype": ctx.format.activation, "format": _LABEL[ctx.format.activation],
        }  # fmt: skip
        added += [
            Matmul(what="attention.absorb_query", n=f"kv_rank@{block}", k=f"nope@{block}", **common),
            Matmul(what="attention.absorb_value", n=f"v_dim@{block}", k=f"kv_rank@{block}", **common),
        ]

    def product(item: Matmul) -> Item | None:
        return item.but(m="prefill_tokens", by="mla") if item.what == "attention.kv_up" else None

    def core(item: AttentionCore) -> Item | None:
        if not item.decode or item.block not in latent:
            return None
        return item.but(
            kv_heads="1",
            qk_dim=f"latent_key@{item.block}",
            v_dim=f"kv_rank@{item.block}",
            latent=True,
            by="mla",
        )

    return ledger.set_axes(**sizes).edit(Matmul, product).edit(AttentionCore, core).add(added)


def _read_bytes(subject: Pass) -> float:
    """Bytes that one generating sequence of DeepSeek-V3 reads per token of context."""
    return runs.read_bytes_per_token("latent", subject, "deepseek-v3")


TECHNIQUE = Technique(
    key="mla",
    name="Multi-head latent attention (DeepSeek-V2/V3)",
    slot="latent",
    job="serving",
    choices=("absorbed",),
    default=True,
    source="arXiv:2405.04434",
    summary="Latent attention generates on the cached latent itself",
    knobs=(Knob("latent", "how latent attention generates", ("absorbed",)),),
    figures=(
        Figure(
            "bytes that a step of DeepSeek-V3 reads per token of context",
            70272.0,
            1e-9,
            "Zhao et al. 2025 (arXiv:2505.09343), Table 1: 70.272 KB per token",
            _read_bytes,
        ),
    ),
    apply=apply,
)
