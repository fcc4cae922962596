"""Activation offload: saved activations wait in host memory between forward and backward.

What it does: every saved tensor goes down after it is made and comes back before its block's backward, beside the work.
Saves: activations of all micro-batches in flight, save for two blocks' worth of staging.
Costs: every saved byte over the host link twice per micro-batch; exposed where the link is slower than the block.
Assumes: the transfer of one block runs beside the work of the next; host memory holds all micro-batches in flight.
Source: Rhu et al. 2016 (vDNN, arXiv:1602.08124); Rajbhandari et al. 2021 (ZeRO-Infinity, arXiv:2104.07857) §5.1.2; Megatron
    ``--cpu-offloading``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from planner.ledger import Item, Ledger, Phase, Resident, Transfer
from planner.technique import Check, Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass

_TRIPS: tuple[Phase, ...] = ("forward", "backward")  # down, and up again


def valid(ctx: Context) -> Iterable[Check]:
    """There must be a host to offload to."""
    yield Check("no host memory is described for this cluster", ctx.cluster.host_memory_bytes > 0)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Moves kept tensors to the host; adds the traffic and the staging buffers."""
    added: list[Item] = []

    def offload(item: Resident) -> Item | None:
        if item.lifetime != "micro_batch":
            return None
        added.extend(
            Transfer(
                what=f"{item.what}.swap", block=item.block, phase=phase, tags=item.tags | {"offload"}, by="vdnn", track="host",
                size=item.size, bytes_per_element=item.bytes_per_element,
            )
            for phase in _TRIPS
        )  # fmt: skip
        staged = 2 * item.bytes_per_element
        staging = replace(
            item, what=f"{item.what}.staging", lifetime="block", pool="buffers", bytes_per_element=staged
        )
        added.append(replace(staging, by="vdnn"))
        return replace(item, tier="host", by="vdnn")

    return ledger.edit(Resident, offload).add(added)


def _intensity(subject: Pass) -> float:
    """FLOP of the linear layers of a recomputed layer of width 8192, per byte of its checkpoint down and up."""
    ledger, _ = figures.run(
        "activation_offload",
        subject,
        model="megatron-39.1b",
        seq=2048,
        recompute="full",
        activation_offload="cpu",
    )
    phases: tuple[Phase, ...] = ("forward", "recompute", "backward", "weight")
    work = figures.flop(ledger, *phases, where=lambda item: "core_attn" not in item.tags)
    layers = [item for item in ledger.of(Transfer) if item.block not in ("embedding", "head")]
    moved = figures.transferred_bytes(replace(ledger, items=tuple(layers)))
    return work / moved if moved else 0.0


TECHNIQUE = Technique(
    key="vdnn",
    name="Activation offload to host memory",
    slot="activation_offload",
    choices=("cpu",),
    source="arXiv:1602.08124",
    summary="Saved activations wait in host memory",
    knobs=(Knob("activation_offload", "where saved activations live", ("none", "cpu"), "none"),),
    figures=(
        Figure(
            "FLOP per byte of offloaded checkpoints, hidden size 8192, one layer per checkpoint: 24·h",
            24.0 * 8192,
            1e-6,
            "Rajbhandari et al. 2021 (ZeRO-Infinity, arXiv:2104.07857), section 4.1",
            _intensity,
        ),
    ),
    valid=valid,
    apply=apply,
)
