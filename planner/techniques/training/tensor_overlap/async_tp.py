"""Tensor-parallel communication overlap: a collective and the product beside it are cut into chunks that pipeline.

What it does: all-gather → product and product → reduce-scatter pairs run as tp chunks on two streams.
Saves: all but one chunk of the shorter of the two; where a stack copies what it gathers, that copy.
Costs: compute and communication share the device while they overlap; where a stack copies what it scatters, a sum of tp parts.
Assumes: one pair per gather or scatter; a chunk of a product runs as efficiently as the whole; sequence parallelism
    (Megatron's requirement). Gathers before products of one scale per row stay apart: PyTorch does not find them
    (pytorch/pytorch#149990, open as of 2026).
Source: Wang et al. 2023 (ASPLOS, doi:10.1145/3567955.3567959); Megatron ``--tp-comm-overlap``; PyTorch asynchronous TP
    (``torch/distributed/_symmetric_memory``: a reduction of the stacked parts).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from planner.costs.precision import dtype_bytes
from planner.ledger import Array, Collective, Item, Ledger, Matmul, Resident, Stream, times
from planner.technique import Check, Context, Figure, Knob, Technique, off
from planner.techniques import figures
from planner.techniques.figures import Pass

_PAIRED = {"tp_gather", "tp_scatter"}


def valid(ctx: Context) -> Iterable[Check]:
    """Only sequence-parallel collectives can be cut along the sequence."""
    apart = (ctx.mesh.tp == 1) | (ctx.knobs["sequence_parallel"] != off("sequence_parallel"))
    yield Check("tensor-parallel overlap needs sequence parallelism", apart)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Pairs each gather or scatter with the product of its operator, in one window of tp chunks."""
    products = {(item.block, item.phase, item.what): item for item in ledger.of(Matmul)}
    chunks: dict[str, Array] = {}
    changed: dict[int, Item] = {}
    paired = _PAIRED - ({"tp_gather"} if ctx.knobs["precision"] == "fp8_rowwise" else set())
    for item in ledger.of(Collective):
        operator = item.what.rpartition(".")[0]
        product = products.pop((item.block, item.phase, operator), None) if item.tags & paired else None
        if product is not None:
            window = f"async.{item.block}.{item.phase}.{operator}"
            chunks[window] = ctx.mesh.tp
            changed[id(item)] = item.but(window=window, track="tp", by="async_tp")
            changed[id(product)] = product.but(window=window)
    copied = {
        (item.block, item.phase, f"{item.what}.copy"): item
        for item in changed.values()
        if isinstance(item, Collective)
    }

    def without_copies() -> Iterator[Item]:
        symmetric = {
            (item.block, f"{item.what}.recorded") for item in copied.values()
        }  # no allocator's memory
        for item in ledger.items:
            if isinstance(item, Resident) and (item.block, item.what) in symmetric:
                continue
            of = copied.get((item.block, item.phase, item.what))
            if of is None or not isinstance(item, Stream):
                yield changed.get(id(item), item)
            elif "tp_scatter" in of.tags:
                # Every rank's part of the sum arrives by itself: one kernel reads them all, and writes the sum.
                yield item.but(size=times(of.size, "summed_parts"), bytes_per_element=dtype_bytes(of.dtype))
            # What is gathered is written in place, chunk by chunk.

    chunked = replace(ledger, items=tuple(without_copies()), chunks={**ledger.chunks, **chunks})
    return chunked.set_axes(summed_parts=1.0 + 1.0 / ctx.mesh.tp)


def _pipelined(subject: Pass) -> float:
    """Seconds of a gather and a product of one second each, tp = 8, over one after the other."""
    from planner.costs.overlap import pipelined_s

    ledger, _ = figures.run("tensor_overlap", subject, model="llama3-8b", tp=8, sequence_parallel="true")
    gather = next(item for item in ledger.of(Collective, phase="forward") if "tp_gather" in item.tags)
    together = [item for item in ledger.items if item.window == gather.window and gather.window]
    chunks = float(np.ravel(ledger.chunks[gather.window])[0]) if together else 1.0
    return float(pipelined_s([1.0] * max(len(together), 2), chunks)) / 2.0


TECHNIQUE = Technique(
    key="async_tp",
    name="Tensor-parallel communication overlap",
    slot="tensor_overlap",
    choices=("chunked",),
    source="doi:10.1145/3567955.3567959",
    summary="Gathers and scatters pipelined with the product beside them",
    knobs=(
        Knob(
            "tensor_overlap",
            "how tensor-parallel communication is hidden",
            ("none", "chunked", "domino"),
            "none",
        ),
    ),
    figures=(
        Figure(
            "time of a gather and an equally long product in N = 8 chunks, relative to one after the other: (N + 1)/2N",
            9 / 16,
            1e-9,
            "Wang et al. 2023 (doi:10.1145/3567955.3567959): a looped collective of N partial products",
            _pipelined,
        ),
    ),
    valid=valid,
    apply=apply,
    active=lambda ctx: ctx.mesh.tp > 1,
)
