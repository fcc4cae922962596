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

from planner.ledger import Array, Ledger
from planner.technique import Context
from planner.techniques.training.tensor.grid import Lattice, edge, with_depth

_KEY = "optimus_2d"


def _cuts(ranks: Array) -> tuple[Array, Array]:
    side = edge(ranks, 2)
    return side, side


_SQUARE = Lattice("square grid", _cuts)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Cuts batch and widths by the side of the square."""
    return with_depth(ledger, ctx, *_SQUARE.extents(ctx), _KEY)


TECHNIQUE = _SQUARE.technique(
    key=_KEY,
    name="2-D tensor parallelism (Optimus)",
    choice="2d",
    source="arXiv:2104.05343",
    summary="Weights and activations on a square grid, products by SUMMA",
    figure=(
        "elements per layer and forward on 64 ranks, bs = 2h, in h²: (7bsh + 12h²)·log2(64)/(2·8)",
        9.75,
        "Xu et al. 2021 (arXiv:2104.05343), communication of SUMMA with tree broadcasts, log(p)/(2·sqrt(p)) per operand",
    ),
    batch=(8, 3072),
    apply=apply,
    active=lambda rows, columns: columns > 1,
)
