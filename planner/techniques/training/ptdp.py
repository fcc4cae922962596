"""Megatron-LM's PTD-P: tensor parallelism inside a node, interleaved pipelines between nodes, data parallelism over all.

What it does: ``--preset ptdp`` fixes 8 tensor ranks, an interleaved schedule and messages between stages that are scattered
    over a node's links; pp and micro-batch size are searched.
Saves: traffic between nodes: tensor parallelism stays on NVLink, and a stage's message crosses once.
Costs: the bubble, divided by the stages that a device holds.
Assumes: as its members.
Source: Narayanan et al. 2021 (arXiv:2104.04473) §3, §4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.technique import Figure, Technique
from planner.techniques import figures


def _message(fixes: Mapping[str, Any]) -> float:
    """Elements that a rank sends to the next stage of GPT-3 175B per micro-batch of one sequence."""
    degrees = {name: fixes[name] for name in ("tp",) if name in fixes}
    knobs = {name: value for name, value in fixes.items() if name not in (*degrees, "schedule")}
    ledger, _ = figures.recipe(model="gpt3-175b", pp=8, cluster="a100-sxm-80gb:8x8", **degrees, **knobs)
    return figures.sent_elements(
        ledger, lambda item: item.kind == "point_to_point" and item.phase == "forward"
    )


TECHNIQUE = Technique(
    key="ptdp",
    name="Megatron PTD-P",
    slot=None,
    kind="preset",
    source="arXiv:2104.04473",
    summary="8 tensor ranks, interleaved pipelines, scattered messages",
    fixes={
        "tp": 8,
        "tensor": "1d",
        "sequence_parallel": "false",
        "pipeline": "scatter_gather",
        "schedule": "interleaved",
    },
    figures=(
        Figure(
            "elements between consecutive stages of GPT-3 175B with 8 tensor ranks: bsh/t",
            2048.0 * 12288 / 8,
            1e-9,
            "Narayanan et al. 2021 (arXiv:2104.04473), section 4.1: scatter/gather reduces bsh to bsh/t",
            _message,
        ),
    ),
)
