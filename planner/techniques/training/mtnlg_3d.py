"""Megatron-Turing NLG 530B: 8 tensor ranks, 35 stages, and ZeRO's first stage over as many replicas as there is room for.

What it does: ``--preset mtnlg_3d`` fixes these; a replica spans 280 devices.
Saves: as its members.
Costs: as its members.
Assumes: as its members.
Source: Smith et al. 2022 (arXiv:2201.11990) §3; Narayanan et al. 2021 (arXiv:2104.04473), Table 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.ledger import Ledger, Resident
from planner.technique import Figure, Technique
from planner.techniques import figures


def _replica(fixes: Mapping[str, Any]) -> float:
    """Devices that hold one copy of the weights: parameters of a layer over what one device holds of it, times the stages."""
    tp = float(fixes.get("tp", 1))
    cut, _ = figures.recipe(model="megatron-529.6b", tp=tp, cluster="a100-sxm-80gb:1x8")
    whole, _ = figures.recipe(model="megatron-529.6b", cluster="a100-sxm-80gb:1x8")
    products = [sum(_weights(ledger)) for ledger in (whole, cut)]
    return products[0] / products[1] * float(fixes.get("pp", 1))


def _weights(ledger: Ledger) -> list[float]:
    held = ledger.of(Resident, pool="parameters", lifetime="always", block="dense")
    return [figures.total_bytes(ledger, [item]) for item in held]


TECHNIQUE = Technique(
    key="mtnlg_3d",
    name="MT-NLG 530B",
    slot=None,
    kind="preset",
    source="arXiv:2201.11990",
    summary="tp 8, pp 35, ZeRO stage 1",
    fixes={"tp": 8, "pp": 35, "zero_stage": "1"},
    figures=(
        Figure(
            "devices of one replica of the 530B model",
            280.0,
            1e-3,  # norms and biases are whole on every tensor rank
            "Narayanan et al. 2021 (arXiv:2104.04473), Table 2: model-parallel size of the 529.6B model",
            _replica,
        ),
    ),
)
