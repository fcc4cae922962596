"""FlashAttention: softmax(QKᵀ)V in one kernel that never writes the score matrix.

What it does: replaces the eager score, softmax, dropout and context kernels by one fused forward and one fused backward.
Saves: the a·s² activations (5as²b bytes per layer with dropout), their traffic, and the masked half of the products of a
    causal mask.
Costs: the backward computes the scores again: 5 products instead of 4; a log-sum-exp of 4 bytes per query and head is kept,
    and the 16-bit output beside the quantised one that the next product keeps under fp8.
Assumes: blocks that the mask hides are skipped; dropout is applied inside the kernel from a seed.
Source: Dao et al. 2022 (arXiv:2205.14135); Dao 2023 (arXiv:2307.08691).
"""

from __future__ import annotations

from typing import Any

from planner.costs.precision import dtype_bytes
from planner.ledger import AttentionCore, Item, Ledger, Matmul, Phase, Resident
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass

_BACKWARD_PASSES = 2.5  # products: scores again, then the gradients of V, P, Q and K, against two forward


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Swaps the eager core of every attention for the fused kernels."""
    passes: list[tuple[Phase, float]] = [("forward", 1.0)]
    if any(item.phase == "backward" for item in ledger.items):
        passes.append(("backward", _BACKWARD_PASSES))
    added: list[Item] = []
    for scores in ledger.of(Matmul, phase="forward"):
        if not scores.what.endswith(".scores"):
            continue
        region = scores.what.removesuffix(".scores")
        suffix = f"@{scores.block}" + (".cross" if region == "cross" else "")
        batch, heads = scores.groups.split("*")
        latent, own_v_dim = (f"{axis}{suffix}" in ledger.axes for axis in ("kv_rank", "v_dim"))
        common: dict[str, Any] = {
            "block": scores.block,
            "tags": frozenset({"core_attn"}),
            "by": "flash_attention",
            "source": "arXiv:2307.08691",
        }
        added += [
            AttentionCore(
                what=f"{region}.core", phase=phase, dtype=ctx.format.core, batch=batch, heads=heads, q=scores.m, kv=scores.n,
                kv_heads=heads if latent else f"kv_heads{suffix}", qk_dim=scores.k,
                v_dim=f"v_dim{suffix}" if own_v_dim else scores.k,
                visible="1" if region == "cross" else f"visible@{scores.block}", passes=work, **common,
            )
            for phase, work in passes
        ]  # fmt: skip
        if len(passes) > 1:
            added.append(
                Resident(
                    what=f"{region}.log_sum_exp", size=f"{batch}*{heads}*{scores.m}", bytes_per_element=4.0, pool="activations",
                    lifetime="micro_batch", **common | {"tags": frozenset({"saved", "core_attn"})},
                )
            )  # fmt: skip

    def output(item: Resident) -> Item | None:
        # The fused backward reads the output itself, which a quantised copy for the next product cannot replace.
        if not item.what.endswith(".core_output") or ctx.format.block == 1:
            return None
        both = dtype_bytes(ctx.format.activation) + item.bytes_per_element
        return item.but(bytes_per_element=both, by="flash_attention")

    eager = ledger.drop(lambda item: "core_attn" in item.tags and not item.what.endswith(".core_output"))
    return eager.edit(Resident, output).add(added)


def _products(subject: Pass) -> float:
    """FLOP of the attention core, forward and backward, relative to the eager forward."""
    ledger, _ = figures.run(
        "attention_kernel", subject, model="bert-large", seq=512, attention_kernel="flash"
    )
    return figures.flop(ledger, "forward", "backward", where=lambda item: "core_attn" in item.tags) / (
        4 * 512**2 * 1024
    )


TECHNIQUE = Technique(
    key="flash_attention",
    name="FlashAttention",
    slot="attention_kernel",
    choices=("flash",),
    default=True,
    source="arXiv:2205.14135",
    summary="Fused attention without the score matrix",
    figures=(
        Figure(
            "FLOP of forward and backward, in forwards: 2 and 5 products",
            3.5,
            1e-9,
            "Dao 2023 (arXiv:2307.08691), section 4.1",
            _products,
        ),
    ),
    apply=apply,
)
