"""FlashNeuron: saved activations wait on NVMe between forward and backward.

What it does: as ``cpu``, to drives that the device writes to and reads from directly; with ``activation_offload_layers``, those
    of so many of a device's layers only, so that the drives keep up with the forward.
Saves: activations of all micro-batches in flight, save for two blocks' worth of staging; host memory stays free.
Costs: every saved byte twice per micro-batch over the rank's share of the drives and its host link.
Assumes: as ``cpu``; nothing is compressed, as the authors do with sparse activations.
Source: Bae et al. 2021 (FlashNeuron, USENIX FAST) §4.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.ledger import Ledger, Transfer
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.activation_offload.vdnn import offload
from planner.techniques.training.swap import nvme

_KEY = "flashneuron"


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Keeps saved tensors on the drives from forward to backward."""
    return offload(ledger, ctx, _KEY, "nvme")


def _rate(subject: Pass) -> float:
    """Bytes per second of one device's activations, where 16 share drives of 28 GB/s."""
    from planner.engine import Pricer

    ledger, ctx = figures.run(
        "activation_offload",
        subject,
        model="gpt2-xl",
        activation_offload="nvme",
        cluster="v100-sxm2-32gb:1x8",
    )
    pricer = Pricer(replace(ctx.cluster, nvme_bytes_per_s=28e9 / 16), ctx.stack)
    moved = ledger.of(Transfer, tier="nvme")
    seconds = sum(float(np.ravel(price)[0]) for price in pricer.prices(moved, ledger.axes))
    return figures.transferred_bytes(ledger, "nvme") / seconds if seconds else 0.0


TECHNIQUE = Technique(
    key=_KEY,
    name="Activation offload to NVMe (FlashNeuron)",
    slot="activation_offload",
    choices=("nvme",),
    searched=False,  # where host memory is too small for them
    source="USENIX FAST 2021 (Bae et al.)",
    summary="Saved activations wait on drives",
    figures=(
        Figure(
            "bytes per second of one device's activations to the drives of a DGX-2: 1.75 GB/s",
            1.75e9,
            1e-6,
            "Rajbhandari et al. 2021 (ZeRO-Infinity), SC21 slides: required and available bandwidth, 64 DGX-2 nodes",
            _rate,
        ),
    ),
    valid=nvme,
    apply=apply,
)
