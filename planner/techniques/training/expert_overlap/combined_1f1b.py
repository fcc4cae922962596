"""Expert communication hidden behind another micro-batch: forward of one and backward of the one before it run side by side.

What it does: dispatch and combine leave the layer's serial order; they run beside the computation of the other micro-batch.
Saves: the all-to-alls, as far as computation is as long as they are.
Costs: compute and communication share the device while they overlap. What two micro-batches hold at once is not counted.
    Kernels of an exchange on a stream without priority (``exchange_stream=plain``) wait for multiprocessors that products
    leave: of its time no more than a part hides.
Assumes: enough micro-batches that the first and the last, which have no partner, do not matter; each direction's exchanges
    hide behind as much computation as that direction has.
Source: DeepSeek-AI 2024 (DeepSeek-V3, arXiv:2412.19437) §3.2.1; Megatron-Core ``--overlap-moe-expert-parallel-comm``
    (``combined_1f1b``) and ``high_priority_a2a_comm_stream``; without priority, as profiled on 16 H100: Megatron-Bridge
    ``skills/nemo-mbridge-perf-moe-comm-overlap`` @067f987df.
"""

from __future__ import annotations

from planner.ledger import Collective, Item, Ledger, times
from planner.technique import Context, Detail, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass

_KEY = "combined_1f1b"
_HIDDEN_WITHOUT_PRIORITY = 0.3655
"""Of a step's communication, what ran beside products and attention: 3.96 of 10.83 s of Qwen3 30B, HybridEP over two nodes."""


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Moves the exchanges between experts to a track of their own; without priority, a part of each."""
    if ctx.knobs.get("exchange_stream") == "plain":
        return _in_part(ledger)

    def beside(item: Collective) -> Item | None:
        return item.but(track="exchange", by=_KEY) if item.kind == "all_to_all" else None

    return ledger.edit(Collective, beside)


def _in_part(ledger: Ledger) -> Ledger:
    """Cuts every exchange into what hides and what does not."""
    hidden, left = _HIDDEN_WITHOUT_PRIORITY, 1.0 - _HIDDEN_WITHOUT_PRIORITY
    exposed = [
        item.but(size=times(item.size, "exposed_exchange"), share=left)
        for item in ledger.of(Collective)
        if item.kind == "all_to_all"
    ]

    def beside(item: Collective) -> Item | None:
        if item.kind != "all_to_all":
            return None
        return item.but(track="exchange", by=_KEY, size=times(item.size, "hidden_exchange"), share=hidden)

    axes = {"exposed_exchange": left, "hidden_exchange": hidden}
    return ledger.set_axes(**axes).edit(Collective, beside).add(exposed)


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
        Detail(
            "exchange_stream",
            "whether kernels that exchange tokens go before products, or wait for multiprocessors that these leave",
            ("priority", "plain"),
            "priority",
            expected="priority or plain",
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
