"""What the precision techniques share: which dtype products, activations, weights, gradients and states take."""

from __future__ import annotations

from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Kernel, Ledger, Matmul, Resident, Stream
from planner.technique import Context

__all__ = ["WIDE", "switch_dtypes"]

WIDE = frozenset({"core_attn", "head", "router", "adapter"})
"""Products that are never quantised."""


def switch_dtypes(ledger: Ledger, ctx: Context, by: str) -> Ledger:
    """Gives every item the dtype of the recipe's format, and the optimizer its fp32 master weights."""
    formats = ctx.format
    ratio = dtype_bytes(formats.activation) / dtype_bytes("fp32")
    masters: list[Item] = []

    def kernel(item: Kernel) -> Item | None:
        if isinstance(item, Matmul):
            dtype = formats.core if item.tags & WIDE else formats.matmul
            # Narrow operands, but results as wide as activations are.
            wide = (
                dtype_bytes(formats.activation)
                if dtype_bytes(dtype) < dtype_bytes(formats.activation)
                else None
            )
            return item.but(
                dtype=dtype,
                out_bytes=item.out_bytes if item.out_bytes is not None else wide,
                format="" if item.tags & WIDE else formats.kernels,
            )
        if isinstance(item, Stream) and "activation" in item.tags:
            return item.but(bytes_per_element=item.bytes_per_element * ratio)
        return None

    def resident(item: Resident) -> Item | None:
        if "linear_input" in item.tags:
            return item.but(bytes_per_element=formats.linear_input_bytes)
        if "activation" in item.tags:
            return item.but(bytes_per_element=item.bytes_per_element * ratio)
        if item.pool == "parameters" and "narrow" in item.tags:
            return None  # held in a format of its own
        if item.pool == "parameters":
            if formats.master and "frozen" not in item.tags:
                tags = (item.tags - {"parameters"}) | {"optimizer"}
                what = item.what.replace("parameters", "master_weights")
                masters.append(item.but(what=what, pool="optimizer", tags=tags, by=by))
            return item.but(bytes_per_element=dtype_bytes(formats.activation))
        if item.pool == "gradients":
            return item.but(bytes_per_element=dtype_bytes(ctx.gradient_dtype))
        return None

    return ledger.edit(Kernel, kernel).edit(Resident, resident).add(masters)
