"""Gradient accumulation after the backward: a micro-batch's gradients are all there before they are added to fp32 sums.

What it does: weight-gradient products write their own outputs, which stay until the micro-batch's backward is through; one kernel
    then adds them to the accumulated gradients.
Saves: nothing; it is what an optimizer beside autograd does.
Costs: a whole 16-bit gradient beside the accumulated one, and the traffic of ``separate``.
Assumes: every micro-batch accumulates; gradients held whole on their rank.
Source: DeepSpeed ``deepspeed/runtime/bf16_optimizer.py`` (``fp32_groups_gradients_flat``, ``update_hp_grads``).
"""

from __future__ import annotations

from dataclasses import replace

from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Ledger, Resident, Stream
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass

_KEY = "after_backward"


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """A gradient as computed beside every accumulated one, and one kernel per block that adds them."""
    own, kept = dtype_bytes(ctx.format.activation), dtype_bytes(ctx.gradient_dtype)
    added: list[Item] = []
    for held in ledger.of(Resident, pool="gradients", lifetime="always"):
        added.append(replace(held, what=f"{held.what}.computed", bytes_per_element=own, by=_KEY))
        added.append(
            Stream(
                what=f"{held.what}.accumulate", block=held.block, phase="weight", tags=frozenset({"gradients"}),
                size=held.size, bytes_per_element=own + 2 * kept, by=_KEY,
            )
        )  # fmt: skip
    return ledger.add(added)


def _bytes(subject: Pass) -> float:
    """Bytes of both gradients per parameter."""
    ledger, _ = figures.run(
        "gradient_accumulation", subject, model="gpt2-xl", precision="bf16", gradient_accumulation=_KEY
    )
    return figures.held_bytes(ledger, "gradients") / figures.parameters(ledger)


TECHNIQUE = Technique(
    key=_KEY,
    name="Gradient accumulation after the backward",
    slot="gradient_accumulation",
    choices=(_KEY,),
    searched=False,  # what an optimizer does beside autograd
    asked=True,
    source="https://github.com/deepspeedai/DeepSpeed deepspeed/runtime/bf16_optimizer.py",
    summary="16-bit gradients of a whole micro-batch are kept until they are added to fp32 sums",
    figures=(
        Figure(
            "bytes of gradients per parameter: bf16 as computed, fp32 as accumulated",
            6.0,
            1e-6,
            "DeepSpeed bf16_optimizer.py: fp32_groups_gradients_flat is as large as bf16_groups_flat",
            _bytes,
        ),
    ),
    apply=apply,
)
