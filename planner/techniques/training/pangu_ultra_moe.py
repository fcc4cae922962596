"""Pangu Ultra MoE: experts spread over the tensor ranks as well, so that none is cut, and pipelines of two chunks.

What it does: ``--preset pangu_ultra_moe`` fixes 8 tensor ranks, 16 stages of two chunks, and 32 expert ranks: 4 times the tensor
    ranks, which hold whole experts.
Saves: narrow products: an expert of width 2048 stays one.
Costs: exchanges of tokens among 32 ranks.
Assumes: as its members. Its hierarchical exchange between nodes, and what it hides of it, are not part of the preset.
Source: Tang et al. 2025 (Pangu Ultra MoE, arXiv:2505.04519).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.ledger import Resident
from planner.technique import Figure, Technique
from planner.techniques import figures


def _exchanging(fixes: Mapping[str, Any]) -> float:
    """Ranks that hold the 256 experts of a layer: their weights, over what one of them holds."""
    degrees = {name: fixes[name] for name in ("tp", "ep", "etp") if name in fixes}
    held = []
    for chosen in ({}, {**degrees, "dp": 4, "sequence_parallel": fixes.get("sequence_parallel", "false")}):
        ledger, _ = figures.recipe(model="deepseek-v3", cluster="a100-sxm-80gb:4x8", **chosen)
        every = ledger.of(Resident, pool="parameters", lifetime="always")
        held.append(figures.total_bytes(ledger, [item for item in every if item.what == "expert_parameters"]))
    return held[0] / held[1]


TECHNIQUE = Technique(
    key="pangu_ultra_moe",
    name="Pangu Ultra MoE",
    slot=None,
    kind="preset",
    source="arXiv:2505.04519",
    summary="tp 8, pp 16 in two chunks, 32 expert ranks across the tensor ranks",
    fixes={
        "tp": 8, "pp": 16, "virtual_stages": 2, "schedule": "interleaved", "ep": 32, "etp": 1, "micro_batch_size": 2,
        "sequence_parallel": "true",
    },
    figures=(
        Figure(
            "ranks among which the tokens of a layer of 256 experts are exchanged",
            32.0,
            1e-9,
            "Tang et al. 2025 (arXiv:2505.04519): tensor and expert ranks, 8·4, as one group; by two summaries of its text",
            _exchanging,
            second_hand=True,
        ),
    ),
)  # fmt: skip
