"""Activation offload to CXL memory: DRAM is left to what the host's cores work on.

What it does: as ``cpu``, with saved activations in CXL memory, which streams them to the device and back.
Saves: as ``cpu``; and DRAM, for states that are updated there (``optimizer_offload=cpu``).
Costs: as ``cpu``, at the pace of the slower of the host link and CXL memory, whose rate and size all that lives there shares.
Assumes: as ``cpu``; pages are spread over all cards, so that these are one memory with their rates together.
Source: Liaw and Chen 2025 (arXiv:2507.03305) §IV; github.com/DandinPower/CXL-Aware-LLM-Finetuning @222848b
    (``utils/cxl_aware_allocator.py``, ``utils/numa_allocation_patch.py``).
"""

from __future__ import annotations

from planner.ledger import Ledger, Resident
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.activation_offload.vdnn import offload
from planner.techniques.training.swap import cxl

_KEY = "cxl_offload"


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Keeps saved tensors in CXL memory from forward to backward."""
    return offload(ledger, ctx, _KEY, "cxl")


def _checkpoints(subject: Pass) -> float:
    """Bytes in CXL memory of a recomputed layer's checkpoint, per token and unit of width."""
    ledger, ctx = figures.run(
        "activation_offload", subject, model="gpt2-xl", recompute="full", activation_offload="cxl"
    )
    held = [item for item in ledger.of(Resident, tier="cxl") if item.block not in ("embedding", "head")]
    return figures.total_bytes(ledger, held) / (2048 * ctx.model.hidden)


TECHNIQUE = Technique(
    key=_KEY,
    name="Activation offload to CXL memory",
    slot="activation_offload",
    choices=("cxl",),
    searched=False,  # for hosts whose DRAM is too small for them
    source="arXiv:2507.03305",
    summary="Saved activations wait in CXL memory, DRAM is left to the optimizer",
    figures=(
        Figure(
            "bytes of a checkpoint in CXL memory per token and unit of width: batch · seq · hidden · layers · 2",
            2.0,
            1e-6,
            "Liaw and Chen 2025 (arXiv:2507.03305), their allocator (numa_allocation_patch.py): activations, of the third level",
            _checkpoints,
        ),
    ),
    valid=cxl,
    apply=apply,
)
