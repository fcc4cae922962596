"""Decentralised averaging (BAGUA, D-PSGD): every replica averages its weights with two neighbours on a ring, every step.

What it does: updates are local; the all-reduce of gradients gives way to an exchange of weights with two neighbours.
Saves: the all-reduce's many steps: two messages, whatever the number of replicas.
Costs: replicas whose weights differ.
Assumes: weights travel in the format in use; the exchange follows the update and is exposed; replicated states.
Source: Lian et al. 2017 (D-PSGD, arXiv:1705.09056); Gan et al. 2021 (BAGUA, arXiv:2107.01499) §3.2 (D_FP_S).
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.ledger import Collective, Item, Ledger, times
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.compression.narrow import replicated

_KEY = "neighbours"


def valid(ctx: Context) -> Iterable[Check]:
    """Weights of one's own."""
    yield Check(
        "averaging with neighbours needs replicated states (zero_stage=0)", ctx.knobs.get("zero_stage") == "0"
    )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Exchanges weights with two neighbours in place of the all-reduce."""

    def change(item: Collective) -> Item | None:
        if not {"data_parallel", "gradients"} <= item.tags:
            return None
        what = item.what.replace("gradients.all_reduce", "weights.exchange")
        return item.but(what=what, kind="point_to_point", size=times(item.size, "2"), dtype=ctx.format.activation, track="main",
            messages="1", by=_KEY,
        )  # fmt: skip

    return ledger.edit(Collective, change)


def _sent(subject: Pass) -> float:
    """Weights sent per parameter and step by one of 128 replicas."""
    ledger, _ = figures.run(
        "synchronisation", subject, model="bert-large", dp=128, zero_stage="0", synchronisation=_KEY
    )
    sent = figures.sent_elements(ledger, lambda i: i.kind == "point_to_point" and figures.between_replicas(i))
    return sent / figures.parameters(ledger)


TECHNIQUE = Technique(
    key=_KEY,
    name="Decentralised averaging with neighbours (BAGUA)",
    slot="synchronisation",
    choices=(_KEY,),
    source="arXiv:1705.09056",
    summary="Weights averaged with two neighbours every step",
    figures=(
        Figure(
            "models sent per step: one to each neighbour of the ring",
            2.0,
            1e-9,
            "Lian et al. 2017 (arXiv:1705.09056), section 3: communication on the busiest node is O(deg), 2 on a ring",
            _sent,
        ),
    ),
    needs=("staleness",),
    valid=valid,
    apply=apply,
    active=replicated,
)
