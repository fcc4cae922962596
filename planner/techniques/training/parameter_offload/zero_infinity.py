"""Parameter offload: weights live in host memory and come up block by block.

What it does: every rank brings its shard of the next block's weights up while the current block works, forward and backward.
Saves: weights on the device, save for two blocks' worth.
Costs: the weights over the host link twice per micro-batch.
Assumes: transfers run beside the previous block; ranks bring up disjoint shards when weights are sharded (bandwidth-centric
    placement); gradients stay on the device.
Source: Rajbhandari et al. 2021 (ZeRO-Infinity, arXiv:2104.07857) §5.1, §6.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from planner.ledger import Item, Ledger, Resident, Transfer
from planner.technique import Check, Context, Knob, Technique


def valid(ctx: Context) -> Iterable[Check]:
    """There must be a host to offload to."""
    yield Check("no host memory is described for this cluster", ctx.cluster.host_memory_bytes > 0)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Moves weights to the host; adds the traffic and the staging buffers."""
    added: list[Item] = []

    def residency(item: Resident) -> Item | None:
        if item.pool != "parameters":
            return None
        for phase in ("forward", "backward"):
            added.append(
                Transfer(
                    what=f"{item.what}.fetch", block=item.block, phase=phase, tags=item.tags | {"offload"}, by="zero_infinity",
                    track="host", size=item.size, bytes_per_element=item.bytes_per_element,
                )
            )  # fmt: skip
        added.append(
            replace(
                item,
                what=f"{item.what}.staging",
                lifetime="block",
                pool="buffers",
                bytes_per_element=2 * item.bytes_per_element,
                by="zero_infinity",
            )
        )
        return replace(item, tier="host", by="zero_infinity")

    return ledger.edit(Resident, residency).add(added)


TECHNIQUE = Technique(
    key="zero_infinity",
    name="Parameter offload (ZeRO-Infinity)",
    slot="parameter_offload",
    choices=("cpu",),
    source="arXiv:2104.07857",
    summary="Weights live in host memory and come up block by block",
    knobs=(Knob("parameter_offload", "where weights live", ("none", "cpu"), "none"),),
    valid=valid,
    apply=apply,
)
