"""What schedules that split the backward share: the operands of a weight gradient wait for it.

Between the backward of a micro-batch and its weight gradient a device holds, for every product with weights, the
product's input and the gradient of its output; all else that the forward saved is free. Source: Qi et al. 2024
(arXiv:2401.10241) Table 2: 32sbh of a GPT layer, 16 bit: 14sbh of inputs and 18sbh of gradients of outputs.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Ledger, Matmul, Resident, times
from planner.technique import Context

__all__ = ["hold_weight_inputs"]


def hold_weight_inputs(ledger: Ledger, ctx: Context) -> Ledger:
    """Adds what weight gradients wait with."""
    return ledger.add(_operands(ledger))


def _operands(ledger: Ledger) -> Iterable[Item]:
    for product in ledger.of(Matmul, phase="weight"):
        for operand, width in (("input", product.m), ("output_gradient", product.n)):
            yield Resident(
                what=f"{product.what}.{operand}", block=product.block, tags=product.tags | {"weight_input"}, by="zero_bubble",
                source="arXiv:2401.10241", size=times(times(width, product.k), product.groups),
                bytes_per_element=dtype_bytes(product.dtype), pool="activations", lifetime="weight_input",
            )  # fmt: skip
