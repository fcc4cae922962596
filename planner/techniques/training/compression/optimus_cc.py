"""Fused embedding synchronisation (Optimus-CC): both copies of a tied embedding and all their replicas sum gradients at once.

What it does: a tied embedding lives on the first and the last stage; its gradients are summed between replicas on each, then
    between the two. One all-reduce of all of them takes both steps.
Saves: (D − 1)/(3D − 2) of these bytes with D replicas.
Costs: nothing.
Assumes: the joint ring is as fast as the replicas' own. Optimus-CC's low-rank averaging is ``low_rank``; its compressed
    messages between stages need hops that take longer forward than backward, and are not modelled.
Source: Song et al. 2023 (Optimus-CC, ASPLOS 2023, arXiv:2301.09830) §6.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from planner.ledger import Collective, Item, Ledger, times
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass

_KEY = "optimus_cc"


def valid(ctx: Context) -> Iterable[Check]:
    """Two copies of an embedding, whose gradients are all-reduced."""
    yield Check("a fused embedding sum needs tied embeddings", ctx.model.tied_embeddings)
    yield Check(
        "a fused embedding sum needs gradients that are all-reduced (zero_stage=0)",
        ctx.knobs.get("zero_stage") == "0",
    )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Halves the replicas' sums; the sum between both ends stays as it is.

    An all-reduce of 2D ranks sends (2D − 1)/D of a tensor: the whole, as between two ends, and (D − 1)/D, half of what D
    replicas send.
    """

    def join(item: Collective) -> Item | None:
        if {"data_parallel", "gradients"} <= item.tags and item.block in ("embedding", "head"):
            return item.but(size=times(item.size, "ends_joined"), by=_KEY)
        return None

    return ledger.set_axes(ends_joined=np.where(_fused(ctx), 0.5, 1.0)).edit(Collective, join)


def _fused(ctx: Context) -> NDArray[np.bool_]:
    """Rows with two copies and several replicas."""
    return np.asarray((ctx.mesh.pp > 1) & (ctx.mesh.group("dp_cp").size > 1))


def _saved(subject: Pass) -> float:
    """Share of the bytes that synchronise the embedding's gradients, of 8 replicas, %."""

    def sent(apply: Pass) -> float:
        ledger, _ = figures.run(
            "compression", apply, model="gpt2-xl", dp=8, pp=2, zero_stage="0", compression="fused_embedding",
            gradient_dtype="bf16", cluster="a100-sxm-80gb:2x8",
        )  # fmt: skip
        between = figures.sent_bytes(ledger, lambda i: i.what == "head.tied_gradient")
        replicas = figures.sent_bytes(
            ledger, lambda i: figures.between_replicas(i) and i.block == "head" and "gradients" in i.tags
        )
        return between + replicas

    return 100.0 * (1.0 - sent(subject) / sent(lambda ledger, ctx: ledger))


TECHNIQUE = Technique(
    key=_KEY,
    name="Fused embedding synchronisation (Optimus-CC)",
    slot="compression",
    choices=("fused_embedding",),
    searched=False,  # saves a part of one tensor's sum
    source="arXiv:2301.09830",
    summary="One sum for both copies of a tied embedding and their replicas",
    figures=(
        Figure(
            "bytes of the embedding's synchronisation saved, 8 replicas, %: (D − 1)/(3D − 2)",
            100.0 * 7 / 22,
            1e-3,
            "Song et al. 2023 (arXiv:2301.09830), section 6: V(3D − 2)/D before, V(2D − 1)/D fused",
            _saved,
        ),
    ),
    valid=valid,
    apply=apply,
    active=_fused,
)
