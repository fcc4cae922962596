"""PipeDream: 1F1B without a flush; every micro-batch is a step of its own, on the weights that its forward saw.

What it does: stage i runs min(p−i, m) micro-batches ahead and updates after each backward; a stash keeps the weights that each
    micro-batch in flight has been forwarded with, for its backward.
Saves: the bubble: a step takes as long as its slowest stage.
Costs: p−i versions of the weights on stage i; gradients are p−1−i updates late (another algorithm: --allow staleness).
Assumes: gradients of a step are summed over the data-parallel ranks once, after its micro-batches, and nothing hides it; the global
    norm of gradients is not clipped across stages.
Source: Narayanan et al. 2019 (PipeDream, SOSP, doi:10.1145/3341301.3359646) §3.2–3.3; memory as in arXiv:2006.09503, Figure 1.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.ledger import Item, Ledger, Resident
from planner.schedule.order import ORDERS, Generator
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.training.schedule.rules import needs_whole_weights

ORDER = replace(ORDERS["1f1b"], name="pipedream", barrier=False, flushes=False, bound_s=None)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """A version of the weights for each micro-batch in flight, where there was one for all."""

    def stash(item: Resident) -> Item | None:
        if item.pool != "parameters" or item.lifetime != "always" or item.tier != "device":
            return None
        return replace(item, what=f"{item.what}.stash", lifetime="micro_batch", tags=item.tags - {"saved"}, by="pipedream")

    return ledger.edit(Resident, stash)


def _versions(order: Generator | str) -> float:
    """Weight versions on the first of 8 stages."""
    return figures.in_flight(order, 8, 32) if getattr(order, "flushes", True) is False else 1.0


TECHNIQUE = Technique(
    key="pipedream",
    name="PipeDream",
    slot="schedule",
    choices=("pipedream",),
    source="doi:10.1145/3341301.3359646",
    summary="1F1B without a flush, with a stash of weight versions",
    figures=(
        Figure(
            "weight versions on the first of d = 8 stages: d",
            8.0,
            1e-9,
            "Narayanan et al. 2021 (arXiv:2006.09503), section 2: PipeDream stashes up to d versions",
            _versions,
        ),
    ),
    valid=needs_whole_weights,
    apply=apply,
    order=ORDER,
    searched=False,
    needs=("staleness",),
    active=lambda ctx: ctx.mesh.pp > 1,
)
