"""Cross-replica sharding of the weight update (Xu et al.): ZeRO's first stage before it was called so.

What it does: gradients are reduce-scattered, every replica updates its share of the weights, and the new weights are gathered;
    ``--preset wus_xu`` is ``zero_stage=1``.
Saves: the update's time and states, divided by the replicas, for as many bytes as an all-reduce sends.
Costs: nothing but the gather's wait.
Assumes: as ``zero_stage=1``.
Source: Xu et al. 2020 (arXiv:2004.13336) §3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.technique import Figure, Technique
from planner.techniques import figures


def _share(fixes: Mapping[str, Any]) -> float:
    """Share of the weight update's states that each of 8 replicas holds."""
    sharded, _ = figures.recipe(model="gpt2-xl", dp=8, **{"zero_stage": "0", **fixes})
    whole, _ = figures.recipe(model="gpt2-xl", dp=8, zero_stage="0")
    return figures.held_bytes(sharded, "optimizer") / figures.held_bytes(whole, "optimizer")


TECHNIQUE = Technique(
    key="wus_xu",
    name="Sharded weight update (Xu et al.)",
    slot=None,
    kind="preset",
    source="arXiv:2004.13336",
    summary="Every replica updates its share of the weights",
    fixes={"zero_stage": "1"},
    figures=(
        Figure(
            "share of the weight update that each of 8 replicas computes: 1/N",
            1.0 / 8.0,
            1e-9,
            "Xu et al. 2020 (arXiv:2004.13336), abstract and section 3: the update is distributed across replicas",
            _share,
        ),
    ),
)
