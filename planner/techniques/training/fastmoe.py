"""FastMoE: as many experts as there are devices for, each with the tokens that choose it.

What it does: experts are spread over all data-parallel ranks and none is cut; no cap drops tokens, so that the busiest rank
    paces the others; ``--preset fastmoe``, without ``--capacity-factor``.
Saves: expert weights, divided by the ranks.
Costs: two exchanges of tokens per layer and direction; the wait for the busiest rank (``--expert-load-factor``).
Assumes: as ``expert=folded``.
Source: He et al. 2021 (FastMoE, arXiv:2103.13262) §3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.ledger import Ledger, Resident
from planner.technique import Figure, Technique
from planner.techniques import figures


def _experts(fixes: Mapping[str, Any]) -> float:
    """Parameters of experts that 8 devices hold together, over what one of them holds."""
    cut, whole = (
        figures.recipe(
            model="mixtral-8x7b", dp=8, ep=8, attention_kernel="flash", **{"expert": "none", **choices}
        )[0]
        for choices in (fixes, {})
    )
    held = [sum(figures.total_bytes(ledger, [i]) for i in _weights(ledger)) for ledger in (whole, cut)]
    return held[0] / held[1]


def _weights(ledger: Ledger) -> list[Resident]:
    return [i for i in ledger.of(Resident, pool="parameters", lifetime="always") if "expert" in i.tags]


TECHNIQUE = Technique(
    key="fastmoe",
    name="FastMoE",
    slot=None,
    kind="preset",
    source="arXiv:2103.13262",
    summary="Experts over all ranks, no cap on their tokens",
    fixes={"expert": "folded", "etp": 1},
    figures=(
        Figure(
            "times as many experts on 8 devices as on one: linear in the devices",
            8.0,
            1e-9,
            "He et al. 2021 (arXiv:2103.13262), abstract: the number of experts scales linearly with that of devices",
            _experts,
        ),
    ),
)
