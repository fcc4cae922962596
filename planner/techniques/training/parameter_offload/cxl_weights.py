"""Parameter offload to CXL memory: weights come up block by block, and DRAM is left to what the host's cores work on.

What it does: as ``cpu``, with the weights in CXL memory.
Saves: as ``cpu``; and DRAM, for states that are updated there.
Costs: as ``cpu``, at the pace of the slower of the host link and CXL memory, whose rate and size all that lives there shares.
Assumes: as ``cpu``; pages are spread over all cards, so that these are one memory with their rates together.
Source: Liaw and Chen 2025 (arXiv:2507.03305) §IV; github.com/DandinPower/CXL-Aware-LLM-Finetuning @222848b
    (``utils/cxl_aware_allocator.py``, ``utils/numa_allocation_patch.py``).
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.parameter_offload.zero_infinity import trips_of
from planner.techniques.training.swap import cxl, swap

_KEY = "cxl_weights"


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Keeps weights in CXL memory, where an update on the device has to bring them back to."""
    return swap(ledger, trips_of(ledger), _KEY, tier="cxl")


def _weight_bytes(subject: Pass) -> float:
    """Bytes of weights in CXL memory per parameter."""
    ledger, _ = figures.run(
        "parameter_offload", subject, model="gpt2-xl", precision="fp16", parameter_offload="cxl"
    )
    return figures.held_bytes(ledger, "parameters", tier="cxl") / figures.parameters(ledger)


TECHNIQUE = Technique(
    key=_KEY,
    name="Parameter offload to CXL memory",
    slot="parameter_offload",
    choices=("cxl",),
    searched=False,  # for hosts whose DRAM is too small for them
    source="arXiv:2507.03305",
    summary="Weights live in CXL memory and come up block by block",
    figures=(
        Figure(
            "bytes of 16-bit weights in CXL memory per parameter",
            2.0,
            1e-6,
            "Liaw and Chen 2025 (arXiv:2507.03305), their allocator (numa_allocation_patch.py): weights, of the second level",
            _weight_bytes,
        ),
    ),
    moves=("parameters",),
    valid=cxl,
    apply=apply,
)
