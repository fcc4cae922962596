"""LOMO and AdaLomo: every weight is updated inside the backward, as soon as its gradient is there.

What it does: fuses SGD's update (LOMO), or one with a factored second moment (AdaLomo), with the weight gradient's kernel; the
    gradient is dropped at once.
Saves: gradients, master weights and moments: 2 bytes per parameter remain, and the largest gradient tensor of a block.
Costs: no gradient accumulation, no pipeline, no clipping by the global norm (which would take a second backward).
Assumes: clipping by value (LOMO) or by the norm of each update (AdaLomo, whose update reads the gradient twice); gradients
    travel in ``gradient_dtype``.
Source: Lv et al. 2024 (LOMO, arXiv:2306.09782) §3; Lv et al. 2024 (AdaLomo, arXiv:2310.10195) §3.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.ledger import Ledger
from planner.technique import Check, Context, Figure, Technique
from planner.techniques.figures import Pass
from planner.techniques.training.optimizer.adafactor import factored
from planner.techniques.training.optimizer.update import state_bytes, update_in_backward


def valid(ctx: Context) -> Iterable[Check]:
    """The first gradient must be the last one, and no later micro-batch may meet changed weights."""
    yield Check("an update inside the backward needs one micro-batch per step", ctx.micro_batches == 1)
    yield Check("an update inside the backward needs pp = 1", ctx.mesh.pp == 1)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Moves the update into the backward; nothing but weights is held."""
    return update_in_backward(ledger, ctx, "lomo")


def apply_adaptive(ledger: Ledger, ctx: Context) -> Ledger:
    """The same, with a second moment per row and column."""
    ledger = update_in_backward(ledger, ctx, "adalomo", passes=2.0)
    return ledger.add(factored(ledger, "adalomo"))


def _shard_gb(subject: Pass) -> float:
    """Model states of 65e9 parameters on each of 8 devices that share them."""
    return 65.0 / 8 * state_bytes(subject, "lomo")


def _adaptive_share(subject: Pass) -> float:
    """Model states of AdaLomo, over those of mixed-precision AdamW (16 bytes)."""
    return state_bytes(subject, "adalomo") / 16.0


TECHNIQUES = (
    Technique(
        key="lomo",
        name="LOMO (update inside the backward)",
        slot="optimizer",
        choices=("lomo",),
        source="arXiv:2306.09782",
        summary="SGD fused with the weight gradient: neither gradients nor states are held",
        figures=(
            Figure(
                "GB of 16-bit weights of a 65B model on each of 8 devices with 24 GB, and nothing else held",
                16.25,
                1e-6,
                "Lv et al. 2024 (arXiv:2306.09782), section 3.1 and abstract: 65B on 8 × RTX 3090; 2 bytes · 65e9 / 8",
                _shard_gb,
            ),
        ),
        valid=valid,
        apply=apply,
    ),
    Technique(
        key="adalomo",
        name="AdaLomo (adaptive update inside the backward)",
        slot="optimizer",
        choices=("adalomo",),
        source="arXiv:2310.10195",
        summary="LOMO with second moments per row and column",
        figures=(
            Figure(
                "model states relative to AdamW in mixed precision: 2M + O(M/n) of 16M",
                2.0 / 16.0,
                5e-3,  # the rows and columns are a quarter of a percent
                "Lv et al. 2024 (arXiv:2310.10195), section 3.1: factored second moment, memory as LOMO's",
                _adaptive_share,
            ),
        ),
        valid=valid,
        apply=apply_adaptive,
    ),
)
