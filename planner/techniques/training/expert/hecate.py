"""Sparse copies of experts (Hecate's FSSDP): the most popular experts are gathered beside the work before them.

What it does: before a layer's experts work, the weights of the n most popular ones (``sparse1``, ``sparse4``) are gathered by
    all expert ranks beside the layer's attention, and their gradients are scattered back beside the backward's.
Saves: as FasterMoE's shadows, the exchange of these experts' tokens and the wait for their owners; and the wait for the copies,
    as far as attention hides them.
Costs: a sparse all-gather and reduce-scatter of n of E experts, λ = n/E of all, per layer and micro-batch; weights and
    gradients of these experts while the layer is at work.
Assumes: as FasterMoE; expert states are sharded over their replicas by ``zero_stage``, as other states are.
Source: Qing et al. 2025 (Hecate, arXiv:2502.02581) §4.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.ledger import Ledger
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.expert.fastermoe import copied, copies_checks
from planner.techniques.training.expert.load import popular

_KEY = "hecate_fssdp"
_COUNTS = {f"sparse{count}": count for count in (1, 4)}


def valid(ctx: Context) -> Iterable[Check]:
    """Experts that differ, on ranks that share them."""
    yield from copies_checks(ctx, _COUNTS[ctx.knobs["expert"]])


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Deals the experts, gathers the popular ones beside other work."""
    return copied(ledger, ctx, _COUNTS[ctx.knobs["expert"]], _KEY, "experts")


def _sparse(subject: Pass) -> float:
    """Elements gathered beside other work per layer of Mixtral, four of eight experts copied, over those of all its experts."""
    ledger, ctx = figures.run(
        "expert", subject, model="mixtral-8x7b", dp=8, ep=8, expert="sparse4", attention_kernel="flash"
    )
    moe = next(block.moe for block in ctx.model.blocks.values() if block.moe)
    gathered = figures.sent_elements(ledger, lambda i: i.track == "experts" and i.phase == "forward")
    return gathered / (3 * moe.experts * ctx.model.hidden * moe.expert_ffn)


TECHNIQUE = Technique(
    key=_KEY,
    name="Sparse copies of experts (Hecate, FSSDP)",
    slot="expert",
    choices=tuple(_COUNTS),
    searched=False,  # for routers that leave experts uneven: the job has to say so
    source="arXiv:2502.02581",
    summary="The most popular experts gathered beside attention",
    figures=(
        Figure(
            "volume of a sparse all-gather of λ = 4/8 of the experts, over the whole: λS",
            0.5,
            1e-6,
            "Qing et al. 2025 (arXiv:2502.02581), section 4: SparseAllGather moves at most λS",
            _sparse,
        ),
    ),
    valid=valid,
    apply=apply,
    active=lambda ctx: (ctx.mesh.ep > 1) & (popular(ctx) > 0),
)
