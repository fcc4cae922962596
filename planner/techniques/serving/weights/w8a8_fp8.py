"""FP8 weights and activations: one scale per tensor, per channel, or per block of 128.

What it does: linear layers and experts multiply fp8 operands; inputs are quantised before each product.
Saves: half of the weights' bytes, and time on matrix units that have the rate.
Costs: a kernel that quantises each product's input; under blocks, scales in fp32.
Assumes: attention, router, embedding and output projection stay in 16 bits.
Source: Micikevicius et al. 2022 (arXiv:2209.05433); blocks: DeepSeek-V3 (arXiv:2412.19437) §3.3.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.technique import Check, Figure, Knob, ServingContext, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.runs import Pass
from planner.techniques.serving.weights.formats import one_format


def valid(ctx: ServingContext) -> Iterable[Check]:
    """The device must have the rate."""
    device = ctx.cluster.device
    yield Check(f"{device.name} has no fp8 matrix rate", device.supports("fp8"))


def _weights_gb(subject: Pass) -> float:
    """Weights of DeepSeek-V3, GB."""
    return runs.parameter_bytes(runs.run("weights", subject, model="deepseek-v3", weights="fp8_block")) / 1e9


TECHNIQUE = Technique(
    key="w8a8_fp8",
    name="W8A8: SmoothQuant INT8, FP8 (E4M3), block-scaled FP8",
    slot="weights",
    job="serving",
    choices=("fp8", "fp8_block"),
    source="arXiv:2209.05433; arXiv:2412.19437",
    summary="Linear layers multiply fp8 operands",
    knobs=(Knob("weights", "number format of linear layers"),),
    figures=(
        Figure(
            "GB of the fp8 checkpoint of DeepSeek-V3 without its prediction module (671B parameters)",
            671.0,
            0.01,  # embedding and output projection are in 16 bits
            "deepseek-ai/DeepSeek-V3, README_WEIGHTS.md: 671B parameters of the main model, fp8",
            _weights_gb,
        ),
    ),
    valid=valid,
    apply=one_format("w8a8_fp8"),
)
