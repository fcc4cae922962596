"""Gathers of 8-bit operands: what an fp8 product reads is quantised before it is gathered, with one scale per tensor.

What it does: the shards of linear layers' weights are quantised before fully sharded data parallelism gathers them, and the
    inputs and output gradients of tensor-parallel layers before sequence parallelism does; scatters stay in 16 bits.
Saves: half of the gathers' bytes, gathered weights included.
Costs: nothing beyond the casts that the products need; the ranks agree on the scales (one small all-reduce, neglected).
Assumes: one scale per tensor (``precision=fp8``; elsewhere nothing is narrowed); embedding and head travel in 16 bits.
Source: PyTorch torchao.float8 (``enable_fsdp_float8_all_gather``, ``Float8ColwiseParallel``, ``Float8RowwiseParallel``).
"""

from __future__ import annotations

from planner.costs.precision import dtype_bytes
from planner.ledger import Collective, Item, Ledger, Resident, Stream
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass

_KEY = "float8_gather"
_WIDE_BLOCKS = ("embedding", "head", "boundary")


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Narrows what is gathered of layers whose products are quantised."""
    if ctx.knobs["precision"] != "fp8":
        return ledger

    def narrow(item: Collective) -> Item | None:
        weights = {"data_parallel", "parameters"} <= item.tags and item.phase != "step"
        gathered = item.kind == "all_gather" and (weights or item.tags & {"tp_gather", "tp_regather"})
        if not gathered or item.block in _WIDE_BLOCKS:
            return None
        return item.but(dtype="fp8", by=_KEY)

    narrower = dtype_bytes("fp8") / dtype_bytes(ctx.format.activation)

    def hold(item: Resident) -> Item | None:
        if (
            item.pool != "gathered"
            or not item.what.endswith("parameters.whole")
            or item.block in _WIDE_BLOCKS
        ):
            return None
        return item.but(bytes_per_element=item.bytes_per_element * narrower, by=_KEY)

    def copy(item: Stream) -> Item | None:
        gathered = "sequence_copy" in item.tags and item.tags & {"tp_gather", "tp_regather"}
        if not gathered or item.block in _WIDE_BLOCKS:
            return None
        return item.but(bytes_per_element=item.bytes_per_element * narrower, by=_KEY)

    return ledger.edit(Collective, narrow).edit(Resident, hold).edit(Stream, copy)


def _gathered(subject: Pass) -> float:
    """Bytes of a layer's weights that a rank of 8 sends in a forward, over those of gathers in 16 bits."""
    ledger, _ = figures.run(
        "compression",
        subject,
        model="llama3-8b",
        dp=8,
        zero_stage="fsdp",
        precision="fp8",
        cluster="h100-sxm:1x8",
    )
    gathers = [
        item for item in ledger.of(Collective, phase="forward", block="dense") if "parameters" in item.tags
    ]
    sent = sum(float(ledger.axes[item.size].flat[0]) * dtype_bytes(item.dtype) for item in gathers)
    return sent / sum(float(ledger.axes[item.size].flat[0]) * dtype_bytes("bf16") for item in gathers)


TECHNIQUE = Technique(
    key=_KEY,
    name="Gathers of 8-bit operands (torchao float8)",
    slot="compression",
    choices=("float8",),
    source="PyTorch torchao.float8",
    summary="Weights and tensor-parallel inputs quantised before they are gathered",
    figures=(
        Figure(
            "bytes of gathered weights relative to bf16",
            0.5,
            1e-6,
            "PyTorch torchtitan docs/float8.md: the all-gather communicates in float8 in place of bfloat16",
            _gathered,
        ),
    ),
    apply=apply,
    searched=False,  # PyTorch's alone
    asked=True,
    active=lambda ctx: ctx.knobs["precision"] == "fp8",
)
