"""Selective recomputation: run cheap, memory-hungry modules again in the backward.

What it does: drops the tensors that the chosen modules produce and copies those modules' forward to the backward.
Saves: ``core_attn``: 5as²b bytes of eager attention (nothing under a fused kernel); ``norm``: the norms' outputs;
    ``act``: the input of the second feed-forward product; ``mlp``: everything inside the feed-forward network.
Costs: the modules' forward, their activation collectives included.
Assumes: a module's input is kept, or produced by a module that is recomputed as well.
Source: Korthikanti et al. 2022 (arXiv:2205.05198) §5; Megatron ``--recompute-modules``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.ledger import Collective, Item, Ledger, Resident
from planner.technique import Context, Technique

MODULES = {
    "selective": ("core_attn",),
    "norm": ("norm",),
    "act": ("mlp_act", "moe_act", "shared_expert_act"),
    "norm+act": ("norm", "mlp_act", "moe_act", "shared_expert_act"),
    "mlp": ("mlp", "moe", "shared_expert", "dispatch", "combine"),
}


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Drops what the modules produce, copies their forward."""
    modules = frozenset(MODULES[ctx.knobs["recompute"]])

    def again(item: Item) -> bool:
        moves_weights = isinstance(item, Collective) and "data_parallel" in item.tags
        gathers_norm = (
            isinstance(item, Collective) and "tp_gather" in item.tags and "core_attn" not in item.tags
        )
        inside = bool(item.tags & modules) and item.block not in ("head", "embedding")
        return (
            item.phase == "forward"
            and inside
            and not moves_weights
            and not (gathers_norm and modules <= {"norm"})
        )

    def drop(item: Resident) -> Item | None:
        if "saved" not in item.tags or not item.tags & modules or item.block in ("head", "embedding"):
            return None
        if item.what.endswith(".core_output"):  # the module's result, which the next product needs
            return None
        return replace(item, lifetime="recomputed", by="selective_recompute")

    return ledger.copy_to_phase(again, "recompute", "selective_recompute").edit(Resident, drop)


def _helps(ctx: Context) -> np.ndarray | bool:
    """Recomputing the attention core saves nothing under a fused kernel."""
    return not (ctx.knobs["recompute"] == "selective" and ctx.knobs.get("attention_kernel") != "eager")


TECHNIQUE = Technique(
    key="selective_recompute",
    name="Selective recomputation",
    slot="recompute",
    choices=tuple(MODULES),
    source="arXiv:2205.05198",
    summary="Chosen modules run forward again",
    apply=apply,
    active=_helps,
)
