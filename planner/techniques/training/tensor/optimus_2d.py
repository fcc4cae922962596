"""2-D tensor parallelism (Optimus): every product runs as SUMMA on a square grid of ranks.

What it does: weights and activations are cut along both sides over q × q ranks; a product is q steps, in which blocks of its
    operands are broadcast along rows and columns.
Saves: all activations, divided by tp: norms and residuals are cut as well.
Costs: (7bsh + 12h²)·log2(q)/q elements per GPT layer forward, and twice that backward: weights travel too.
Assumes: broadcasts along a tree, exposed; sums over the parts of a norm or of the loss are neglected; a step's product runs as
    efficiently as the whole.
Source: Xu et al. 2021 (Optimus, arXiv:2104.05343) §3; van de Geijn, Watts 1997 (SUMMA).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planner.ledger import Array, Ledger
from planner.technique import Check, Context, Figure, Technique
from planner.techniques.training.tensor.grid import checks, dense, edge, volume, with_depth

_KEY = "optimus_2d"


def valid(ctx: Context) -> Iterable[Check]:
    """A square of ranks, whole blocks."""
    yield from checks(ctx, _side(ctx), _side(ctx), "square grid")


def _side(ctx: Context) -> Array:
    return edge(ctx.mesh.tp, 2)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Cuts batch and widths by the side of the square."""
    side = np.maximum(_side(ctx), 1.0)
    return with_depth(ledger, ctx, side, side, _KEY)


TECHNIQUE = Technique(
    key=_KEY,
    name="2-D tensor parallelism (Optimus)",
    slot="tensor",
    choices=("2d",),
    searched=False,  # weights travel in every product: it takes dozens of ranks and little weight per token to pay
    source="arXiv:2104.05343",
    summary="Weights and activations on a square grid, products by SUMMA",
    figures=(
        Figure(
            "elements per layer and forward on 64 ranks, bs = 2h, in h²: (7bsh + 12h²)·log2(64)/(2·8)",
            9.75,
            1e-6,
            "Xu et al. 2021 (arXiv:2104.05343), communication of SUMMA with tree broadcasts, log(p)/(2·sqrt(p)) per operand",
            lambda subject: volume(subject, "2d", 8, 3072),
        ),
    ),
    valid=valid,
    apply=apply,
    active=lambda ctx: (_side(ctx) > 1) & dense(ctx),
)
