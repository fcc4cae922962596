"""Activation offload: saved activations wait in host memory between forward and backward.

What it does: every saved tensor goes down after it is made and comes back before its block's backward, beside the work; with
    ``activation_offload_layers``, those of so many of a device's layers only.
Saves: activations of all micro-batches in flight, save for two blocks' worth of staging.
Costs: every saved byte over the host link twice per micro-batch; exposed where the link is slower than the block.
Assumes: the transfer of one block runs beside the work of the next; where some layers are offloaded, their transfers are spread
    evenly over all of them; host memory holds all micro-batches in flight.
Source: Rhu et al. 2016 (vDNN, arXiv:1602.08124); Rajbhandari et al. 2021 (ZeRO-Infinity, arXiv:2104.07857) §5.1.2; Megatron
    ``--cpu-offloading``, ``--cpu-offloading-num-layers``; spread over the layers: TransformerEngine ``cpu_offload.py``
    (``AsyncDoubleBufferGroupOffloadHandler``).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.ledger import Ledger, Phase, Resident, Transfer
from planner.technique import Context, Detail, Figure, Knob, Technique, whole_number
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.swap import Tier, Trip, host, swap

_TRIPS = (Trip("swap", "forward"), Trip("swap", "backward"))  # down, and up again
_LAYERS = "activation_offload_layers"
_OUTSIDE = ("embedding", "head", "boundary")


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Keeps saved tensors on the host from forward to backward."""
    return offload(ledger, ctx, "vdnn", "host")


def offload(ledger: Ledger, ctx: Context, by: str, tier: Tier) -> Ledger:
    """Keeps saved tensors in a slower tier from forward to backward."""
    layers = ctx.knobs.get(_LAYERS)
    if layers is None:
        return swap(ledger, lambda item: _TRIPS if item.lifetime == "micro_batch" else (), by, tier=tier)

    def of_a_layer(item: Resident) -> tuple[Trip, ...]:
        return _TRIPS if item.lifetime == "micro_batch" and item.block not in _OUTSIDE else ()

    own = (ctx.model.n_layers + sum(repeat for _, repeat in ctx.model.encoder_layers)) / ctx.mesh.pp
    share = np.minimum(layers / own, 1.0)
    ledger = ledger.set_axes(offloaded=share, offloaded_kept=1.0 - share)
    return swap(ledger, of_a_layer, by, "offloaded", tier)


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
    knobs=(
        Knob("activation_offload", "where saved activations live", ("none", "cpu", "cxl", "nvme"), "none"),
        Detail(
            _LAYERS,
            "layers per device whose activations are offloaded (all of them unless given)",
            read=whole_number,
            expected="a whole number from 1",
        ),
    ),
    figures=(
        Figure(
            "FLOP per byte of offloaded checkpoints, hidden size 8192, one layer per checkpoint: 24·h",
            24.0 * 8192,
            1e-6,
            "Rajbhandari et al. 2021 (ZeRO-Infinity, arXiv:2104.07857), section 4.1",
            _intensity,
        ),
    ),
    valid=host,
    apply=apply,
)
