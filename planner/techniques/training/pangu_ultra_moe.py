"""Pangu Ultra MoE: experts spread over the tensor ranks as well, so that none is cut, and pipelines of two chunks.

What it does: ``--preset pangu_ultra_moe`` fixes 8 tensor ranks, 16 stages of two chunks, and 32 expert ranks: 4 times the tensor
    ranks, which hold whole experts.
Saves: narrow products: an expert of width 2048 stays one.
Costs: exchanges of tokens among 32 ranks.
Assumes: as its members. Its hierarchical exchange between nodes, and what it hides of it, are not part of the preset.
Source: Tang et al. 2025 (Pangu Ultra MoE, arXiv:2505.04519), its degrees by two summaries of the text; the experts' spreading,
    github.com/Ascend/MindSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.ledger import Resident
from planner.technique import Figure, Technique
from planner.techniques import figures

_EXPERTS = 256


def _held(fixes: Mapping[str, Any]) -> float:
    """Whole experts of a layer's 256 that a rank holds, by their weights."""
    degrees = {name: fixes[name] for name in ("tp", "ep", "etp") if name in fixes}
    held = []
    for chosen in ({}, {**degrees, "dp": 4, "sequence_parallel": fixes.get("sequence_parallel", "false")}):
        ledger, _ = figures.recipe(model="deepseek-v3", cluster="a100-sxm-80gb:4x8", **chosen)
        every = ledger.of(Resident, pool="parameters", lifetime="always")
        held.append(figures.total_bytes(ledger, [item for item in every if item.what == "expert_parameters"]))
    return _EXPERTS * held[1] / held[0]


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
            "experts of a layer's 256 that a rank holds: 256/(8·4)",
            8.0,
            1e-9,
            "github.com/Ascend/MindSpeed @028de58, tp_extend_ep/moe_layer.py: num_local_experts, tp 8, ep 4 (--moe-tp-extend-ep)",
            _held,
        ),
    ),
)  # fmt: skip
