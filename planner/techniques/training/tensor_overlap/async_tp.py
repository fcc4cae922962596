"""Tensor-parallel communication overlap: a collective and the product beside it are cut into chunks that pipeline.

What it does: all-gather → product and product → reduce-scatter pairs run as tp chunks on two streams.
Saves: all but one chunk of the shorter of the two.
Costs: the product at 1/tp of its rows (its efficiency is that of the smaller product); launches × tp.
Assumes: one pair per gather or scatter; sequence parallelism (Megatron's requirement).
Source: Wang et al. 2023 (ASPLOS); Megatron ``--tp-comm-overlap``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from planner.ledger import Collective, Item, Ledger, Matmul
from planner.technique import Check, Context, Knob, Technique


def valid(ctx: Context) -> Iterable[Check]:
    """Only sequence-parallel collectives can be cut along the sequence."""
    yield Check(
        "tensor-parallel overlap needs sequence parallelism",
        (ctx.mesh.tp == 1) | (ctx.knobs["sequence_parallel"] == "true"),
    )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Pairs each gather or scatter with the product of its operator, in one window of tp chunks."""
    paired: dict[int, str] = {}
    partner: set[int] = set()
    products = ledger.of(Matmul)
    chunks = ledger.chunks
    for item in ledger.of(Collective):
        if not item.tags & {"tp_gather", "tp_scatter"} or item.block in ("embedding",):
            continue
        operator = item.what.rsplit(".", 1)[0]
        product = next(
            (
                p
                for p in products
                if p.what == operator
                and p.block == item.block
                and p.phase == item.phase
                and id(p) not in partner
            ),
            None,
        )
        if product is None:
            continue
        window = f"async.{item.what}.{item.block}.{item.phase}"
        paired[id(item)] = paired[id(product)] = window
        partner.add(id(product))
        chunks = {**chunks, window: ctx.mesh.tp}
    items: list[Item] = []
    for item in ledger.items:
        window = paired.get(id(item), "")
        if not window:
            items.append(item)
        elif isinstance(item, Collective):
            items.append(replace(item, window=window, track="tp", by="async_tp"))
        else:
            items.append(replace(item, window=window))
    return replace(ledger, items=tuple(items), chunks=chunks)


TECHNIQUE = Technique(
    key="async_tp",
    name="Tensor-parallel communication overlap",
    slot="tensor_overlap",
    choices=("chunked",),
    source="doi:10.1145/3567955.3567959",
    summary="Gathers and scatters pipelined with the product beside them",
    knobs=(
        Knob("tensor_overlap", "how tensor-parallel communication is hidden", ("none", "chunked"), "none"),
    ),
    valid=valid,
    apply=apply,
    active=lambda ctx: ctx.mesh.tp > 1,
)
