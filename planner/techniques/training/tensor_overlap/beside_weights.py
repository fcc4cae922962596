"""Sums of input gradients beside weight gradients: a column-parallel layer waits for neither.

What it does: the all-reduce (reduce-scatter under sequence parallelism) of a column-parallel layer's input gradient starts before
    the product of its weight gradient, and is waited for behind it.
Saves: the shorter of both, once per column-parallel input and micro-batch.
Costs: compute and communication share the device while they overlap.
Assumes: one product per sum. Where a schedule puts weight gradients off, the sum is put off with them.
Source: Korthikanti et al. 2022 (arXiv:2205.05198) §4.2.2; Megatron-LM ``LinearWithGradAccumulationAndAsyncCommunication``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from planner.ledger import Collective, Item, Ledger, Matmul
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass

_KEY = "beside_weights"
_SUMS = {"tp_reduce", "tp_scatter"}


def valid(ctx: Context) -> Iterable[Check]:
    """Column-parallel layers."""
    yield Check(
        "sums beside weight gradients are for column- and row-parallel products (tensor=1d)",
        ctx.knobs["tensor"] == "1d",
    )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """One window per column-parallel input: the sum of its gradient, and the weight gradient's product."""
    products = {(item.block, item.what): item for item in ledger.of(Matmul, phase="weight")}
    changed: dict[int, Item] = {}
    for item in ledger.of(Collective, phase="backward"):
        product = products.get((item.block, item.what.rpartition(".")[0])) if item.tags & _SUMS else None
        if product is not None:
            window = f"{_KEY}.{product.block}.{product.what}"
            changed[id(item)] = item.but(phase="weight", window=window, track="tp", by=_KEY)
            changed[id(product)] = product.but(window=window)
    return replace(ledger, items=tuple(changed.get(id(item), item) for item in ledger.items))


def _beside(subject: Pass) -> float:
    """Sums of a layer's backward that run beside a weight gradient, of all."""
    ledger, _ = figures.run("tensor_overlap", subject, model="gpt3-175b", tp=8, sequence_parallel="false")
    sums = [
        i for i in ledger.of(Collective) if i.tags & _SUMS and i.block == "dense" and i.phase != "forward"
    ]
    return float(np.mean([item.phase == "weight" for item in sums]))


TECHNIQUE = Technique(
    key=_KEY,
    name="Sums of input gradients beside weight gradients",
    slot="tensor_overlap",
    choices=("weight_gradient",),
    searched=False,  # what Megatron does where it does not cut into chunks; a search tries those
    source="arXiv:2205.05198",
    summary="Input gradients reduced while weight gradients are computed",
    figures=(
        Figure(
            "all-reduces of a layer's backward that start before a weight gradient and are waited for behind it: all",
            1.0,
            1e-9,
            "Megatron-LM megatron/core/tensor_parallel/layers.py, LinearWithGradAccumulationAndAsyncCommunication",
            _beside,
        ),
    ),
    valid=valid,
    apply=apply,
    active=lambda ctx: ctx.mesh.tp > 1,
)
