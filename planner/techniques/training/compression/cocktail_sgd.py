"""CocktailSGD: of a random part of every gradient only the largest elements travel, in few bits, while the next step runs.

What it does: a share of the elements is sampled, the largest of them are kept and quantised; parts are averaged by the rank
    that serves them, compressed again, and returned. The average is applied one step late.
Saves: nearly all bytes of the gradients' all-reduce, and the wait for the rest unless it takes longer than a step.
Costs: two passes over the gradients; the weights that were last agreed on and what compression left out, two fp32 copies;
    updates one step late, and lossy.
Assumes: a sampled element costs a bit of the mask, a kept one its quantised value; scales of blocks are neglected.
Source: Wang et al. 2023 (CocktailSGD, ICML 2023) §3; DS3Lab/CocktailSGD ``data_parallel/dist_dp_cocktail_sgd.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from planner.costs.precision import dtype_bytes
from planner.ledger import Collective, Item, Ledger, Resident, Stream, times
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.compression.narrow import replicated

_KEY = "cocktail_sgd"
_SAMPLED, _KEPT, _BITS = 0.4, 0.5, 4  # of the repository's example of pre-training
_ELEMENT_BITS = _SAMPLED * (_KEPT * _BITS + 1.0)


def valid(ctx: Context) -> Iterable[Check]:
    """Replicated gradients."""
    yield Check(
        "sampled gradients need gradients that are all-reduced (zero_stage=0)",
        ctx.knobs.get("zero_stage") == "0",
    )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shrinks the gradients' all-reduce and spreads it over the next step's work."""
    added: list[Item] = []

    def shrink(item: Collective) -> Item | None:
        if not {"data_parallel", "gradients"} <= item.tags:
            return None
        small = item.but(size=times(item.size, "cocktail_share"), dtype="int8", by=_KEY)
        added.append(
            Stream(
                what=f"{item.what}.sample", block=item.block, phase="step", tags=frozenset({"compression"}), by=_KEY,
                size=item.size, bytes_per_element=2.0 * dtype_bytes(item.dtype),
            )
        )  # fmt: skip
        if item.phase == "step":
            part = replace(small, size=times(small.size, "/cocktail_parts"), track="outer")
            added.append(replace(part, phase="forward"))
            return replace(part, phase="backward")
        return small

    ledger = ledger.set_axes(cocktail_share=_ELEMENT_BITS / 8.0, cocktail_parts=2.0 * ctx.micro_batches)
    copies = [
        replace(
            held, what=f"{held.what}.{what}", by=_KEY, pool="buffers", bytes_per_element=dtype_bytes("fp32")
        )
        for held in ledger.of(Resident, pool="gradients", lifetime="always")
        for what in ("agreed", "error")
    ]
    return ledger.edit(Collective, shrink).add([*added, *copies])


def _bits(subject: Pass) -> float:
    """Bits sent per parameter and pass of an all-reduce between 8 ranks."""
    ledger, ctx = figures.run(
        "compression", subject, model="gpt2", dp=8, zero_stage="0", compression="cocktail"
    )
    micro_batches = float(ctx.micro_batches[0])
    sent = sum(
        figures.sent_bytes(ledger, lambda i, p=phase: figures.between_replicas(i) and i.phase == p)  # type: ignore[misc]
        * (1.0 if phase == "step" else micro_batches)
        for phase in ("forward", "backward", "step")
    )
    return 8.0 * sent / (2 * 7 / 8 * figures.parameters(ledger))


TECHNIQUE = Technique(
    key=_KEY,
    name="CocktailSGD (sampled, sparse, quantised, late)",
    slot="compression",
    choices=("cocktail",),
    source="ICML 2023 (Wang et al.)",
    summary="The largest of sampled gradients in few bits, one step late",
    figures=(
        Figure(
            "bits per gradient: 0.4 of the elements sampled, a mask bit each, half of them kept in 4 bits",
            1.2,
            1e-6,
            "DS3Lab/CocktailSGD, example_scripts/pretrain_opt125m_cocktail_5btok.sh: RANDOMP_RATIO, TOPK_RATIO, QUANT_BITS",
            _bits,
        ),
    ),
    needs=("lossy", "staleness"),
    valid=valid,
    apply=apply,
    active=replicated,
)
