"""FP8 and FP4 training: linear layers multiply blocks of 8- or 4-bit numbers over 16-bit activations.

What it does: every linear product reads operands quantised on use (``fp8``: one scale per tensor; ``fp8_rowwise``: one per
    row; ``mxfp8``: one 8-bit scale per 32 elements; ``nvfp4``: one 8-bit scale per 16 elements).
Saves: time on the matrix units; a linear layer's saved input shrinks to the narrow format.
Costs: a cast of both operands forward and of the output gradient backward, each written twice (the transpose of a quantised
    tensor is no quantisation of the transpose); the host's time for these kernels, of every expert its own.
Assumes: attention, router, head, communication and master weights as in bf16; weights are cast in every micro-batch; all
    linear layers are quantised. Dimensions are whole blocks.
Source: OCP Microscaling Formats v1.0 (2023); Micikevicius et al. 2022 (FP8 formats, arXiv:2209.05433); NVIDIA 2025 (NVFP4
    pre-training, arXiv:2509.25149); Transformer Engine ``pytorch/csrc/extensions/gemm.cpp`` (a product swizzles the scales of
    both operands).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from planner.costs.precision import cast_bytes, dtype_bytes
from planner.ledger import Array, Ledger, Matmul, Stream, times
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.precision.dtypes import WIDE, switch_dtypes


def valid(ctx: Context) -> Iterable[Check]:
    """The device must have the rate, and every quantised dimension must fill whole blocks."""
    device, formats = ctx.cluster.device, ctx.format
    yield Check(f"{device.name} has no {formats.matmul} matrix rate", device.supports(formats.matmul))
    for what, width in _widths(ctx):
        yield Check(
            f"{what} per rank not a multiple of {formats.block} ({formats.name})", width % formats.block == 0
        )


def _widths(ctx: Context) -> Iterator[tuple[str, Array | int]]:
    tp = ctx.mesh.tp
    yield "hidden size", ctx.model.hidden
    yield "tokens", ctx.micro_batch_size * ctx.workload.seq_len / ctx.mesh.cp
    for block in ctx.model.blocks.values():
        for attention in (block.attention, block.cross_attention):
            if attention is not None:
                yield "query width", attention.heads * attention.query_dim / tp
        if block.mlp is not None:
            yield "feed-forward width", block.mlp.ffn / tp
        if block.moe is not None:
            yield "expert width", block.moe.expert_ffn / ctx.mesh.etp
            yield "shared expert width", block.moe.shared_ffn / tp
        if block.ssm is not None:
            yield "state-space width", block.ssm.inner / tp


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Switches dtypes by tag and adds the casts."""
    formats = ctx.format
    cast = float(cast_bytes(1.0, dtype_bytes(formats.activation), formats.linear_input_bytes, copies=2))
    # A library that the stack names for the format quantises the first operand of every product by itself: what is left to cast
    # are the weights, and the inputs once more for the weight gradient.
    generation = ctx.cluster.device.generation
    library = bool(formats.kernels) and ctx.stack.kernel("gemm", formats.kernels, generation) is not None
    casts = [
        Stream(
            what=f"{item.what}.quantise", block=item.block, phase=item.phase, tags=item.tags - {"gemm"}, by="mxfp8_nvfp4",
            size=_operands(item), bytes_per_element=cast, calls=_calls(item, scaled_in_blocks=formats.name in ("mxfp8", "nvfp4")),
        )
        for item in ledger.of(Matmul)
        if item.phase != "weight" and not item.tags & WIDE  # the weight gradient finds both of its operands cast
        if item.phase == "forward" or not library
    ]  # fmt: skip
    return switch_dtypes(ledger, ctx, "mxfp8_nvfp4").add(casts)


def _operands(item: Matmul) -> str:
    """Elements to cast: activations and weights forward, the output's gradient backward."""
    pairs = [(item.m, item.k)] + [(item.k, item.n)] * (item.phase == "forward")
    terms = [
        times(times(a, b), item.groups)
        for left, right in pairs
        for a in left.split(" + ")
        for b in right.split(" + ")
    ]
    return " + ".join(terms)


def _calls(item: Matmul, *, scaled_in_blocks: bool) -> str:
    """Kernels that the host issues around a product and, backward, its weight gradient: a cast of every operand that is new, and
    for scales of blocks their re-ordering for either operand of every product. Experts have their own."""
    casts, products = (2, 1) if item.phase == "forward" else (1, 2)
    count = casts + 2 * products * scaled_in_blocks
    return f"{count}*{item.groups}" if item.grouped else str(count)


def _stored_bits(precision: str) -> Figure:
    bits, where = {
        "mxfp8": (8.25, "OCP Microscaling Formats v1.0, Table 1: 32 elements of 8 bits and an 8-bit scale"),
        "nvfp4": (4.5, "arXiv:2509.25149, section 2: 16 elements of 4 bits and an 8-bit scale"),
    }[precision]

    def compute(subject: Pass) -> float:
        ledger, _ = figures.run(
            "precision", subject, precision=precision, model="llama3-8b", attention_kernel="flash"
        )
        kept = next(item for item in figures.saved(ledger) if item.what == "mlp.fc1_input")
        return kept.bytes_per_element * 8.0

    return Figure(f"bits of a saved linear input ({precision})", bits, 1e-6, where, compute)


TECHNIQUE = Technique(
    key="mxfp8_nvfp4",
    name="FP8 and FP4 training (MXFP8, NVFP4)",
    slot="precision",
    choices=("fp8", "fp8_rowwise", "mxfp8", "nvfp4"),
    source="arXiv:2209.05433",
    summary="Linear layers multiply blocks of 8- or 4-bit numbers",
    figures=(_stored_bits("mxfp8"), _stored_bits("nvfp4")),
    valid=valid,
    apply=apply,
)
