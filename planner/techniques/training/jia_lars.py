"""Mixed precision with LARS at large batch (Jia et al.).

What it does: fp16 products with fp32 weights and layer-wise rates, so that a batch of tens of thousands still trains;
    ``--preset jia_lars`` is ``optimizer=lars``, the formats are the job's (``--precision fp16``).
Saves: steps, as far as the batch can grow; which batch converges is the user's to say.
Costs: norms of weights and gradients per layer and update.
Assumes: as ``optimizer=lars``.
Source: Jia et al. 2018 (arXiv:1807.11205) §3; You et al. 2017 (arXiv:1708.03888).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.technique import Figure, Technique
from planner.techniques import figures


def _states(fixes: Mapping[str, Any]) -> float:
    """Bytes of fp32 weights and momentum per parameter."""
    ledger, _ = figures.recipe(model="gpt2-xl", precision="fp16", **{"optimizer": "adamw", **fixes})
    return figures.held_bytes(ledger, "optimizer") / figures.parameters(ledger)


TECHNIQUE = Technique(
    key="jia_lars",
    name="LARS at large batch (Jia et al.)",
    slot=None,
    kind="preset",
    source="arXiv:1807.11205",
    summary="Layer-wise rates, fp16 with fp32 weights",
    fixes={"optimizer": "lars"},
    figures=(
        Figure(
            "bytes per parameter beside fp16 weights: fp32 weights and a momentum",
            8.0,
            1e-9,
            "Jia et al. 2018 (arXiv:1807.11205), section 3.1: fp32 master weights and LARS's update in fp32",
            _states,
        ),
    ),
)
