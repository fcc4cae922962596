"""FP8 and FP4 training: linear layers multiply blocks of 8- or 4-bit numbers over 16-bit activations.

What it does: every linear product reads operands quantised on use (``fp8``: one scale per tensor; ``fp8_rowwise``: one per
    row; ``mxfp8``: one 8-bit scale per 32 elements; ``nvfp4``: one 8-bit scale per 16 elements).
Saves: time on the matrix units; a linear layer's saved input shrinks to the narrow format.
Costs: a cast of both operands forward and of the output gradient backward, each written twice (the transpose of a quantised
    tensor is no quantisation of the transpose); the host's time for these kernels, of every expert its own. A tensor's one scale,
    where it is the current one, costs another pass over the tensor before the cast.
Assumes: attention, router, head, communication and master weights as in bf16; all linear layers are quantised. Weights are cast
    in every micro-batch; or, where the stack says so and replicas hold them whole, once per step and kept, beside 16 bits or
    in their place. Inputs that no weight gradient reads are written once. Dimensions are whole blocks.
Source: OCP Microscaling Formats v1.0 (2023); Micikevicius et al. 2022 (FP8 formats, arXiv:2209.05433); NVIDIA 2025 (NVFP4
    pre-training, arXiv:2509.25149); Transformer Engine ``pytorch/csrc/extensions/gemm.cpp`` (a product swizzles the scales of
    both operands) and its user guide on caching FP8 weights (``is_first_microbatch``); current scales:
    ``pytorch/csrc/quantizer.cpp`` (``Float8CurrentScalingQuantizer``, v2.8 to v2.14: the largest value is found, made a scale,
    and the cast follows, in one call of the host).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from planner.costs.precision import FORMAT_BITS, cast_bytes, dtype_bytes
from planner.ledger import Array, Item, Ledger, Matmul, Resident, Stream, times
from planner.specs.formats import Format
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.precision.dtypes import WIDE, switch_dtypes

_KEY = "mxfp8_nvfp4"


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
    # A library that the stack names for the format quantises the first operand of every product by itself: what is left to cast
    # are the weights, and the inputs once more for the weight gradient.
    generation = ctx.cluster.device.generation
    library = bool(formats.kernels) and ctx.stack.kernel("gemm", formats.kernels, generation) is not None
    # Weights that every micro-batch gathers anew are cast anew as well.
    habit = ctx.stack.habits["weight_casts"]
    kept = habit != "each_micro_batch" and ctx.knobs.get("zero_stage") not in ("3", "fsdp")
    alone = habit == "alone" and FORMAT_BITS[formats.matmul] == 8
    trained = {(item.block, item.what) for item in ledger.of(Matmul, phase="weight")}
    added: list[Item] = []
    for item in ledger.of(Matmul):
        if item.phase == "weight" or item.tags & WIDE or (item.phase != "forward" and library):
            continue  # the weight gradient finds both of its operands cast
        casts = _Casts(
            item, formats, formats.name == "fp8" and ctx.stack.habits["tensor_scales"] == "current"
        )
        copies = 2.0 if (item.block, item.what) in trained else 1.0
        added.append(casts.stream("quantise", item.m, copies, casts.calls()))
        if item.phase == "forward":
            weights = casts.stream("quantise_weights", item.n, 2.0, casts.each("1"))
            added.append(replace(weights, phase="step") if kept else weights)
        if item.phase == "forward" and kept:
            added.append(casts.held(alone=alone))
    return switch_dtypes(ledger, ctx, _KEY).add(added)


class _Casts(NamedTuple):
    """What casts the operands of one product."""

    item: Matmul
    formats: Format
    found: bool
    """Whether a tensor's one scale is found in a pass of its own."""

    def stream(self, what: str, rows: str, copies: float, calls: str) -> Stream:
        """The cast of one operand: read once, written ``copies`` times."""
        item, formats = self.item, self.formats
        wide = dtype_bytes(formats.activation)
        cast = cast_bytes(1.0, wide, formats.linear_input_bytes, copies=copies) + wide * self.found
        return Stream(
            what=f"{item.what}.{what}", block=item.block, phase=item.phase, tags=item.tags - {"gemm"}, by=_KEY,
            size=self._elements(rows), bytes_per_element=float(cast), calls=calls,
        )  # fmt: skip

    def held(self, *, alone: bool) -> Resident:
        """What both casts of the weight hold, beside what is counted of it; where they are ``alone``, beyond that."""
        item, in_its_place = self.item, dtype_bytes(self.formats.activation) * alone
        return Resident(
            what=f"{item.what}.quantised", block=item.block, tags=frozenset({"frozen"}), by=_KEY,
            size=self._elements(item.n), bytes_per_element=2.0 * self.formats.linear_input_bytes - in_its_place,
            pool="parameters", lifetime="always",
        )  # fmt: skip

    def calls(self) -> str:
        """Kernels that the host issues for what is no weight: its cast and, for scales of blocks, their re-ordering for either
        operand of the product and, backward, of its weight gradient."""
        products = 1 if self.item.phase == "forward" else 2
        return self.each(str(1 + 2 * products * (self.formats.name in ("mxfp8", "nvfp4"))))

    def each(self, count: str) -> str:
        """So many of every expert, where products are of experts."""
        return f"{count}*{self.item.groups}" if self.item.grouped else count

    def _elements(self, rows: str) -> str:
        pairs = [(a, b) for a in rows.split(" + ") for b in self.item.k.split(" + ")]
        return " + ".join(times(times(a, b), self.item.groups) for a, b in pairs)


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
    key=_KEY,
    name="FP8 and FP4 training (MXFP8, NVFP4)",
    slot="precision",
    choices=("fp8", "fp8_rowwise", "mxfp8", "nvfp4"),
    source="arXiv:2209.05433",
    summary="Linear layers multiply blocks of 8- or 4-bit numbers",
    figures=(_stored_bits("mxfp8"), _stored_bits("nvfp4")),
    valid=valid,
    apply=apply,
)
