"""CoLLiE: full-parameter tuning with updates fused into the backward, on weights that all devices share.

What it does: ``--preset collie`` is ``optimizer=lomo`` with ZeRO stage 3; its library also has AdaLomo, adapters and the
    degrees of a 3-D mesh, which are choices of their own.
Saves: gradients and optimizer states.
Costs: as LOMO.
Assumes: as its members.
Source: Lv et al. 2023 (CoLLiE, EMNLP 2023 demonstrations); Lv et al. 2023 (LOMO, arXiv:2306.09782) §3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.technique import Figure, Technique
from planner.techniques import figures


def _states(fixes: Mapping[str, Any]) -> float:
    """Bytes of weights and states that all 8 devices hold, per parameter."""
    choices = {"optimizer": "adamw", "zero_stage": "1", **fixes}
    ledger, _ = figures.recipe(model="gpt2-xl", precision="fp16", dp=8, **choices)
    whole, _ = figures.recipe(model="gpt2-xl", precision="fp16")
    return 8.0 * figures.held_bytes(ledger, "parameters", "optimizer") / figures.parameters(whole)


TECHNIQUE = Technique(
    key="collie",
    name="CoLLiE",
    slot=None,
    kind="preset",
    source="EMNLP 2023 demonstrations (Lv et al.)",
    summary="LOMO on shared weights",
    fixes={"optimizer": "lomo", "zero_stage": "3"},
    figures=(
        Figure(
            "bytes per parameter of fp16 weights and optimizer states together: the weights alone",
            2.0,
            1e-9,
            "Lv et al. 2023 (arXiv:2306.09782), section 3.1: no optimizer states; weights are what is left",
            _states,
        ),
    ),
)
