"""Partitioned activation checkpoints (ZeRO-R, P_a): the inputs that full recomputation keeps are split over tensor ranks.

What it does: after its forward, each tensor-parallel rank keeps 1/tp of a block's input; it is gathered before the block runs
    again.
Saves: checkpoint memory, divided by tp.
Costs: full recomputation, and one all-gather of b·s·h elements per block.
Assumes: tensor parallelism without sequence parallelism, which splits the same tensors without the gather; the gather is
    exposed.
Source: Rajbhandari et al. 2020 (arXiv:1910.02054) §6.1, §8.1; DeepSpeed ``partition_activations``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from planner.ledger import Collective, Item, Ledger, Resident, times
from planner.technique import Check, Context, Figure, Technique, off
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.recompute.again import recompute


def valid(ctx: Context) -> Iterable[Check]:
    """Something is replicated over tensor ranks."""
    yield Check("partitioned checkpoints need tp > 1 without sequence parallelism", _replicated(ctx))


def _replicated(ctx: Context) -> NDArray[np.bool_]:
    return np.asarray((ctx.mesh.tp > 1) & (ctx.knobs["sequence_parallel"] == off("sequence_parallel")))


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Recomputes every block from a gathered input."""
    ledger = recompute(ledger, lambda item: True, lambda item: "input" in item.tags, "zero_r")
    gathers: list[Item] = []

    def split(item: Resident) -> Item | None:
        if not {"saved", "input"} <= item.tags:
            return None
        gathers.append(
            Collective(
                what=f"{item.what}.gather", block=item.block, phase="recompute", tags=frozenset({"checkpoint"}), by="zero_r",
                kind="all_gather", group=ctx.mesh.group("tp"), size=item.size, dtype=ctx.format.activation,
            )
        )  # fmt: skip
        return item.but(size=times(item.size, "/checkpoint_parts"), by="zero_r")

    return ledger.set_axes(checkpoint_parts=ctx.mesh.tp).edit(Resident, split).add(gathers)


def _gathered(subject: Pass) -> float:
    """Elements gathered per block, relative to tensor parallelism with recomputation."""
    ledger, _ = figures.run("recompute", subject, model="gpt2-xl", tp=5, recompute="partitioned")
    layers = [
        item
        for item in ledger.of(Collective)
        if item.group.name == "tp" and item.phase != "step" and item.block == "dense"
    ]
    extra = figures.sent_elements(
        replace(ledger, items=tuple(layers)), lambda item: "checkpoint" in item.tags
    )
    return extra / figures.sent_elements(
        replace(ledger, items=tuple(layers)), lambda item: "checkpoint" not in item.tags
    )


TECHNIQUE = Technique(
    key="zero_r",
    name="Partitioned activation checkpoints (ZeRO-R)",
    slot="recompute",
    choices=("partitioned",),
    searched=False,  # sequence parallelism shards the same tensors for less
    source="arXiv:1910.02054",
    summary="Inputs of recomputed blocks split over tensor ranks",
    figures=(
        Figure(
            "extra volume relative to tensor parallelism with recomputation: one of 12·seq·hidden",
            1 / 12,
            1e-9,
            "Rajbhandari et al. 2020 (arXiv:1910.02054), section 8.1: 12 · seq · hidden per block, less than 10 % more",
            _gathered,
        ),
    ),
    valid=valid,
    apply=apply,
    active=_replicated,
)
