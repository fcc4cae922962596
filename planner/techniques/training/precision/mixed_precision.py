"""Mixed-precision training: fp16, bf16 or fp8 products over fp32 master weights.

What it does: linear layers multiply in a narrow format; weights in use and activations are 16 bits wide; the optimizer
    keeps fp32 master weights, and gradients are accumulated in fp32.
Saves: activation and communication bytes (half of fp32), and time on the matrix units.
Costs: 4 bytes of master weights per parameter; fp8 quantises every product's inputs (read 2, write 1, and the transposed
    copy 1 byte per element) and keeps a linear layer's input at 1 byte for its weight gradient.
Assumes: norms, softmax, router and loss run on 16-bit inputs; attention, router and head stay 16-bit under fp8; MXFP8
    adds one 8-bit scale per 32 elements. Dimensions of fp8 products are multiples of 16 (32 for MXFP8).
Source: Micikevicius et al. 2018 (arXiv:1710.03740); OCP Microscaling Formats v1.0 (2023) for MXFP8.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Kernel, Ledger, Matmul, Resident, Stream
from planner.technique import Check, Context, Knob, Technique

_WIDE = frozenset({"core_attn", "head", "router"})  # products that stay in the activation's format


def valid(ctx: Context) -> Iterable[Check]:
    """The device must have the rate, and quantised dimensions must fill whole blocks."""
    formats = ctx.format
    yield Check(
        f"{ctx.cluster.device.name} has no {formats.matmul} matrix rate",
        ctx.cluster.device.supports(formats.matmul),
    )
    if formats.block > 1:
        for block in ctx.model.blocks.values():
            widths = [block.mlp.ffn] if block.mlp else []
            widths += [block.moe.expert_ffn / ctx.mesh.etp] if block.moe else []
            for width in widths:
                yield Check(
                    f"feed-forward width per tensor-parallel rank not a multiple of {formats.block} ({formats.name})",
                    width / (ctx.mesh.tp if block.mlp else 1) % formats.block == 0,
                )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Switches dtypes by tag, adds master weights and quantisation."""
    formats = ctx.format
    ratio = dtype_bytes(formats.activation) / 4.0
    added: list[Item] = []

    def kernel(item: Kernel) -> Item | None:
        if isinstance(item, Matmul):
            narrow = not item.tags & _WIDE
            if narrow and formats.block > 1:
                added.append(_quantise(item))
            return replace(item, dtype=formats.matmul if narrow else formats.activation)
        if isinstance(item, Stream) and "activation" in item.tags:
            return replace(item, bytes_per_element=item.bytes_per_element * ratio)
        return None

    def resident(item: Resident) -> Item | None:
        if "linear_input" in item.tags and "head" not in item.what:
            return replace(item, bytes_per_element=formats.linear_input_bytes)
        if "activation" in item.tags:
            return replace(item, bytes_per_element=item.bytes_per_element * ratio)
        if item.pool == "parameters":
            if formats.master:
                added.append(
                    replace(
                        item,
                        what=item.what.replace("parameters", "master_weights"),
                        pool="optimizer",
                        tags=(item.tags - {"parameters"}) | {"optimizer"},
                        by="mixed_precision",
                    )
                )
            return replace(item, bytes_per_element=dtype_bytes(formats.activation))
        if item.pool == "gradients":
            return replace(
                item, bytes_per_element=dtype_bytes(ctx.knobs.get("gradient_dtype", formats.gradient))
            )
        return None

    return ledger.edit(Kernel, kernel).edit(Resident, resident).add(added)


def _quantise(item: Matmul) -> Stream:
    """Casting one operand pair of an fp8 product: 2 bytes read, 1 written, 1 for the transposed copy."""
    return Stream(
        what=f"{item.what}.quantise", block=item.block, phase=item.phase, tags=item.tags - {"gemm"}, by="mixed_precision",
        size=_product(item), bytes_per_element=4.0,
    )  # fmt: skip


def _product(item: Matmul) -> str:
    return " + ".join(f"{item.groups}*{m}*{k}" for m in item.m.split(" + ") for k in item.k.split(" + "))


TECHNIQUE = Technique(
    key="mixed_precision",
    name="Mixed-precision training",
    slot="precision",
    choices=("bf16", "fp16", "fp32", "tf32", "fp8", "mxfp8"),
    default=True,
    source="arXiv:1710.03740",
    summary="Narrow products over fp32 master weights",
    knobs=(
        Knob(
            "precision", "format of matrix products", ("bf16", "fp16", "fp32", "tf32", "fp8", "mxfp8"), "bf16"
        ),
        Knob("gradient_dtype", "dtype of accumulated gradients", ("fp32", "bf16", "fp16"), "fp32"),
    ),
    valid=valid,
    apply=apply,
)
