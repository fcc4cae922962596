"""Muon: the momentum of every matrix is orthogonalised by Newton–Schulz iterations before it is applied.

What it does: keeps one moment per matrix; the update multiplies it five times by polynomials of itself. Embedding and head fall
    back to AdamW.
Saves: 4 bytes of Adam's 8 per parameter of a matrix.
Costs: 5(4m²n + 2m³) FLOP per m × n matrix (m ≤ n) and step.
Assumes: a matrix belongs to one of the ranks that share its update, and is orthogonalised as it is cut by tensor parallelism.
Source: K. Jordan et al. 2024 (kellerjordan.github.io/posts/muon).
"""

from __future__ import annotations

import numpy as np

from planner.ledger import Array, Item, Ledger, Matmul, times
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.optimizer.update import update

_KEY = "muon"
_VECTORS = ("embedding", "head")  # blocks whose weights Muon leaves to AdamW
_ITERATIONS = 5


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Adds moments, gradient norm, update and its products."""
    ledger = update(ledger, ctx, _KEY, vectors=_VECTORS)
    axes: dict[str, Array] = {}
    added: list[Item] = []
    for product in ledger.of(Matmul, phase="weight"):
        if product.block in _VECTORS:
            continue
        short, long = f"short@{product.block}.{product.what}", f"long@{product.block}.{product.what}"
        sides = ledger.axes[product.m], ledger.axes[product.n]
        axes[short], axes[long] = np.minimum(*sides), np.maximum(*sides)
        mesh = "expert" if "expert" in product.tags else "dense"
        tags = frozenset({"optimizer", "update", "newton_schulz", mesh})
        # Per iteration A = XXᵀ and BX, 2m²n FLOP each, and A², 2m³.
        for step, n, k, count in (
            ("gram", short, long, 2 * _ITERATIONS),
            ("square", short, short, _ITERATIONS),
        ):
            added.append(
                Matmul(
                    what=f"{product.what}.{step}", block=product.block, phase="step", tags=tags, by=_KEY, m=short,
                    n=n, k=k, groups=times(times(product.groups, str(count)), f"/zero_{mesh}"), dtype=ctx.format.activation,
                )
            )  # fmt: skip
    return ledger.set_axes(**axes).add(added)


def _products(subject: Pass) -> float:
    """Products of a square matrix with another one in its update: of a matrix of width 768, by their FLOP."""
    ledger, _ = figures.run("optimizer", subject, model="gpt2", optimizer=_KEY, seq=1024)
    flop = figures.flop(ledger, "step", where=lambda item: item.what.startswith("attention.output"))
    return flop / (2.0 * 768**3)


TECHNIQUE = Technique(
    key=_KEY,
    name="Muon",
    slot="optimizer",
    choices=(_KEY,),
    source="kellerjordan.github.io/posts/muon",
    summary="Momentum of matrices, orthogonalised by matrix products",
    figures=(
        Figure(
            "products of matrices per square matrix and update: 5 iterations of 3",
            15.0,
            1e-9,
            "github.com/KellerJordan/Muon @857d1ad, muon.py: zeropower_via_newtonschulz5 and its ns_steps",
            _products,
        ),
    ),
    apply=apply,
)
