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

from planner.ledger import Ledger
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.activation_offload.vdnn import offload
from planner.techniques.training.swap import nvme

_KEY = "flashneuron"


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Keeps saved tensors on the drives from forward to backward."""
    return offload(ledger, ctx, _KEY, "nvme")


def _visits(subject: Pass) -> float:
    """Bytes of a layer of GPT-3 175B over the drives per micro-batch, in units of sbh."""
    ledger, _ = figures.run("activation_offload", subject, model="gpt3-175b", activation_offload="nvme")
    layers = [
        item for item in ledger.items if getattr(item, "block", "") not in ("embedding", "head", "boundary")
    ]
    return figures.transferred_bytes(replace(ledger, items=tuple(layers)), "nvme") / (2048 * 12288)


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
            "bytes per layer of GPT-3 175B over the drives, in sbh: out and back, 34 + 5as/h each way",
            2.0 * 114.0,
            1e-6,
            "Bae et al. 2021, abstract: offloaded to the SSD; what is saved: Korthikanti et al. 2022 (arXiv:2205.05198), Table 2",
            _visits,
        ),
    ),
    valid=nvme,
    apply=apply,
)
