"""Adafactor: the second moment of a matrix is the outer product of its row and column sums.

What it does: keeps one fp32 value per row and per column of every matrix, and no momentum.
Saves: Adam's 8 bytes per parameter, but for (r + c)/(rc) of 4.
Costs: the gradient is read twice: for the sums, and for the update, whose size is clipped.
Assumes: no momentum (the paper's memory-saving form); vectors, which keep whole moments, are neglected.
Source: Shazeer, Stern 2018 (arXiv:1804.04235) §3, Algorithm 4.
"""

from __future__ import annotations

from collections.abc import Iterator

from planner.costs.precision import dtype_bytes
from planner.ledger import Ledger, Matmul, Resident, times
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.optimizer.update import trained, update

_KEY = "adafactor"


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Adds the factored moments, gradient norm and update."""
    ledger = update(ledger, ctx, _KEY, extra_bytes=dtype_bytes(ctx.gradient_dtype))
    return ledger.add(factored(ledger, _KEY))


def factored(ledger: Ledger, by: str) -> Iterator[Resident]:
    """An fp32 value per row and column of every trained matrix."""
    for item in ledger.of(Matmul, phase="weight"):
        mesh = "expert" if "expert" in item.tags else "dense"
        yield Resident(
            what=f"{item.what}.row_and_column_moments", block=item.block, tags=frozenset({"optimizer", mesh}), by=by,
            size=" + ".join(times(side, item.groups) for side in (item.m, item.n)), bytes_per_element=4.0, pool="optimizer",
            lifetime="always",
        )  # fmt: skip
    for weights in trained(ledger):
        if weights.block == "embedding" and "vocab" in weights.size and "dense" in weights.tags:
            yield Resident(
                what="embedding.row_and_column_moments", block="embedding", tags=frozenset({"optimizer", "dense"}), by=by,
                size="vocab + hidden", bytes_per_element=4.0, pool="optimizer", lifetime="always",
            )  # fmt: skip


def _values(subject: Pass) -> float:
    """State values of the feed-forward network's first matrix of GPT-2 XL, h by 4h."""
    ledger, _ = figures.run("optimizer", subject, model="gpt2-xl", optimizer="adafactor")
    kept = [i for i in ledger.of(Resident, pool="optimizer") if i.what == "mlp.fc1.row_and_column_moments"]
    return figures.total_bytes(ledger, kept) / 4.0


TECHNIQUE = Technique(
    key=_KEY,
    name="Adafactor",
    slot="optimizer",
    choices=(_KEY,),
    source="arXiv:1804.04235",
    summary="Second moments as row and column sums, no momentum",
    figures=(
        Figure(
            "second-moment values of a matrix of 1600 by 6400: n + m instead of n·m",
            1600.0 + 6400.0,
            1e-9,
            "Shazeer, Stern 2018 (arXiv:1804.04235), section 3: memory from O(nm) to O(n + m)",
            _values,
        ),
    ),
    apply=apply,
)
