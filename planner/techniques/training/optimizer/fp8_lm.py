"""FP8-LM's optimizer: first moment in 8 bits, second moment and master weights in 16.

What it does: AdamW on an fp16 master copy with per-tensor scales, an fp8 first and an fp16 second moment. The paper's levels are
    choices of three knobs: ``precision=fp8`` multiplies in fp8, ``gradient_dtype=fp8`` keeps and reduces gradients in fp8,
    ``optimizer=adamw_fp8`` narrows the states.
Saves: 7 of 12 bytes of optimizer states per parameter; with fp8 gradients, 6 of 16 bytes remain beside the weights in use.
Costs: nothing beside the update's traffic; scales are per tensor.
Assumes: a device with fp8 products; rescaling of gradients before their reduction is fused with it.
Source: Peng et al. 2023 (FP8-LM, arXiv:2310.18313) §2.1, §2.2; MS-AMP optimization levels O1, O2.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.ledger import Ledger, Resident
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.optimizer.update import update


def valid(ctx: Context) -> Iterable[Check]:
    """The device must know the format."""
    device = ctx.cluster.device
    yield Check(f"{device.name} has no fp8 matrix rate", device.supports("fp8"))


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Adds narrow moments, narrows the master weights."""
    return update(ledger, ctx, "fp8_lm")


def _saved(subject: Pass) -> float:
    """Share of the moments' memory that the narrow ones save, relative to fp32."""
    ledger, _ = figures.run(
        "optimizer", subject, model="gpt2-xl", optimizer="adamw_fp8", cluster="h100-sxm:1x8"
    )
    held = [item for item in ledger.of(Resident, pool="optimizer") if item.what.endswith("moments")]
    return 100.0 * (1.0 - figures.total_bytes(ledger, held) / (8.0 * figures.parameters(ledger)))


TECHNIQUE = Technique(
    key="fp8_lm",
    name="FP8-LM (8-bit gradients and optimizer states)",
    slot="optimizer",
    choices=("adamw_fp8",),
    source="arXiv:2310.18313",
    summary="AdamW with an fp8 first moment, fp16 second moment and master weights",
    figures=(
        Figure(
            "memory of the moments saved, %: an fp8 first and an fp16 second one in place of two in fp32",
            62.5,
            1e-6,
            "MS-AMP documentation, Optimization Level, O2: up to 62.5 % of the optimizer's memory",
            _saved,
        ),
    ),
    valid=valid,
    apply=apply,
)
