"""AdamW and SGD: fp32 moments beside fp32 master weights.

What it does: adds moments, one update kernel per block and step, and clipping, which reads gradients for their global norm and
    scales them.
Saves: nothing.
Costs: 4 bytes per parameter and moment (AdamW two, SGD with momentum one), and the update's traffic: weights, master weights
    and moments are read and written, gradients read. Where the stack updates from a copy of 16-bit gradients in fp32, copying
    and zeroing them, clipping four bytes in place of two, and a pass of its own from master weights to those in use.
Assumes: element-wise updates are one fused kernel at memory bandwidth.
Source: Loshchilov, Hutter 2019 (AdamW, arXiv:1711.05101).
"""

from __future__ import annotations

from planner.costs.optimizer import KNOWN_OPTIMIZERS
from planner.ledger import Ledger
from planner.technique import Context, Figure, Knob, Technique
from planner.techniques.training.optimizer.update import state_bytes, update


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Adds moments, gradient clipping and update."""
    return update(ledger, ctx, "optimizer_bytes")


TECHNIQUE = Technique(
    key="optimizer_bytes",
    name="Optimizer states and update (AdamW, SGD)",
    slot="optimizer",
    choices=("adamw", "sgd", "sgd_momentum"),
    default=True,
    source="arXiv:1711.05101",
    summary="fp32 moments per parameter and the traffic of the update",
    knobs=(Knob("optimizer", "optimizer family", tuple(KNOWN_OPTIMIZERS), "adamw"),),
    figures=(
        Figure(
            "bytes of Adam states per parameter: fp32 master, momentum, variance",
            12.0,
            1e-6,
            "Rajbhandari et al. 2020 (arXiv:1910.02054), section 3.1",
            lambda subject: state_bytes(subject, "adamw", "optimizer"),
        ),
    ),
    apply=apply,
)
