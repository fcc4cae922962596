"""Activation offload: saved activations wait in host memory between forward and backward.

What it does: every saved tensor goes down after it is made and comes back before its block's backward, beside the work.
Saves: activations of all micro-batches in flight, save for two blocks' worth of staging.
Costs: every saved byte over the host link twice per micro-batch; exposed where the link is slower than the block.
Assumes: the transfer of one block runs beside the work of the next; host memory holds all micro-batches in flight.
Source: Rhu et al. 2016 (vDNN, arXiv:1602.08124); Megatron ``--cpu-offloading``.
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
    """Moves kept tensors to the host; adds the traffic and the staging buffers."""
    added: list[Item] = []

    def residency(item: Resident) -> Item | None:
        if item.lifetime != "micro_batch":
            return None
        for phase in ("forward", "backward"):
            added.append(
                Transfer(
                    what=f"{item.what}.swap", block=item.block, phase=phase, tags=item.tags | {"offload"}, by="activation_swap",
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
                by="activation_swap",
            )
        )
        return replace(item, tier="host", by="activation_swap")

    return ledger.edit(Resident, residency).add(added)


TECHNIQUE = Technique(
    key="vdnn",
    name="Activation offload to host memory",
    slot="activation_offload",
    choices=("cpu",),
    source="arXiv:1602.08124",
    summary="Saved activations wait in host memory",
    knobs=(Knob("activation_offload", "where saved activations live", ("none", "cpu"), "none"),),
    valid=valid,
    apply=apply,
)
