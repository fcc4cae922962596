"""PipeDream: 1F1B without a flush; every micro-batch is an update of its own, on the weights that its forward saw.

What it does: stage i runs p−i micro-batches ahead and updates its weights after each backward; a stash keeps the weights
    that every micro-batch in flight was forwarded with, for its backward.
Saves: the bubble: a micro-batch takes as long as its slowest stage.
Costs: p−i versions of the weights on stage i; an update and a gradient reduction per micro-batch, beside its backward;
    gradients are p−1−i updates late (another algorithm: --allow staleness).
Assumes: the batch of an update is a micro-batch of every data-parallel rank, and the job's global batch so many updates;
    the norm of gradients is not clipped across stages.
Source: Narayanan et al. 2019 (PipeDream, SOSP, doi:10.1145/3341301.3359646) §3.2, §3.3; Narayanan et al. 2021
    (arXiv:2006.09503) §2.
"""

from __future__ import annotations

from dataclasses import replace

from planner.ledger import Item, Ledger, Resident
from planner.schedule.order import ORDERS
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.schedule.rules import accepts

ORDER = replace(ORDERS["1f1b"], name="pipedream", barrier=False, flushes=False, bound_s=None)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """A version of the weights for each micro-batch in flight, where they live, and an update with each backward."""

    def stash(item: Item) -> Item | None:
        if isinstance(item, Resident):
            if (item.pool, item.lifetime) != ("parameters", "always"):
                return None
            return item.but(what=f"{item.what}.stash", lifetime="micro_batch", by="pipedream")
        return item.but(phase="backward", by="pipedream") if item.phase == "step" else None

    return ledger.edit(Item, stash)


def _versions(subject: Pass) -> float:
    """Weights of GPT-2 XL that a stage holds per micro-batch in flight, in copies."""
    ledger, _ = figures.run("schedule", subject, model="gpt2-xl", schedule="pipedream", pp=8)
    stashed = ledger.of(Resident, pool="parameters", lifetime="micro_batch")
    whole = figures.parameters(ledger) * 2.0
    return figures.total_bytes(ledger, stashed) / whole * figures.in_flight("1f1b", 8, 32)


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
            "Narayanan et al. 2021 (arXiv:2006.09503), section 2: PipeDream maintains up to d weight versions",
            _versions,
            of_pass=True,
        ),
    ),
    valid=accepts(ORDER, copies=True),
    apply=apply,
    order=ORDER,
    searched=False,
    needs=("staleness",),
    saves=True,  # an update in the backward hides where the host is slower than the device
    active=lambda ctx: ctx.mesh.pp > 1,
)
