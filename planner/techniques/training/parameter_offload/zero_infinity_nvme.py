"""Parameter offload to NVMe: weights live on the drives of the nodes and come up block by block.

What it does: as ``cpu``, and every rank's shard passes drives and host link, side by side, on its way up and back.
Saves: weights in device and host memory, save for two blocks' worth on the device.
Costs: as ``cpu``, at the pace of the slower of the rank's share of the drives and of its host link.
Assumes: as ``cpu``; what passes host memory on its way is there for a moment only.
Source: Rajbhandari et al. 2021 (ZeRO-Infinity, arXiv:2104.07857) §5.1, §6.1; its SC21 slides, github.com/deepspeedai/DeepSpeed,
    docs/assets/files/SC21-ZeRO-Infinity.pdf.
"""

from __future__ import annotations

from dataclasses import replace

from planner.ledger import Ledger, Transfer
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.parameter_offload.zero_infinity import trips_of
from planner.techniques.training.swap import nvme, swap

_KEY = "zero_infinity_nvme"


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Keeps weights on the drives, where an update on the device has to bring them back to."""
    return swap(ledger, trips_of(ledger), _KEY, tier="nvme")


def _together(subject: Pass) -> float:
    """Rate at which 64 nodes of 16 ranks bring the weights of one model up, at 28 GB/s of drives each."""
    ranks = 64 * 16
    ledger, _ = figures.run(
        "parameter_offload",
        subject,
        model="gpt2-xl",
        zero_stage="3",
        dp=ranks,
        parameter_offload="nvme",
        cluster="v100-sxm2-32gb:128x8",
    )
    forward = [i for i in ledger.of(Transfer, tier="nvme") if i.phase == "forward"]
    each = figures.transferred_bytes(replace(ledger, items=tuple(forward)), "nvme")
    return 2.0 * figures.parameters(ledger) / (each / (28e9 / 16)) if each else 0.0


TECHNIQUE = Technique(
    key=_KEY,
    name="Parameter offload to NVMe (ZeRO-Infinity)",
    slot="parameter_offload",
    choices=("nvme",),
    searched=False,  # for models whose weights alone exceed host memory
    source="arXiv:2104.07857",
    summary="Weights live on drives and come up block by block",
    figures=(
        Figure(
            "bytes per second of weights from the drives of 64 nodes, 28 GB/s each: 1,792 GB/s",
            1792e9,
            1e-3,
            "Rajbhandari et al. 2021 (ZeRO-Infinity), SC21 slides: 28 GB/s to 1.8 TB/s on 1 to 64 DGX-2 nodes",
            _together,
        ),
    ),
    moves=("parameters",),
    valid=nvme,
    apply=apply,
)
