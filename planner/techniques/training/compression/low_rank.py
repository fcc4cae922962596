"""Low-rank gradients (PowerSGD, Optimus-CC): replicas average two thin factors in place of every gradient matrix.

What it does: one power iteration per step turns an m × n gradient into P (m × r) and Q (n × r), which are all-reduced; what is
    lost is added to the next gradient. ``low_rank+boundary`` also sends the backward's messages between pipeline stages so
    (Optimus-CC's compressed backpropagation).
Saves: mn/(r(m + n)) of the gradients' all-reduce, and of the messages' bytes.
Costs: three thin products per matrix, 6mnr FLOP; the error, one copy of the gradients; digits of the gradients.
Assumes: replicated gradients; embeddings travel whole; vectors and the orthogonalisation of P are neglected; Optimus-CC's
    choice of stages and its fused embedding reduction are left out.
Source: Vogels et al. 2019 (PowerSGD, arXiv:1905.13727) Algorithm 1; Song et al. 2023 (Optimus-CC, arXiv:2301.09830) §4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from planner.ledger import Array, Collective, Item, Ledger, Matmul, Resident, times
from planner.technique import Check, Context, Detail, Figure, Technique, whole_number
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.compression.narrow import replicated

_RANK = "compression_rank"
_DEFAULT_RANK = 4
_WHOLE = ("embedding", "head", "boundary")


def valid(ctx: Context) -> Iterable[Check]:
    """Replicated gradients."""
    yield Check(
        "low-rank gradients need gradients that are all-reduced (zero_stage=0)",
        ctx.knobs.get("zero_stage") == "0",
    )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """All-reduces factors, multiplies them, holds the error."""
    return _gradients(ledger, ctx, "powersgd")


def apply_with_boundary(ledger: Ledger, ctx: Context) -> Ledger:
    """The same, and the backward's messages between stages as factors."""
    ledger = _gradients(ledger, ctx, "optimus_cc")

    def factors(item: Collective) -> Item | None:
        if "pipeline" not in item.tags or item.phase != "backward":
            return None
        rows = times(times(item.size, "compression_rank"), "/hidden")
        return replace(item, size=f"{rows} + compression_rank*hidden", by="optimus_cc")

    return ledger.edit(Collective, factors)


def _gradients(ledger: Ledger, ctx: Context, by: str) -> Ledger:
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
            changed[id(item)] = replace(item, size=_factors(matrices[item.block, mesh]), by=by)
    added = [
        new
        for (block, _), found in matrices.items()
        if block not in _WHOLE
        for m in found
        for new in _work(m, by)
    ]
    errors = [
        replace(held, what=f"{held.what}.error", by=by, pool="buffers")
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


def _work(product: Matmul, by: str) -> Iterator[Matmul]:
    """M·Q, Mᵀ·P and P·Qᵀ, once per step."""
    rank = "compression_rank"
    for what, m, n, k in (
        ("project", product.m, rank, product.n),
        ("project_back", product.n, rank, product.m),
        ("rebuild", product.m, product.n, rank),
    ):
        yield replace(
            product,
            what=f"{product.what}.{what}",
            phase="step",
            m=m,
            n=n,
            k=k,
            by=by,
            window="",
            out_bytes=None,
        )


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


def _message(subject: Pass) -> float:
    """Elements of a message between stages of GPT-2 XL over those of the backward's, rank 4."""
    ledger, _ = figures.run(
        "compression",
        subject,
        model="gpt2-xl",
        pp=2,
        zero_stage="0",
        compression="low_rank+boundary",
        compression_rank=4,
    )
    sent = figures.sent_elements(ledger, lambda i: "pipeline" in i.tags and i.phase == "backward")
    return 2048.0 * 1600.0 / sent


_SHARED: dict[str, Any] = {"slot": "compression", "needs": ("lossy",), "valid": valid}
TECHNIQUES = (
    Technique(
        key="powersgd",
        name="Low-rank gradients (PowerSGD)",
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
        apply=apply,
        active=replicated,
        **_SHARED,
    ),
    Technique(
        key="optimus_cc",
        name="Low-rank gradients and backward messages (Optimus-CC)",
        choices=("low_rank+boundary",),
        source="arXiv:2301.09830",
        summary="PowerSGD between replicas, and between stages in the backward",
        figures=(
            Figure(
                "elements of a backward message of b·s by h over its factors, rank 4: bsh/(r(bs + h))",
                2048.0 * 1600 / (4 * (2048 + 1600)),
                1e-9,
                "Song et al. 2023 (arXiv:2301.09830), section 4: inter-stage backward traffic as PowerSGD's P and Q",
                _message,
            ),
        ),
        apply=apply_with_boundary,
        active=lambda ctx: ctx.mesh.pp > 1,
        **_SHARED,
    ),
)
