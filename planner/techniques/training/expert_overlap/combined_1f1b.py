"""Expert communication hidden behind another micro-batch: forward of one and backward of the one before it run side by side.

What it does: dispatch and combine leave the layer's serial order; they run beside the computation of the other micro-batch.
Saves: the all-to-alls, as far as computation is as long as they are.
Costs: compute and communication share the device while they overlap. What two micro-batches hold at once is not counted.
Assumes: enough micro-batches that the first and the last, which have no partner, do not matter; each direction's exchanges
    hide behind as much computation as that direction has.
Source: DeepSeek-AI 2024 (DeepSeek-V3, arXiv:2412.19437) §3.2.1; Megatron-Core ``--overlap-moe-expert-parallel-comm``
    (``combined_1f1b``).
"""

from __future__ import annotations

from planner.ledger import Collective, Item, Ledger
from planner.technique import Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass

_KEY = "combined_1f1b"


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Moves the exchanges between experts to a track of their own."""

    def beside(item: Collective) -> Item | None:
        return item.but(track="exchange", by=_KEY) if item.kind == "all_to_all" else None

    return ledger.edit(Collective, beside)


def _serial(subject: Pass) -> float:
    """All-to-alls of a layer, forward and backward, that stand in its serial order."""
    ledger, _ = figures.run("expert_overlap", subject, model="deepseek-v3", dp=64, ep=64, seq=4096)
    exchanges = [item for item in ledger.of(Collective) if item.kind == "all_to_all"]
    return 1.0 + sum(item.track == "main" for item in exchanges) / len(exchanges)


TECHNIQUE = Technique(
    key=_KEY,
    name="Expert communication hidden behind another micro-batch",
    slot="expert_overlap",
    choices=("combined_1f1b",),
    searched=False,
    asked=True,  # the second micro-batch's memory is not counted here, so that it would always win
    source="arXiv:2412.19437",
    summary="All-to-alls of one micro-batch run beside the computation of another",
    knobs=(
        Knob(
            "expert_overlap",
            "how communication between experts is hidden",
            ("none", "combined_1f1b", "priority"),
            "none",
        ),
    ),
    figures=(
        Figure(
            "1 + share of a layer's all-to-alls that are not hidden",
            1.0,
            1e-9,
            "DeepSeek-AI 2024 (arXiv:2412.19437), section 3.2.1: both all-to-all and PP communication can be fully hidden",
            _serial,
        ),
    ),
    apply=apply,
)
