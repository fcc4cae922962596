"""Scatter/gather between stages: every tensor rank sends its slice of the stage's output, and the receivers gather it.

What it does: after the all-reduce that ends a stage, all tensor ranks hold the same tensor. Each sends 1/t of it to its
    counterpart in the next stage, which gathers the slices over the tensor ranks; gradients go back the same way.
Saves: t − 1 of t bytes of every hop, on the slow links between nodes.
Costs: an all-gather of b·s·h elements per hop and direction over the tensor ranks.
Assumes: the gather, as the message, is latency on the edge, not work on the device; no sequence parallelism, which leaves
    slices on every rank to begin with.
Source: Narayanan et al. 2021 (arXiv:2104.04473) §4.1; Megatron-LM v3 ``megatron/p2p_communication.py``
    (``scatter_gather_tensors_in_pipeline``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from planner.costs.collectives import group_members
from planner.ledger import Collective, Item, Ledger, times
from planner.technique import Check, Context, Figure, Technique, off
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.pipeline import pipeline_stages


def valid(ctx: Context) -> Iterable[Check]:
    """Stages as ever, and a tensor that all tensor ranks hold whole."""
    yield from pipeline_stages.valid(ctx)
    whole = ctx.knobs["sequence_parallel"] == off("sequence_parallel")
    yield Check(
        "scattered stage messages need tp > 1 without sequence parallelism", (ctx.mesh.tp > 1) & whole
    )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Slices what one hop carries, and gathers it on the other side."""
    ledger = pipeline_stages.apply(ledger, ctx)
    gathers: list[Item] = []

    def scatter(item: Collective) -> Item | None:
        if item.block != pipeline_stages.BOUNDARY:
            return None
        gather = item.but(what=f"{item.what}.gather", kind="all_gather", group=ctx.mesh.group("tp"))
        gathers.append(replace(gather, by="scatter_gather"))
        return item.but(size=times(item.size, "/slices"), by="scatter_gather")

    return ledger.set_axes(slices=ctx.mesh.tp).edit(Collective, scatter).add(gathers)


def _leaves_domain(ctx: Context) -> NDArray[np.bool_] | bool:
    """Rows whose hops leave a domain in which tensor ranks meet.

    Elsewhere the gather sends over the links of the hop all that the scatter has saved.
    """
    if ctx.knobs["sequence_parallel"] != off("sequence_parallel"):
        return False
    tp, pp = ctx.mesh.group("tp"), ctx.mesh.group("pp")
    pays = np.zeros(len(ctx.mesh.tp), dtype=bool)
    for tier in ctx.cluster.tiers:
        meet, held = (
            group_members(group.size, group.stride, tier.size, float(ctx.cluster.devices))
            for group in (tp, pp)
        )
        pays |= (np.asarray(meet) > 1) & (np.asarray(held) < pp.size)
    return pays


def _message(subject: Pass) -> float:
    """Elements that a rank of a stage of GPT-3 175B sends on, per micro-batch of one sequence, t = 8."""
    ledger, _ = figures.run("pipeline", subject, model="gpt3-175b", seq=2048, pp=8, tp=8)
    hops = [item for item in ledger.of(Collective, phase="forward") if item.kind == "point_to_point"]
    return figures.sent_elements(ledger, lambda item: item in hops)


TECHNIQUE = Technique(
    key="scatter_gather",
    name="Scatter/gather between pipeline stages",
    slot="pipeline",
    choices=("scatter_gather",),
    searched=False,  # sequence parallelism sends the same slices and gathers nothing
    source="arXiv:2104.04473",
    summary="Tensor ranks send slices to the next stage, which gathers them",
    figures=(
        Figure(
            "elements between consecutive stages of GPT-3 175B per micro-batch, t = 8: bsh/t",
            2048.0 * 12288 / 8,
            1e-9,
            "Narayanan et al. 2021 (arXiv:2104.04473), section 4.1",
            _message,
        ),
    ),
    valid=valid,
    apply=apply,
    active=_leaves_domain,
)
