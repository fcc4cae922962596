"""GShard: experts on as many ranks as there are data-parallel ones, nothing else cut.

What it does: every rank has a share of the experts and its own tokens; ``--preset gshard`` leaves tensors, sequences and layers
    whole. A cap on tokens per expert is the job's: ``--capacity-factor``.
Saves: expert weights, divided by the ranks.
Costs: two exchanges of tokens per layer and direction.
Assumes: as ``expert=folded``.
Source: Lepikhin et al. 2020 (GShard, arXiv:2006.16668) §3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.ledger import Resident
from planner.technique import Figure, Technique
from planner.techniques import figures


def _devices_billions(fixes: Mapping[str, Any]) -> float:
    """Parameters of the 600B model's experts, 10^9, from what one of 2,048 ranks holds."""
    ledger, ctx = figures.recipe(
        model="gshard-600b", dp=2048, ep=2048, seq=1024, **{"expert": "none", **fixes}
    )
    counts: dict[str, int] = {}
    for prefix, layers in (("encoder.", ctx.model.encoder_layers), ("", ctx.model.layers)):
        for name, repeat in layers:
            counts[prefix + name] = counts.get(prefix + name, 0) + repeat
    held = [i for i in ledger.of(Resident, pool="parameters", lifetime="always") if "expert" in i.tags]
    return 2048e-9 * sum(
        counts[i.block] * figures.total_bytes(ledger, [i]) / i.bytes_per_element for i in held
    )


TECHNIQUE = Technique(
    key="gshard",
    name="GShard",
    slot=None,
    kind="preset",
    source="arXiv:2006.16668",
    summary="Experts over all data-parallel ranks, nothing else cut",
    fixes={"expert": "folded", "tp": 1, "cp": 1, "pp": 1},
    figures=(
        Figure(
            "parameters of the 600B model on 2,048 devices, 10^9",
            600.0,
            0.05,  # printed with one digit
            "Lepikhin et al. 2020 (arXiv:2006.16668), Table 1",
            _devices_billions,
        ),
    ),
)
