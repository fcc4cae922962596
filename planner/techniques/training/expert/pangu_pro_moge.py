"""Grouped experts (Pangu Pro MoE): a token chooses as many experts from every group, and a rank holds whole groups.

What it does: experts are dealt to ep groups, and the router takes top_k/ep of each: every expert rank works on as many tokens.
Saves: the wait for the busiest rank, however unlike the experts of a group are.
Costs: nothing; the router is another one, and the model trains as one of its own.
Assumes: as many groups as expert ranks, or a multiple.
Source: Tang et al. 2025 (Pangu Pro MoE, arXiv:2505.21411) §2.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from planner.ledger import Ledger, Matmul
from planner.specs.workload import TrainWorkload
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.expert import moe_folding

_KEY = "pangu_pro_moge"


def valid(ctx: Context) -> Iterable[Check]:
    """As many experts of every group for each token."""
    yield from moe_folding.valid(ctx)
    for block in ctx.model.blocks.values():
        if block.moe is not None:
            yield Check("top-k not divisible among the groups of experts", block.moe.top_k % ctx.mesh.ep == 0)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Deals the experts evenly loaded."""
    even = replace(ctx.workload, expert_zipf=0.0, expert_load_factor=1.0)
    return moe_folding.folded(ledger, replace(ctx, workload=even), _KEY)


def _busiest(subject: Pass) -> float:
    """Rows of the busiest rank's experts over an even share, experts as unlike as 1/j."""
    skewed = TrainWorkload(global_batch_size=8, seq_len=2048, expert_zipf=1.0)
    ledger, ctx = figures.run(
        "expert", lambda plain, ctx: subject(plain, replace(ctx, workload=skewed)), model="deepseek-v3", dp=8, ep=8,
        expert="grouped", attention_kernel="flash",
    )  # fmt: skip
    moe = next(block.moe for block in ctx.model.blocks.values() if block.moe)
    product = next(item for item in ledger.of(Matmul, phase="forward") if item.what == "moe.fc1")
    rows = float((ledger.axes[product.m] * ledger.axes[product.groups]).flat[0])
    per_rank = 2048.0 * moe.top_k
    return rows / per_rank if any(item.by == _KEY for item in ledger.items) else 0.0


TECHNIQUE = Technique(
    key=_KEY,
    name="Grouped experts (Pangu Pro MoE)",
    slot="expert",
    choices=("grouped",),
    searched=False,
    asked=True,  # another router
    source="arXiv:2505.21411",
    summary="A token chooses as many experts of every rank",
    figures=(
        Figure(
            "tokens of the busiest of 8 ranks relative to the mean: an imbalance of none",
            1.0,
            1e-9,
            "Tang et al. 2025 (arXiv:2505.21411), section 2.1: imbalance score 0 for grouped experts",
            _busiest,
        ),
    ),
    valid=valid,
    apply=apply,
)
