"""3-D tensor parallelism: inputs, weights and outputs of a product are spread over a cube of ranks.

What it does: of q³ ranks, each holds 1/q³ of input, weight and output; before a product, input and weight are gathered along
    one axis each, after it the output is reduce-scattered along the third.
Saves: all activations and weights, divided by tp.
Costs: (q − 1)/q³ of inputs, weights and outputs, (16bsh + 12h²)(q − 1)/q³ elements per GPT layer forward, and twice that
    backward: for the input's gradient and for the weight's.
Assumes: gathers and scatters are exposed; of what is gathered, one product's operands are there at once; sums over the parts of
    a norm or of the loss are neglected.
Source: Bian et al. 2021 (arXiv:2105.14450) §3.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planner.ledger import Array, Group, Item, Ledger, Matmul, Resident, times
from planner.technique import Context
from planner.techniques.training.tensor.grid import Lattice, edge, lay, matrices, operands, travel

_KEY = "tp_3d"


def _cuts(ranks: Array) -> tuple[Array, Array]:
    side = edge(ranks, 3)
    return side * side, side


_CUBE = Lattice("cube", _cuts)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Cuts the batch by a face of the cube, widths by an edge, weights by another edge besides."""
    rows, side = _CUBE.extents(ctx)
    ledger = lay(ledger.set_axes(grid_edge=side), rows, side, _gathered)

    def spread(item: Resident) -> Item | None:
        weights = item.pool in ("parameters", "gradients", "optimizer") and item.lifetime == "always"
        return item.but(size=times(item.size, "/grid_edge"), by=_KEY) if weights else None

    groups = [Group(f"tp.axis{axis}", side, np.power(side, axis)) for axis in range(3)]
    return ledger.edit(Resident, spread).add(_exchanges(ledger, ctx, groups))


def _gathered(item: Matmul) -> Matmul:
    """A product on rows gathered along an edge."""
    if item.phase == "weight":
        return item.but(k=times(item.k, "grid_edge"))
    return item.but(m=times(item.m, "grid_edge"))


def _exchanges(ledger: Ledger, ctx: Context, groups: list[Group]) -> Iterator[Item]:
    """Gathers of both operands and the scatter of the result; a product's local operands are what is gathered."""
    for item in matrices(ledger):
        sizes = operands(item)
        for what, kind, size, group in (
            ("gather_left", "all_gather", sizes.left, groups[0]),
            ("gather_right", "all_gather", sizes.right, groups[1]),
            ("scatter", "reduce_scatter", sizes.result, groups[2]),
        ):
            yield travel(item, ctx, what, kind, size, group, _KEY)


TECHNIQUE = _CUBE.technique(
    key=_KEY,
    name="3-D tensor parallelism",
    choice="3d",
    source="arXiv:2105.14450",
    summary="Inputs, weights and outputs of every product on a cube of ranks",
    figure=(
        "elements per layer and forward on 4³ ranks, bs = 2h, in h²: (16bsh + 12h²)·3/64",
        2.0625,
        "Bian et al. 2021 (arXiv:2105.14450), section 3: gathers and scatter of O((q − 1)/q³) of each operand",
    ),
    batch=(16, 1536),
    apply=apply,
    active=lambda rows, columns: columns > 1,
)
