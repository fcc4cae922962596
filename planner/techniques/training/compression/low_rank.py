"""Low-rank gradients (PowerSGD): replicas average two thin factors in place of every gradient matrix.

What it does: one power iteration per step turns an m × n gradient into P (m × r) and Q (n × r), which are all-reduced; what is
    lost is added to the next gradient.
Saves: mn/(r(m + n)) of the gradients' all-reduce.
Costs: three thin products per matrix, 6mnr FLOP; the error, one copy of the gradients; digits of the gradients.
Assumes: replicated gradients; embeddings travel whole; vectors and the orthogonalisation of P are neglected.
Source: Vogels et al. 2019 (PowerSGD, arXiv:1905.13727) Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from planner.ledger import Array, Collective, Item, Ledger, Matmul, Resident, times
from planner.technique import Check, Context, Detail, Figure, Technique, whole_number
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.compression.narrow import replicated

_KEY = "powersgd"
_RANK = "compression_rank"
_DEFAULT_RANK = 4
_WHOLE = ("embedding", "head", "boundary")


def valid(ctx: Context) -> Iterable[Check]:
    """Replicated gradients, and factors that are no wider than a matrix."""
    yield Check(
        "low-rank gradients need gradients that are all-reduced (zero_stage=0)",
        ctx.knobs.get("zero_stage") == "0",
    )
    yield Check(
        "compression_rank is at most the hidden size",
        float(ctx.knobs.get(_RANK, _DEFAULT_RANK)) <= ctx.model.hidden,
    )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """All-reduces factors, multiplies them, holds the error."""
    rank = float(ctx.knobs.get(_RANK, _DEFAULT_RANK))
    matrices: dict[tuple[str, str], list[Matmul]] = {}
    for product in ledger.of(Matmul, phase="weight"):
        mesh = "expert" if "expert" in product.tags else "dense"
        matrices.setdefault((product.block, mesh), []).append(product)
    changed: dict[int, Item] = {}
    for item in ledger.of(Collective):
        mesh = "expert" if "expert" in item.tags else "dense"
        compressed = {"data_parallel", "gradients"} <= item.tags and item.block not in _WHOLE
        if compressed and (item.block, mesh) in matrices:
            changed[id(item)] = item.but(size=_factors(matrices[item.block, mesh]), by=_KEY)
    added = [
        new
        for (block, _), found in matrices.items()
        if block not in _WHOLE
        for m in found
        for new in _work(m)
    ]
    errors = [
        replace(held, what=f"{held.what}.error", by=_KEY, pool="buffers")
        for held in ledger.of(Resident, pool="gradients", lifetime="always")
        if held.block not in _WHOLE
    ]
    axes: dict[str, Array | float] = {"compression_rank": rank}
    ledger = replace(ledger, items=tuple(changed.get(id(item), item) for item in ledger.items))
    return ledger.set_axes(**axes).add([*added, *errors])


def _factors(products: list[Matmul]) -> str:
    """Elements of P and Q of a block's matrices."""
    return " + ".join(
        times(times(side, product.groups), "compression_rank")
        for product in products
        for side in (product.m, product.n)
    )


def _work(product: Matmul) -> Iterator[Matmul]:
    """M·Q, Mᵀ·P and P·Qᵀ, once per step."""
    rank = "compression_rank"
    for what, m, n, k in (
        ("project", product.m, rank, product.n),
        ("project_back", product.n, rank, product.m),
        ("rebuild", product.m, product.n, rank),
    ):
        yield product.but(what=f"{product.what}.{what}", phase="step", m=m, n=n, k=k, by=_KEY, window="", out_bytes=None
        )  # fmt: skip


def _averaged(subject: Pass) -> float:
    """Elements of a layer's matrices of GPT-2 XL over what is all-reduced for them, rank 1."""
    ledger, _ = figures.run(
        "compression",
        subject,
        model="gpt2-xl",
        dp=8,
        zero_stage="0",
        compression="low_rank",
        compression_rank=1,
    )
    (sent,) = (i for i in ledger.of(Collective, block="dense") if figures.between_replicas(i))
    return 12 * 1600.0**2 / float(ledger.axes[sent.size].flat[0])


TECHNIQUE = Technique(
    key=_KEY,
    name="Low-rank gradients (PowerSGD)",
    slot="compression",
    choices=("low_rank",),
    source="arXiv:1905.13727",
    summary="Replicas average two thin factors of every gradient matrix",
    knobs=(
        Detail(
            _RANK,
            f"rank of compressed gradients ({_DEFAULT_RANK} unless given)",
            read=whole_number,
            expected="a whole number from 1",
        ),
    ),
    figures=(
        Figure(
            "matrix elements of a layer over what is all-reduced, h = 1600, rank 1: 12h²/Σ(m + n)",
            12 * 1600.0**2 / (6400 + 3200 + 8000 + 8000),
            1e-9,
            "Vogels et al. 2019 (arXiv:1905.13727), Algorithm 1: P and Q of r(n + m) elements for a matrix of nm",
            _averaged,
        ),
    ),
    needs=("lossy",),
    valid=valid,
    apply=apply,
    active=replicated,
)
