"""Mixed-precision training: fp16 or bf16 products over fp32 master weights (fp32 and tf32 for comparison).

What it does: products multiply in a 16-bit format; weights in use and activations are 16 bits wide; the optimizer keeps fp32
    master weights, and gradients are accumulated in fp32 (``gradient_dtype`` narrows them).
Saves: activation and communication bytes (half of fp32), and time on the matrix units.
Costs: 4 bytes of master weights per parameter.
Assumes: norms, softmax and residuals read and write 16 bits; logits and loss are fp32; the loss scaling of fp16
    is undone by one more pass over the gradients, before they are clipped.
Source: Micikevicius et al. 2018 (arXiv:1710.03740).
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.ledger import Ledger
from planner.technique import Check, Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.precision.dtypes import switch_dtypes


def valid(ctx: Context) -> Iterable[Check]:
    """The device must have the rate."""
    device, dtype = ctx.cluster.device, ctx.format.matmul
    yield Check(f"{device.name} has no {dtype} matrix rate", device.supports(dtype))


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Switches dtypes by tag and adds master weights."""
    return switch_dtypes(ledger, ctx, "mixed_precision")


def _state_bytes(subject: Pass) -> float:
    """Bytes per parameter of GPT-3 175B under Adam."""
    ledger, _ = figures.run("precision", subject, precision="bf16", model="gpt3-175b", optimizer="adamw")
    return figures.held_bytes(ledger) / figures.parameters(ledger)


def _activation_bytes(subject: Pass) -> float:
    """Bytes saved per layer in units of sbh."""
    ledger, _ = figures.run("precision", subject, precision="fp16", model="gpt3-175b", seq=2048)
    return figures.saved_bytes(ledger) / (2048 * 12288)


TECHNIQUE = Technique(
    key="mixed_precision",
    name="Mixed-precision training",
    slot="precision",
    choices=("bf16", "fp16", "fp32", "tf32"),
    default=True,
    source="arXiv:1710.03740",
    summary="16-bit products over fp32 master weights",
    knobs=(
        Knob(
            "precision",
            "format of matrix products",
            ("bf16", "fp16", "fp32", "tf32", "fp8", "fp8_rowwise", "mxfp8", "nvfp4"),
            "bf16",
        ),
        Knob("gradient_dtype", "dtype of accumulated gradients", ("fp32", "bf16", "fp16"), "fp32"),
    ),
    figures=(
        Figure(
            "bytes of weights, fp32 gradients and Adam states per parameter",
            18.0,
            1e-6,
            "Megatron-LM megatron/training/theoretical_memory_usage.py",
            _state_bytes,
        ),
        Figure(
            "bytes saved per layer of GPT-3 175B, in sbh: 34 + 5as/h",
            34 + 5 * 96 * 2048 / 12288,
            1e-6,
            "Korthikanti et al. 2022 (arXiv:2205.05198), Table 2",
            _activation_bytes,
        ),
    ),
    valid=valid,
    apply=apply,
)
