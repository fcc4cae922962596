"""Universal checkpointing: a run goes on under another plan.

What it does: states are stored in parts that do not depend on the plan and loaded by any other; ``planner solve curriculum``
    weighs it against keeping the plan.
Saves: the choice of one plan for all phases of a run, or for all numbers of devices.
Costs: a checkpoint stored and loaded, and a restart.
Assumes: every device writes and reads an equal part at the store's rate.
Source: Lian et al. 2024 (Universal Checkpointing, arXiv:2406.18820) §4.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.costs.optimizer import optimizer_state_bytes
from planner.costs.precision import dtype_bytes
from planner.costs.reliability import resumed_s
from planner.technique import Figure, Technique


def _per_parameter(subject: Callable[..., float]) -> float:
    """Bytes that are stored and loaded per parameter of an Adam run, by a device that does it alone at a byte per second."""
    states = float(optimizer_state_bytes("adamw", master_bytes=dtype_bytes("fp32")))
    return float(subject(states, 1.0, 1.0, 1.0)) / 2.0


TECHNIQUE = Technique(
    key="universal_ckpt",
    name="Universal checkpointing",
    slot=None,
    kind="objective",
    source="arXiv:2406.18820",
    summary="States stored under one plan, loaded under another",
    figures=(
        Figure(
            "bytes per parameter of an atom checkpoint: fp32 weights and both moments",
            12.0,
            1e-9,
            "Lian et al. 2024 (arXiv:2406.18820), section 4: fp32 parameter and optimizer states, consolidated",
            _per_parameter,
        ),
    ),
    compose=resumed_s,
)
