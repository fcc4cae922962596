"""Gradients in place of weights (PatrickStar): a weight's gradient overwrites the weight, once its backward is done with it.

What it does: 16-bit gradients take the memory of the 16-bit weights, which the update makes anew from their master weights.
Saves: the gradients' memory: 14 of 16 bytes per parameter remain.
Costs: no gradient accumulation: the next micro-batch needs the weights.
Assumes: master weights; gradients in the weights' format; PatrickStar's chunks, which are placed by a trace of the first step,
    are what ``parameter_offload`` and ``optimizer_offload`` choose here.
Source: Fang et al. 2021 (PatrickStar, arXiv:2108.05818); Tencent/PatrickStar ``INSIDE.md``.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.costs.optimizer import optimizer_state_bytes
from planner.ledger import Ledger, Resident
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass


def valid(ctx: Context) -> Iterable[Check]:
    """Weights that may be lost until the update."""
    yield Check("gradients in place of weights need one micro-batch per step", ctx.micro_batches == 1)
    optimizer = str(ctx.knobs.get("optimizer", "adamw"))
    kept = optimizer_state_bytes(optimizer) > optimizer_state_bytes(optimizer, master_bytes=0.0)
    yield Check("gradients in place of weights need master weights", ctx.format.master and kept)
    same = ctx.gradient_dtype == ctx.format.activation
    yield Check(f"gradients in place of weights need gradient_dtype={ctx.format.activation}", same)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Holds no gradients beside the weights."""
    return ledger.drop(lambda item: isinstance(item, Resident) and item.pool == "gradients")


def _bytes(subject: Pass) -> float:
    """Model states per parameter, Adam in mixed precision."""
    whole, _ = figures.run("gradient_accumulation", lambda ledger, ctx: ledger, model="gpt2-xl")
    ledger, _ = figures.run(
        "gradient_accumulation", subject, model="gpt2-xl", precision="fp16", gradient_dtype="fp16",
        gradient_accumulation="in_place",
    )  # fmt: skip
    return figures.held_bytes(ledger) / figures.parameters(whole)


TECHNIQUE = Technique(
    key="patrickstar",
    name="Gradients in place of weights (PatrickStar)",
    slot="gradient_accumulation",
    choices=("in_place",),
    searched=False,  # one micro-batch per step, 16-bit gradients: where memory is all that matters
    source="arXiv:2108.05818",
    summary="16-bit gradients overwrite the 16-bit weights",
    figures=(
        Figure(
            "bytes of model states per parameter: 14M instead of 16M",
            14.0,
            1e-6,
            "Fang et al. 2021 (arXiv:2108.05818), gradients in the memory of parameters; PatrickStar INSIDE.md",
            _bytes,
        ),
    ),
    valid=valid,
    apply=apply,
)
