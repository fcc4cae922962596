"""ZeRO-Offload: optimizer states live in host memory, and the host's cores run the update.

What it does: moves optimizer states (master weights, moments) to the host; gradients go down, new weights come up.
Saves: the optimizer's device memory, and its update kernels.
Costs: gradients and weights of the rank's shard over the host link once per step; the update at host-memory bandwidth.
Assumes: the update is bandwidth-bound on the host (vectorised CPU Adam) and is not delayed by a step; tiles overlap neither
    with the backward nor with each other.
Source: Ren et al. 2021 (arXiv:2101.06840) §4; Megatron ``--optimizer-cpu-offload``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Ledger, Resident, Stream, Transfer
from planner.technique import Check, Context, Knob, Technique


def valid(ctx: Context) -> Iterable[Check]:
    """There must be a host to offload to."""
    yield Check("no host memory is described for this cluster", ctx.cluster.host_memory_bytes > 0)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Moves states and update to the host."""
    down = dtype_bytes(ctx.knobs.get("gradient_dtype", ctx.format.gradient))
    up = dtype_bytes(ctx.format.activation)
    added: list[Item] = []

    def residency(item: Resident) -> Item | None:
        if item.pool != "optimizer":
            return None
        return replace(item, tier="host", by="zero_offload")

    for item in ledger.of(Stream):
        if "update" not in item.tags:
            continue
        common: dict[str, Any] = {
            "block": item.block,
            "phase": "step",
            "tags": item.tags | {"offload"},
            "by": "zero_offload",
            "size": item.size,
        }
        added += [
            Transfer(
                what=f"{item.what}.on_host",
                bytes_per_element=item.bytes_per_element,
                tier="host_memory",
                **common,
            ),
            Transfer(
                what=f"{item.what}.down_and_up", bytes_per_element=down + up, tier="host_link", **common
            ),
        ]
    return (
        ledger.edit(Resident, residency)
        .drop(lambda i: isinstance(i, Stream) and "update" in i.tags)
        .add(added)
    )


TECHNIQUE = Technique(
    key="zero_offload",
    name="ZeRO-Offload (optimizer states on the host)",
    slot="optimizer_offload",
    choices=("cpu",),
    source="arXiv:2101.06840",
    summary="Optimizer states and update on the host",
    knobs=(Knob("optimizer_offload", "where optimizer states live", ("none", "cpu"), "none"),),
    valid=valid,
    apply=apply,
)
