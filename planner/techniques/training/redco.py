"""Redco: tensor parallelism by two rules, the output of one product and the input of the next.

What it does: fully connected layers and attention are cut along their outputs, what follows them along its inputs, so that
    nothing is laid out anew inside either; ``--preset redco`` is ``tensor=1d`` without sequence parallelism.
Saves: what ``tensor=1d`` saves, without a line of the user's.
Costs: what ``tensor=1d`` costs.
Assumes: as ``tensor=1d``.
Source: Tan et al. 2023 (Redco, arXiv:2310.16355) §3.1; Shoeybi et al. 2019 (arXiv:1909.08053) §3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.technique import Figure, Technique
from planner.techniques import figures


def _all_reduces(fixes: Mapping[str, Any]) -> float:
    """All-reduces of a layer's activations in its forward, over 8 tensor ranks."""
    ledger, _ = figures.recipe(model="gpt2-xl", tp=8, **{"tensor": "none", **fixes})
    sent = figures.sent_elements(
        ledger, lambda i: i.group.name == "tp" and i.phase == "forward" and i.block == "dense"
    )
    return sent / (2 * 7 / 8 * 2048 * 1600)


TECHNIQUE = Technique(
    key="redco",
    name="Redco",
    slot=None,
    kind="preset",
    source="arXiv:2310.16355",
    summary="Tensor parallelism by two rules",
    fixes={"tensor": "1d", "sequence_parallel": "false"},
    figures=(
        Figure(
            "all-reduces of a layer's forward: one behind attention, one behind the network",
            2.0,
            1e-9,
            "Shoeybi et al. 2019 (arXiv:1909.08053), section 3, Figure 4: two all-reduces in the forward pass",
            _all_reduces,
        ),
    ),
)
