"""Weights in 16 bits, as most models are published.

What it does: every product multiplies 16-bit operands; weights are held in 16 bits.
Saves: nothing; it is what other formats are compared with.
Costs: 2 bytes per weight, read once per iteration.
Assumes: activations and all that is no linear layer have 16 bits under every format.
Source: the models' published checkpoints.
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.technique import Figure, Knob, ServingContext, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.runs import Pass
from planner.techniques.serving.weights.formats import store


def apply(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """Switches dtypes by tag."""
    return store(ledger, ctx, "", "", "sixteen_bit")


def _weights_gb(subject: Pass) -> float:
    """Weights of Llama-2 70B on two devices, GB each."""
    return runs.parameter_bytes(runs.run("weights", subject, model="llama2-70b", tp=2)) / 1e9


TECHNIQUE = Technique(
    key="sixteen_bit",
    name="16-bit weights",
    slot="weights",
    job="serving",
    choices=("bf16", "fp16"),
    default=True,
    source="published checkpoints",
    summary="2 bytes per weight",
    knobs=(Knob("weights", "number format of linear layers"),),
    figures=(
        Figure(
            "GB of 70B parameters in 16 bits on each of 2 devices",
            70.0,
            0.02,  # 68.98e9 parameters
            "Touvron et al. 2023 (arXiv:2307.09288): 70B parameters, 2 bytes each, halved",
            _weights_gb,
        ),
    ),
    apply=apply,
)
