"""Lion: the sign of a momentum is the update, so that one moment is all it keeps.

What it does: as AdamW, with one moment and no variance.
Saves: 4 bytes of Adam's 8 per parameter, and their traffic.
Costs: nothing beside the update's own traffic.
Assumes: momentum and master weights in fp32.
Source: Chen et al. 2023 (arXiv:2302.06675), Algorithm 2.
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.technique import Context, Figure, Technique
from planner.techniques.training.optimizer.update import state_bytes, update


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Adds one moment, gradient norm and update."""
    return update(ledger, ctx, "lion")


TECHNIQUE = Technique(
    key="lion",
    name="Lion",
    slot="optimizer",
    choices=("lion",),
    source="arXiv:2302.06675",
    summary="One moment; the update is its sign",
    figures=(
        Figure(
            "bytes per parameter: fp32 master weights and momentum",
            8.0,
            1e-9,
            "Chen et al. 2023 (arXiv:2302.06675), Algorithm 2: the state is m alone",
            lambda subject: state_bytes(subject, "lion", "optimizer"),
        ),
    ),
    apply=apply,
)
