"""The optimizer family: what each keeps per parameter, and what its update moves.

What it does: adds moments, and one update kernel per block and step; a pass over the gradients for their global norm.
Saves: nothing.
Costs: moment bytes per parameter, and the update's traffic (read and write of weights, master weights, moments, gradients).
Assumes: element-wise updates are one fused kernel at memory bandwidth.
Source: AdamW arXiv:1711.05101; Adafactor arXiv:1804.04235; 8-bit Adam arXiv:2110.02861; Lion arXiv:2302.06675; LAMB
    arXiv:1904.00962; Muon (K. Jordan, 2024).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from planner.costs.optimizer import KNOWN_OPTIMIZERS, optimizer_state_bytes, optimizer_touched_bytes
from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Ledger, Resident, Stream
from planner.technique import Context, Knob, Technique


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Adds moments, gradient norm and update."""
    moments = optimizer_state_bytes(ctx.knobs["optimizer"], master_bytes=0.0)
    gradient = dtype_bytes(ctx.knobs.get("gradient_dtype", ctx.format.gradient))
    weight = dtype_bytes(ctx.format.activation)
    master = 4.0 if ctx.format.master else 0.0
    touched = float(optimizer_touched_bytes(moments + master, gradient, weight if master else 2 * weight))
    added: list[Item] = []
    for weights in ledger.of(Resident, pool="parameters"):
        tags = (weights.tags - {"parameters"}) | {"optimizer"}
        common: dict[str, Any] = {"block": weights.block, "by": "optimizer_bytes", "size": weights.size}
        if moments:
            added.append(
                replace(
                    weights,
                    what=weights.what.replace("parameters", "moments"),
                    pool="optimizer",
                    tags=tags,
                    bytes_per_element=moments,
                    by="optimizer_bytes",
                )
            )
        added.append(
            Stream(
                what=weights.what.replace("parameters", "update"),
                phase="step",
                tags=tags | {"update"},
                bytes_per_element=touched,
                **common,
            )
        )
        added.append(
            Stream(
                what=weights.what.replace("parameters", "gradient_norm"),
                phase="step",
                tags=tags | {"gradient_norm"},
                bytes_per_element=gradient,
                **common,
            )
        )
    return ledger.add(added)


TECHNIQUE = Technique(
    key="optimizer_bytes",
    name="Optimizer states and update",
    slot="optimizer",
    choices=tuple(KNOWN_OPTIMIZERS),
    default=True,
    source="arXiv:1711.05101",
    summary="Moments per parameter and the traffic of the update",
    knobs=(Knob("optimizer", "optimizer family"),),
    apply=apply,
)
