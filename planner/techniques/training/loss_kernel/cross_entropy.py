"""Cross-entropy kernels: eager, fused in place, or fused with the projection.

What it does: ``fused`` writes the gradient of the logits over the logits in one kernel; ``linear_fused`` also computes the
    projection in V/h chunks of tokens, so that the logits at hand are never larger than the hidden states.
Saves: the 16-bit copy beside the fp32 logits (2 of 6sbV/t bytes), or both but for a chunk; 4 of 6 passes over them.
Costs: ``linear_fused`` computes the projection's backward in the forward, chunk by chunk (same FLOP).
Assumes: logits and loss in fp32; efficiency of the chunked projection as of the whole.
Source: Korthikanti et al. 2022 (arXiv:2205.05198) §4.3; Megatron-Core ``--cross-entropy-loss-fusion``; Hsu et al. 2024 (Liger
    Kernel, arXiv:2410.10989) §3.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from planner.ledger import Item, Ledger, Resident, Stream
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass


def fused(ledger: Ledger, ctx: Context) -> Ledger:
    """Gradient in place of the logits, one pass forward and one backward."""

    def cheaper(item: Stream) -> Item | None:
        if "loss" not in item.tags:
            return None
        passes = 1.0 if item.phase == "forward" else 2.0
        return item.but(bytes_per_element=4.0 * passes, launches=1.0, by="fused_cross_entropy")

    return ledger.edit(Stream, cheaper).drop(lambda item: item.what == "head.logits_gradient")


def whole_vocabulary(ctx: Context) -> Iterable[Check]:
    """The chunked kernel knows no vocabulary that is spread over ranks."""
    yield Check("fused linear cross-entropy needs the whole vocabulary on a rank (tp = 1)", ctx.mesh.tp == 1)


def linear_fused(ledger: Ledger, ctx: Context) -> Ledger:
    """The fused form on one chunk of the logits at a time: as many chunks as the vocabulary is wider than the hidden state."""

    def chunk(item: Resident) -> Item | None:
        if item.what != "head.logits":
            return None
        return item.but(size=item.size.replace("vocab", "hidden"), by="linear_cross_entropy")

    return fused(ledger, ctx).edit(Resident, chunk)


def _end_bytes(subject: Pass) -> float:
    """Bytes kept by final norm, projection and loss of the 22B model, micro-batch 4."""
    ledger, _ = figures.run(
        "loss_kernel", subject, model="megatron-22b", micro_batch_size=4, seq=2048, loss_kernel="fused"
    )
    kept = [item for item in ledger.of(Resident, block="head") if item.pool in ("activations", "logits")]
    return figures.total_bytes(ledger, kept)


def _chunks(subject: Pass) -> float:
    """Logits and gradients of a Llama-2 7B head, over the logits that stay."""
    whole, _ = figures.run("loss_kernel", fused, model="llama2-7b", micro_batch_size=4, seq=4096)
    ledger, _ = figures.run(
        "loss_kernel", subject, model="llama2-7b", micro_batch_size=4, seq=4096, loss_kernel="linear_fused"
    )
    return figures.total_bytes(whole, whole.of(Resident, pool="logits")) / figures.total_bytes(
        ledger, ledger.of(Resident, pool="logits")
    )


def _record(key: str, name: str, choice: str, summary: str, **fields: Any) -> Technique:
    source = "arXiv:2410.10989" if choice == "linear_fused" else "arXiv:2205.05198"
    return Technique(
        key=key, name=name, slot="loss_kernel", choices=(choice,), source=source, summary=summary, **fields
    )


TECHNIQUES = (
    _record(
        "eager_cross_entropy",
        "Eager cross-entropy",
        "eager",
        "Softmax in place of fp32 logits, beside them in 16 bits",
        kind="baseline",
        searched=False,
        asked=True,
    ),
    _record(
        "fused_cross_entropy",
        "Fused cross-entropy",
        "fused",
        "Gradient in place of the logits",
        apply=fused,
        default=True,
        figures=(
            Figure(
                "bytes of final norm, projection and logits of the 22B model: 4sbh(1 + v/h)",
                4.0 * 2048 * 4 * (6144 + 51200),
                1e-6,
                "Korthikanti et al. 2022 (arXiv:2205.05198), section 4.3",
                _end_bytes,
            ),
        ),
    ),
    _record(
        "linear_cross_entropy",
        "Fused linear cross-entropy",
        "linear_fused",
        "Projection and loss in chunks",
        valid=whole_vocabulary,
        apply=linear_fused,
        searched=False,
        figures=(
            Figure(
                "chunks of the logits of Llama-2 7B: ⌈V/h⌉ of 32000 and 4096",
                8.0,
                0.03,  # Liger rounds V/h = 7.8 up
                "Liger Kernel, src/liger_kernel/ops/fused_linear_cross_entropy.py",
                _chunks,
            ),
        ),
    ),
)
