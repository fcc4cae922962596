"""SmartMoE's placement: experts dealt to devices so that the busiest device has the least load.

What it does: places one layer's experts by their measured loads, equally many on each device; ``planner solve experts``. With
    transitions between layers it places all layers' experts so that most tokens stay where they are.
Saves: the wait of all devices for the one with the popular experts.
Costs: experts move when loads change.
Assumes: loads are known and last longer than a move takes.
Source: Zhai et al. 2023 (SmartMoE, USENIX ATC 2023) §5; transitions: Yao et al. 2024 (ExFlow, arXiv:2401.08383).
"""

from __future__ import annotations

from typing import Any

from planner.technique import Technique
from planner.techniques import figures

_DEVICES = 4


def _balance(loads: Any, devices: int) -> float:
    from planner.solve.combinatorial.experts import balance

    return max(balance(loads, devices).loads)


def _longest_first(loads: Any, devices: int) -> float:
    import numpy as np

    from planner.solve.combinatorial.experts import longest_first

    device = longest_first(loads, devices, -(-len(loads) // devices))
    return float(np.bincount(device, weights=loads).max())


TECHNIQUE = Technique(
    key="smartmoe",
    name="SmartMoE (placement)",
    slot=None,
    kind="solver",
    source="USENIX ATC 2023 (Zhai et al.)",
    summary="Experts to devices by load, or by affinity between layers",
    figures=(
        figures.graham_figure(
            "load of the busiest device",
            _DEVICES,
            lambda subject: float(subject(figures.graham_jobs(_DEVICES), _DEVICES)),
        ),
    ),
    solve=_balance,
    naive=_longest_first,
)
