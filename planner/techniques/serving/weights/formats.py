"""What the weight formats share: which items of an iteration take which number format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Kernel, Ledger, Matmul, Resident, Stream
from planner.specs.formats import KERNEL_FORMATS
from planner.technique import ServingContext

__all__ = ["ENDS", "WIDE", "one_format", "store"]

WIDE = frozenset({"core_attn", "head", "router", "relative", "indexer"})
"""Products that are never quantised."""

ENDS = ("embedding", "head")
_WIDE_LABEL = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def one_format(by: str) -> Callable[[Ledger, ServingContext], Ledger]:
    """The pass of a technique, called ``by``, that gives linear layers and experts the format that the knob names."""

    def apply(ledger: Ledger, ctx: ServingContext) -> Ledger:
        """Switches the format of linear layers and experts by tag."""
        label = str(ctx.knobs["weights"])
        return store(ledger, ctx, label, label, by)

    return apply


def store(ledger: Ledger, ctx: ServingContext, linear: str, experts: str, by: str) -> Ledger:
    """Gives linear layers and experts a format of :data:`~planner.specs.formats.KERNEL_FORMATS`, and all else 16 bits.

    Args:
        ledger: an iteration in fp32.
        ctx: its context.
        linear: format of attention's projections and of dense networks; empty: as activations.
        experts: format of routed experts; empty: as activations.
        by: key of the technique.
    """
    activation = ctx.format.activation
    wide = _WIDE_LABEL[activation]
    linear, experts = linear or wide, experts or wide

    def kernel(item: Kernel) -> Item | None:
        if isinstance(item, Matmul):
            label = wide if item.tags & WIDE else experts if item.grouped else linear
            form = KERNEL_FORMATS[label]
            out = dtype_bytes(activation) if item.out_bytes is None else item.out_bytes
            return replace(
                item, dtype=form.dtype, format=label, out_bytes=out, by=item.by if label == wide else by
            )
        if isinstance(item, Stream) and "activation" in item.tags:
            return replace(
                item, bytes_per_element=item.bytes_per_element * dtype_bytes(activation) / dtype_bytes("fp32")
            )
        return None

    def resident(item: Resident) -> Item | None:
        if item.pool != "parameters":
            return None
        label = (
            wide
            if item.block in ENDS or "tied" in item.tags
            else experts
            if "expert" in item.tags
            else linear
        )
        return replace(item, bytes_per_element=dtype_bytes(KERNEL_FORMATS[label].weights))

    return ledger.edit(Kernel, kernel).edit(Resident, resident)
