"""4-bit floating point: NVFP4 with 4-bit activations, MXFP4 weights under 16- or 8-bit activations.

What it does: networks (dense and expert) multiply 4-bit operands, or widen 4-bit weights on the way in.
Saves: weights' bytes by 3.6 (NVFP4, a scale per 16) or 3.8 (MXFP4, a scale per 32), and time on matrix units with the rate.
Costs: a kernel that quantises each product's input.
Assumes: in models with experts attention's projections stay in 16 bits, as published 4-bit checkpoints have them.
Source: OCP Microscaling Formats v1.0; NVIDIA Blackwell, 2025; nvidia/DeepSeek-R1-FP4 (hf_quant_config.json); openai/gpt-oss-120b.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.ledger import Ledger
from planner.specs.formats import KERNEL_FORMATS
from planner.technique import Check, Figure, Knob, ServingContext, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.runs import Pass
from planner.techniques.serving.weights.formats import store

_CHOICES = ("nvfp4", "w4a16_mxfp4", "w4a8_mxfp4_mxfp8")


def valid(ctx: ServingContext) -> Iterable[Check]:
    """The device must have the rate of what is multiplied."""
    device, dtype = ctx.cluster.device, KERNEL_FORMATS[str(ctx.knobs["weights"])].dtype
    yield Check(f"{device.name} has no {dtype} matrix rate", device.supports(dtype))


def apply(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """Switches dtypes by tag."""
    label = str(ctx.knobs["weights"])
    mixture = any(block.moe for block in ctx.model.blocks.values())
    return store(ledger, ctx, "" if mixture else label, label, "nvfp4_mxfp4")


def _checkpoint_gib(subject: Pass) -> float:
    """Weights of gpt-oss-120b, GiB."""
    ledger = runs.run("weights", subject, model="gpt-oss-120b", weights="w4a16_mxfp4")
    return runs.parameter_bytes(ledger) / 2**30


TECHNIQUE = Technique(
    key="nvfp4_mxfp4",
    name="NVFP4 / MXFP4 (W4A4 or W4A16)",
    slot="weights",
    job="serving",
    choices=_CHOICES,
    source="OCP Microscaling Formats v1.0; NVIDIA Blackwell, 2025",
    summary="4-bit floating-point weights with a scale per 16 or 32",
    knobs=(Knob("weights", "number format of linear layers"),),
    figures=(
        Figure(
            "GiB of the checkpoint of gpt-oss-120b",
            60.8,
            0.02,
            "OpenAI 2025, gpt-oss model card (arXiv:2508.10925), Table 1: checkpoint size 60.8 GiB",
            _checkpoint_gib,
        ),
    ),
    valid=valid,
    apply=apply,
)
