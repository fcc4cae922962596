"""8-bit gradient averaging (BAGUA's low-precision centralised primitive): every rank reduces a part in full precision.

What it does: gradients are quantised, exchanged in parts, summed in full precision, quantised again and gathered.
Saves: three quarters of an fp32 all-reduce's bytes, half of a 16-bit one's.
Costs: a pass over the gradients before and after each half; digits of the gradients.
Assumes: scales of blocks are neglected; replicated weights, as described.
Source: Gan et al. 2021 (BAGUA, arXiv:2107.01499) §3.2 (C_LP_S); QSGD, Alistarh et al. 2017 (arXiv:1610.02132).
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.ledger import Ledger
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.compression.narrow import narrow, replicated


def valid(ctx: Context) -> Iterable[Check]:
    """Replicated gradients."""
    yield Check("8-bit averaging needs gradients that are all-reduced (zero_stage=0)", _whole(ctx))


def _whole(ctx: Context) -> bool:
    return ctx.knobs.get("zero_stage") == "0"


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Narrows the gradients' all-reduce."""
    return narrow(ledger, "gradients", "int8", "bagua")


def _bytes(subject: Pass) -> float:
    """Bytes sent per parameter by 128 ranks, over those of an fp32 all-reduce."""
    ledger, _ = figures.run(
        "compression", subject, model="bert-large", dp=128, zero_stage="0", compression="int8"
    )
    sent = figures.sent_bytes(ledger, figures.between_replicas)
    return sent / (4.0 * 2 * 127 / 128 * figures.parameters(ledger))


TECHNIQUE = Technique(
    key="bagua",
    name="8-bit gradient averaging (BAGUA, QSGD)",
    slot="compression",
    choices=("int8",),
    source="arXiv:2107.01499",
    summary="Gradients averaged in 8 bits, summed in full precision",
    figures=(
        Figure(
            "bytes sent relative to an fp32 all-reduce: 8 of 32 bits",
            0.25,
            1e-6,
            "Gan et al. 2021 (arXiv:2107.01499), section 3.2: C_LP_S sends compressed parts in both of its phases",
            _bytes,
        ),
    ),
    needs=("lossy",),
    valid=valid,
    apply=apply,
    active=replicated,
)
