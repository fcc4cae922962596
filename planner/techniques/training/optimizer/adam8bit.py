"""8-bit Adam: both moments are stored in 8 bits, with one fp32 scale per block of 2048.

What it does: the update widens a block's moments, changes them in fp32, and stores them in 8 bits again.
Saves: 6 bytes per parameter of Adam's 8, and their traffic.
Costs: nothing beside the update's own traffic: widening happens in registers.
Assumes: all moments are narrow; bitsandbytes keeps those of embeddings wide.
Source: Dettmers et al. 2022 (arXiv:2110.02861) §2.
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.technique import Context, Figure, Technique
from planner.techniques.training.optimizer.update import state_bytes, update


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Adds narrow moments, gradient norm and update."""
    return update(ledger, ctx, "adam8bit")


TECHNIQUE = Technique(
    key="adam8bit",
    name="8-bit Adam",
    slot="optimizer",
    choices=("adam8bit",),
    source="arXiv:2110.02861",
    summary="Adam's moments in 8 bits, a scale per 2048 of them",
    figures=(
        Figure(
            "bytes per parameter: fp32 master weights, and two moments of 8 bits and 1/2048 of an fp32 scale",
            4.0 + 2.0 * (1.0 + 4.0 / 2048.0),
            1e-9,
            "Dettmers et al. 2022 (arXiv:2110.02861), section 2: 8-bit states in blocks of B = 2048",
            lambda subject: state_bytes(subject, "adam8bit", "optimizer"),
        ),
    ),
    apply=apply,
)
