"""Experts in less than a bit per weight: ternary values, coded by a dictionary, decoded inside the product.

What it does: routed experts' weights are ternary, nine tenths of them zero, and stored as 16-bit words of a dictionary that stand
    for runs of values; a product of few tokens decodes its own rows. Everything else stays in 16 bits.
Saves: twenty times the memory of experts: 1.6e12 parameters in 160 GB.
Costs: no time is saved: decoding takes what reading 16-bit weights took (less than 5 % more, by its authors). Results change.
Assumes: 0.8 bits per weight, as its authors reach with the largest model (smaller ones compress less); time as in 16 bits.
Source: Frantar and Alistarh 2023 (QMoE, arXiv:2310.16795), abstract and section 4.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.ledger import Item, Ledger, Resident
from planner.technique import Check, Figure, Knob, ServingContext, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.runs import Pass
from planner.techniques.serving.weights.formats import store

_BITS = 0.8


def valid(ctx: ServingContext) -> Iterable[Check]:
    """Experts to compress."""
    experts = any(block.moe is not None for block in ctx.model.blocks.values())
    yield Check("sub-1-bit experts of a model without experts", experts)


def apply(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """Stores experts' weights in the dictionary's words; products are those of 16 bits."""

    def resident(item: Resident) -> Item | None:
        if item.pool != "parameters" or "expert" not in item.tags:
            return None
        return item.but(bytes_per_element=_BITS / 8.0, by=TECHNIQUE.key)

    return store(ledger, ctx, "", "", TECHNIQUE.key).edit(Resident, resident)


def _gigabytes(subject: Pass) -> float:
    """Gigabytes of 1.6e12 parameters, as those of Mixtral's experts are stored."""
    ledger = runs.run("weights", subject, model="mixtral-8x7b", weights="qmoe")
    stored = {i.bytes_per_element for i in ledger.of(Resident, pool="parameters") if "expert" in i.tags}
    return max(stored) * 1.6e12 / 1e9


TECHNIQUE = Technique(
    key="qmoe",
    name="QMoE sub-1-bit MoE compression",
    slot="weights",
    job="serving",
    choices=("qmoe",),
    source="arXiv:2310.16795",
    summary="Experts in 0.8 bits per weight, at the speed of 16",
    knobs=(Knob("weights", "number format of linear layers"),),
    figures=(
        Figure(
            "gigabytes of SwitchTransformer-c2048, 1.6e12 parameters at 0.8 bits",
            160.0,
            1e-9,
            "Frantar and Alistarh 2023 (arXiv:2310.16795), abstract: less than 160GB (20x compression, 0.8 bits per parameter)",
            _gigabytes,
        ),
    ),
    valid=valid,
    apply=apply,
)
