"""FlashAttention: softmax(QKᵀ)V in one kernel that never writes the score matrix.

What it does: replaces the eager score, softmax, dropout and context kernels by one fused forward and one fused backward.
Saves: the a·s² activations (5as²b bytes per layer with dropout), their traffic, and the masked half of the products of a
    causal mask.
Costs: the backward computes the scores again: 5 products instead of 4; a log-sum-exp of 4 bytes per query and head is kept.
Assumes: blocks that the mask hides are skipped; dropout is applied inside the kernel from a seed.
Source: Dao et al. 2022 (arXiv:2205.14135); Dao 2023 (arXiv:2307.08691).
"""

from __future__ import annotations

from planner.ledger import AttentionCore, Item, Ledger, Matmul, Resident
from planner.technique import Context, Technique


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Swaps the eager core of every attention for the fused kernels."""
    added: list[Item] = []
    for scores in ledger.of(Matmul, phase="forward"):
        if not scores.what.endswith(".scores"):
            continue
        region = scores.what.removesuffix(".scores")
        suffix = f"@{scores.block}" + (".cross" if region == "cross" else "")
        batch, heads = scores.groups.split("*")
        latent = f"v_dim{suffix}" in ledger.axes
        kv_heads = heads if latent else f"kv_heads{suffix}"
        for phase, passes in (("forward", 1.0), ("backward", 2.5)):
            if phase == "backward" and not ledger.of(
                Matmul, what=scores.what, block=scores.block, phase="backward"
            ):
                continue
            added.append(
                AttentionCore(
                    what=f"{region}.core", block=scores.block, phase=phase, tags=frozenset({"core_attn"}),  # type: ignore[arg-type]
                    by="flash_attention", source="arXiv:2307.08691", dtype=ctx.format.activation, batch=batch, heads=heads,
                    kv_heads=kv_heads, q=scores.m, kv=scores.n, qk_dim=scores.k, v_dim=f"v_dim{suffix}" if latent else scores.k,
                    visible=f"visible@{scores.block}" if region != "cross" else "1", passes=passes,
                )
            )  # fmt: skip
        added.append(
            Resident(
                what=f"{region}.log_sum_exp", block=scores.block, tags=frozenset({"saved", "core_attn"}), by="flash_attention",
                size=f"{batch}*{heads}*{scores.m}", bytes_per_element=4.0, pool="activations", lifetime="micro_batch",
            )
        )  # fmt: skip
    eager = ledger.drop(lambda item: "core_attn" in item.tags and not item.what.endswith(".core_output"))
    return eager.add(added)


TECHNIQUE = Technique(
    key="flash_attention",
    name="FlashAttention",
    slot="attention_kernel",
    choices=("flash",),
    default=True,
    source="arXiv:2205.14135",
    summary="Fused attention without the score matrix",
    apply=apply,
)
