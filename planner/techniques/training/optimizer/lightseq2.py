"""LightSeq2's trainer: AdamW on the 16-bit weights themselves, widened in registers while the update runs.

What it does: as AdamW, without fp32 copies of weights and gradients: the update reads 16-bit ones, computes in fp32, and stores
    the weights in 16 bits again. Its fused kernels are those of every operator here (``elementwise_kernel=eager``: without).
Saves: 4 bytes of master weights per parameter, and their traffic; gradients are 16-bit ones (``gradient_dtype``).
Costs: what an update loses where it is smaller than a 16-bit weight can tell, which is not priced.
Assumes: as AdamW.
Source: Wang et al. 2022 (LightSeq2, SC, arXiv:2110.05722) §3.2; fairseq has the same as ``--memory-efficient-fp16``.
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.technique import Context, Figure, Technique
from planner.techniques.training.optimizer.update import state_bytes, update


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Adds moments, gradient clipping and an update of the weights in use."""
    return update(ledger, ctx, "lightseq2")


TECHNIQUE = Technique(
    key="lightseq2",
    name="LightSeq2 (AdamW on 16-bit weights)",
    slot="optimizer",
    choices=("adamw_16bit",),
    source="arXiv:2110.05722",
    summary="AdamW without wide copies of weights and gradients",
    figures=(
        Figure(
            "bytes per parameter that the optimizer holds: fp32 moments, and no fp32 copy of the weights",
            8.0,
            1e-9,
            "github.com/bytedance/lightseq @a7ab0da, lightseq/training/ops/pytorch/adam.py: the state of LSAdam.step",
            lambda subject: state_bytes(subject, "adamw_16bit", "optimizer"),
        ),
    ),
    apply=apply,
)
