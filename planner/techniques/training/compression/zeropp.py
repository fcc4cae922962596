"""Quantised ZeRO-3 collectives (ZeRO++): weights are gathered in 8 bits (qwZ), gradients reduced in 4 (qgZ).

What it does: blocks of weights are quantised before every gather and widened after it; gradients are quantised before they are
    exchanged, and summed in full precision. ``zero_group=secondary`` is the third part, hpZ.
Saves: half of the gathers' bytes, three quarters of a 16-bit reduction's.
Costs: a pass over every gathered or reduced tensor; digits of weights and gradients.
Assumes: scales of blocks are neglected; the reduction moves as much as a hierarchical reduce-scatter does, inside a node first.
Source: Wang et al. 2023 (ZeRO++, arXiv:2306.10209) §3; DeepSpeed ``zero_quantized_weights``, ``zero_quantized_gradients``.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planner.ledger import Ledger
from planner.technique import Check, Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.compression.narrow import narrow, replicated

_KEY = "zeropp"
_WEIGHTS, _GRADIENTS = ("parameters", "int8"), ("gradients", "int4")
_PARTS = {"qwz": (_WEIGHTS,), "qgz": (_GRADIENTS,), "qwz+qgz": (_WEIGHTS, _GRADIENTS)}


def valid(ctx: Context) -> Iterable[Check]:
    """What is gathered and scattered in every micro-batch is what pays."""
    yield Check("quantised ZeRO collectives need ZeRO stage 3", ctx.knobs.get("zero_stage") in ("3", "fsdp"))


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Narrows what is gathered, reduced, or both."""
    for pool, dtype in _PARTS[ctx.knobs["compression"]]:
        ledger = narrow(ledger, pool, dtype, _KEY)
    return ledger


def _between_nodes(subject: Pass) -> float:
    """16-bit words per parameter that a rank sends across nodes of 8, of 512 ranks, with secondary shards; 3 without any."""
    ledger, _ = figures.run(
        "compression", subject, model="gpt2-xl", dp=512, zero_stage="3", zero_group="secondary", compression="qwz+qgz",
        gradient_dtype="bf16", cluster="a100-sxm-80gb:64x8",
    )  # fmt: skip
    far = figures.sent_bytes(
        ledger, lambda i: figures.between_replicas(i) and float(np.max(i.group.size)) > 8
    )
    return far / 2.0 / figures.parameters(ledger)


TECHNIQUE = Technique(
    key=_KEY,
    name="Quantised ZeRO-3 collectives (ZeRO++)",
    slot="compression",
    choices=tuple(_PARTS),
    source="arXiv:2306.10209",
    summary="8-bit weight gathers, 4-bit gradient reduction",
    knobs=(
        Knob(
            "compression",
            "what travels between replicas in place of whole gradients and weights",
            ("none", *_PARTS, "int8", "low_rank", "cocktail", "fused_embedding", "float8"),
            "none",
        ),
    ),
    figures=(
        Figure(
            "volume across nodes per step with secondary shards, in M: 0.5 + 0 + 0.25 instead of 3",
            0.75,
            3e-3,  # 511/512
            "Wang et al. 2023 (ZeRO++, arXiv:2306.10209), table of communication volume",
            _between_nodes,
        ),
    ),
    needs=("lossy",),
    valid=valid,
    apply=apply,
    active=replicated,
)
