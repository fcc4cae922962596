"""2.5-D tensor parallelism (Tesseract): layers of square grids, each with a copy of the weights and a part of the batch.

What it does: of r·q² ranks, every layer of q × q holds all weights and runs SUMMA on its part of the batch; gradients are summed
    over the layers.
Saves: against a square of as many ranks, broadcasts between fewer ranks, and activations in r times smaller blocks.
Costs: weights are divided by q² only; (7bsh/(rq) + 12h²/q)·log2(q) elements per GPT layer forward, twice that backward, and an
    all-reduce of the gradients over r layers per step.
Assumes: the deepest box of which tp is the volume (r ≤ q); otherwise as the square grid.
Source: Wang et al. 2021 (Tesseract, arXiv:2105.14500) §3.
"""

from __future__ import annotations

import numpy as np

from planner.ledger import Array, Collective, Ledger, Resident
from planner.technique import Context
from planner.techniques.training.tensor.grid import Lattice, edge, with_depth

_KEY = "tesseract_25d"


def box(ranks: Array) -> tuple[Array, Array]:
    """Depth and side of the deepest box r·q² with r ≤ q; 0 where there is none.

    >>> [side.tolist() for side in box(np.array([4.0, 8.0, 32.0, 48.0]))]
    [[1.0, 2.0, 2.0, 3.0], [2.0, 2.0, 4.0, 4.0]]
    """
    depth, side = np.zeros_like(ranks), np.zeros_like(ranks)
    for r in range(1, round(float(np.max(ranks, initial=1.0)) ** (1 / 3)) + 1):
        q = edge(ranks / r, 2)
        deeper = (q >= r) & (q * q * r == ranks)
        depth, side = np.where(deeper, r, depth), np.where(deeper, q, side)
    return depth, side


def _cuts(ranks: Array) -> tuple[Array, Array]:
    depth, side = box(ranks)
    return depth * side, side


_BOX = Lattice("box of grids", _cuts)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Cuts the batch by depth and side, widths by the side; sums gradients over the depth."""
    rows, side = _BOX.extents(ctx)
    ledger = with_depth(ledger, ctx, rows, side, _KEY)
    layers = ctx.mesh.subgroup("tp", "tp.depth", rows / side, inner=False)
    return ledger.add(
        Collective(
            what=f"{held.what}.depth_sum", block=held.block, phase="step", tags=frozenset({"gradients", "tp_sum"}), by=_KEY,
            kind="all_reduce", group=layers, size=held.size, dtype=ctx.gradient_dtype,
        )
        for held in ledger.of(Resident, pool="gradients", lifetime="always")
    )  # fmt: skip


TECHNIQUE = _BOX.technique(
    key=_KEY,
    name="2.5-D tensor parallelism (Tesseract)",
    choice="2.5d",
    source="arXiv:2105.14500",
    summary="Layers of square grids with copies of the weights",
    figure=(
        "elements per layer and forward on 4 × 4 × 4 ranks, bs = 2h, in h²: (7bsh/16 + 12h²/4)·log2(4)",
        7.75,
        "Wang et al. 2021 (arXiv:2105.14500), section 3: activations over d·q², weights over q², SUMMA in every layer",
    ),
    batch=(16, 1536),
    apply=apply,
    active=lambda rows, columns: rows > columns,
)
