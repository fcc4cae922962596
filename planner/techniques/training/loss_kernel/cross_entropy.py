"""Cross-entropy kernels: eager, fused in place, or fused with the projection.

What it does: ``fused`` writes the gradient of the logits over the logits in one kernel; ``linear_fused`` also computes the
    projection in chunks, so that logits are never held whole.
Saves: one of two fp32 copies of the logits (4sbV/t bytes), or both; 4 of 6 passes over them.
Costs: ``linear_fused`` computes the projection's backward in the forward, chunk by chunk (same FLOP).
Assumes: chunks of 1/16 of the logits in ``linear_fused``.
Source: Megatron-Core ``--cross-entropy-loss-fusion``; Liger Kernel (arXiv:2410.10989) for the chunked form.
"""

from __future__ import annotations

from dataclasses import replace

from planner.ledger import Item, Ledger, Resident, Stream
from planner.technique import Context, Technique

_CHUNKS = 16  # Liger's default grows with V/h and is 16 for V = 128k, h = 8k


def fused(ledger: Ledger, ctx: Context) -> Ledger:
    """Gradient in place of the logits, one pass forward and one backward."""

    def cheaper(item: Stream) -> Item | None:
        if "loss" not in item.tags:
            return None
        return replace(
            item,
            bytes_per_element=4.0 if item.phase == "forward" else 8.0,
            launches=1.0,
            by="fused_cross_entropy",
        )

    return ledger.edit(Stream, cheaper).drop(lambda item: item.what == "head.logits_gradient")


def linear_fused(ledger: Ledger, ctx: Context) -> Ledger:
    """The fused form on one chunk of the logits at a time."""

    def chunk(item: Resident) -> Item | None:
        if item.what != "head.logits":
            return None
        return replace(item, bytes_per_element=item.bytes_per_element / _CHUNKS, by="linear_cross_entropy")

    return fused(ledger, ctx).edit(Resident, chunk)


def _record(key: str, name: str, choice: str, summary: str, **fields: object) -> Technique:
    return Technique(
        key=key, name=name, slot="loss_kernel", choices=(choice,), source="arXiv:2410.10989", summary=summary, **fields  # type: ignore[arg-type]
    )  # fmt: skip


TECHNIQUES = (
    _record(
        "eager_cross_entropy",
        "Eager cross-entropy",
        "eager",
        "Logits and their gradient in fp32",
        searched=False,
    ),
    _record(
        "fused_cross_entropy",
        "Fused cross-entropy",
        "fused",
        "Gradient in place of the logits",
        apply=fused,
        default=True,
    ),
    _record(
        "linear_cross_entropy",
        "Fused linear cross-entropy",
        "linear_fused",
        "Projection and loss in chunks",
        apply=linear_fused,
        searched=False,
    ),
)
