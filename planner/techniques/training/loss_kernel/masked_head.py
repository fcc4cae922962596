"""A head on target positions alone (Long-VITA): logits are computed where the loss asks for them, and nowhere else.

What it does: of every sequence, ``target_percent`` of the positions count in the loss; the others' hidden states skip the head.
Saves: products, logits and loss of the positions that the loss masks.
Costs: a job that says how many they are; nothing in time.
Assumes: target positions are as many on every rank; the loss is the fused one.
Source: Shen et al. 2025 (Long-VITA, arXiv:2502.05177), logits-masked language modelling head.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.ledger import Item, Ledger, Matmul, Resident, Stream, times
from planner.technique import Check, Context, Detail, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.loss_kernel.cross_entropy import fused

_KEY = "long_vita"
_PERCENT = "target_percent"


def read_percent(text: str) -> float:
    """Per cent of the positions.

    Raises:
        ValueError: it is not above 0 and up to 100.

    >>> read_percent("12.5")
    12.5
    """
    percent = float(text)
    if not 0.0 < percent <= 100.0:
        raise ValueError(text)
    return percent


def valid(ctx: Context) -> Iterable[Check]:
    """The job knows its targets."""
    yield Check("loss_kernel=masked needs target_percent", _PERCENT in ctx.knobs)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """The fused loss, and the head's work on target positions alone."""

    def fewer(item: Item) -> Item | None:
        if not item.what.startswith(("head.logits", "head.cross_entropy")):
            return None
        if isinstance(item, Matmul):
            if item.phase == "weight":
                return item.but(k=times(item.k, "target_share"), by=_KEY)
            return item.but(m=times(item.m, "target_share"), by=_KEY)
        if isinstance(item, Stream | Resident):
            return item.but(size=times(item.size, "target_share"), by=_KEY)
        return None

    share = float(ctx.knobs.get(_PERCENT, 100.0)) / 100.0
    return fused(ledger, ctx).set_axes(target_share=share).edit(Item, fewer)


def _logits(subject: Pass) -> float:
    """Bytes of fp32 logits of Llama 7B on 32,768 positions, an eighth of them targets."""
    ledger, _ = figures.run(
        "loss_kernel",
        subject,
        model="llama-7b",
        seq=32768,
        attention_kernel="flash",
        loss_kernel="masked",
        target_percent=12.5,
    )
    return figures.total_bytes(
        ledger, [i for i in ledger.of(Resident, pool="logits") if i.what == "head.logits"]
    )


TECHNIQUE = Technique(
    key=_KEY,
    name="A head on target positions (Long-VITA)",
    slot="loss_kernel",
    choices=("masked",),
    searched=False,
    asked=True,  # the job has to say how many positions count
    source="arXiv:2502.05177",
    summary="Logits of the positions that count in the loss",
    knobs=(
        Detail(
            _PERCENT,
            "positions that count in the loss, per cent (loss_kernel=masked)",
            read=read_percent,
            expected="a number above 0 and up to 100",
            needed_by="loss_kernel=masked",
        ),
    ),
    figures=(
        Figure(
            "bytes of logits, 4,096 target positions of 32,768 and 32,000 words: 4·b·s_target·V",
            4.0 * 4096 * 32000,
            1e-9,
            "Shen et al. 2025 (arXiv:2502.05177): logits of the masked positions are not computed",
            _logits,
        ),
    ),
    valid=valid,
    apply=apply,
)
