"""Domino: a micro-batch runs as two independent slices, so that all-reduces of one hide behind the work of the other.

What it does: every product runs on half of the sequences at a time; the tensor-parallel collectives of a layer run beside its
    other work, half a layer behind.
Saves: half of the shorter of both, and whatever of the other half the work outlasts.
Costs: products on half of the rows each; compute and communication share the device while they overlap.
Assumes: slices of the batch, whose sequences are independent through the whole layer; weight gradients run beside nothing.
Source: Wang et al. 2024 (Domino, arXiv:2409.15241) §3.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planner.ledger import Collective, Item, Kernel, Ledger, Matmul, times
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass

_KEY = "domino"
_SLICES = 2.0
_ENDS = ("embedding", "head", "boundary")
_REDUCED = {"tp_reduce", "tp_gather", "tp_scatter"}


def valid(ctx: Context) -> Iterable[Check]:
    """Two slices of whole sequences."""
    alone = ctx.mesh.tp == 1
    yield Check(
        "slices of a micro-batch need an even number of sequences",
        alone | (ctx.micro_batch_size % _SLICES == 0),
    )
    yield Check(
        "slices of a micro-batch are for column- and row-parallel products (tensor=1d)",
        ctx.knobs["tensor"] == "1d",
    )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Halves the rows of every product; one window per layer and phase, work on one track, collectives on the other."""
    cut = np.where(ctx.mesh.tp > 1, _SLICES, 1.0)
    windows: set[str] = set()

    def beside(item: Item) -> Item | None:
        if item.block in _ENDS or item.phase not in ("forward", "backward") or item.window:
            return None
        window = f"{_KEY}.{item.block}.{item.phase}"
        if isinstance(item, Collective) and item.tags & _REDUCED:
            windows.add(window)
            return item.but(window=window, track="tp", by=_KEY)
        if isinstance(item, Matmul) and item.track == "main":
            return item.but(window=window, m=times(item.m, "/slices"), groups=times(item.groups, "slices"))
        return item.but(window=window) if isinstance(item, Kernel) and item.track == "main" else None

    ledger = ledger.set_axes(slices=cut).edit(Item, beside)
    for window in windows:
        ledger = ledger.cut(window, cut)
    return ledger


def _exposed(subject: Pass) -> float:
    """What is exposed of collectives that take as long as the work beside them, of their length."""
    from planner.costs.overlap import pipelined_s

    ledger, _ = figures.run(
        "tensor_overlap", subject, model="llama3-8b", tp=8, micro_batch_size=2, tensor_overlap=_KEY
    )
    reduce = next(
        item
        for item in ledger.of(Collective, phase="forward")
        if item.tags & _REDUCED and item.block == "dense"
    )
    chunks = float(np.ravel(ledger.chunks[reduce.window])[0]) if reduce.window else 1.0
    return float(pipelined_s([1.0, 1.0], chunks)) - 1.0


TECHNIQUE = Technique(
    key=_KEY,
    name="Domino (two slices of a micro-batch)",
    slot="tensor_overlap",
    choices=(_KEY,),
    searched=False,  # chunks of one product hide as much with sequence parallelism, and cost no rows
    source="arXiv:2409.15241",
    summary="Collectives of one slice beside the work of the other",
    figures=(
        Figure(
            "exposed share of all-reduces as long as the work, with two slices: 1/n",
            0.5,
            1e-9,
            "Wang et al. 2024 (arXiv:2409.15241), section 3: of n slices, all but one slice's communication overlaps",
            _exposed,
        ),
    ),
    valid=valid,
    apply=apply,
    active=lambda ctx: ctx.mesh.tp > 1,
)
