"""What the weight formats share: which items of an iteration take which number format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Kernel, Ledger, Matmul, Resident, Stream
from planner.specs.formats import KERNEL_FORMATS
from planner.technique import ServingContext

__all__ = ["ENDS", "WIDE", "one_format", "store"]

WIDE = frozenset({"core_attn", "head", "router", "relative", "indexer"})
"""Products that are never quantised."""

ENDS = ("embedding", "head")
_WIDE_LABEL = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

_SAME: Mapping[str, str] = MappingProxyType({})


def one_format(by: str, heads: Mapping[str, str] = _SAME) -> Callable[[Ledger, ServingContext], Ledger]:
    """The pass of a technique, called ``by``, that gives linear layers and experts the format that the knob names.

    ``heads`` names the output projection's format where it is not that of the activations.
    """

    def apply(ledger: Ledger, ctx: ServingContext) -> Ledger:
        """Switches the format of linear layers and experts by tag."""
        label = str(ctx.knobs["weights"])
        return store(ledger, ctx, label, label, by, heads.get(label, ""))

    return apply


def store(ledger: Ledger, ctx: ServingContext, linear: str, experts: str, by: str, head: str = "") -> Ledger:
    """Gives linear layers and experts a format of :data:`~planner.specs.formats.KERNEL_FORMATS`, and all else 16 bits.

    Args:
        ledger: an iteration in fp32.
        ctx: its context.
        linear: format of attention's projections and of dense networks; empty: as activations.
        experts: format of routed experts; empty: as activations.
        by: key of the technique.
        head: format of the output projection; empty: as activations.
    """
    activation = ctx.format.activation
    wide = _WIDE_LABEL[activation]
    linear, experts, head = linear or wide, experts or wide, head or wide

    def kernel(item: Kernel) -> Item | None:
        if isinstance(item, Matmul):
            label = experts if item.grouped else linear
            if item.tags & WIDE:
                label = head if "head" in item.tags else wide
            form = KERNEL_FORMATS[label]
            out = dtype_bytes(activation) if item.out_bytes is None else item.out_bytes
            return item.but(
                dtype=form.dtype, format=label, out_bytes=out, by=item.by if label == wide else by
            )
        if isinstance(item, Stream) and "activation" in item.tags:
            return item.but(
                bytes_per_element=item.bytes_per_element * dtype_bytes(activation) / dtype_bytes("fp32")
            )
        return None

    def resident(item: Resident) -> Item | None:
        if item.pool != "parameters":
            return None
        label = (
            head
            if item.block == "head"
            else wide
            if item.block in ENDS or "tied" in item.tags
            else experts
            if "expert" in item.tags
            else linear
        )
        return item.but(bytes_per_element=dtype_bytes(KERNEL_FORMATS[label].weights))

    return ledger.edit(Kernel, kernel).edit(Resident, resident)
