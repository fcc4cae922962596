"""A cross-entropy kernel that reads 16-bit logits as the projection wrote them.

What it does: one kernel reads the logits, computes in fp32 and writes a loss per token; backward, one reads them again and writes
    their gradient, in 16 bits and beside them.
Saves: the fp32 logits, 4sbV/t bytes of memory and half of the bytes that the fused form moves.
Costs: logits rounded to 16 bits before the loss; the gradient is not written over them.
Assumes: the kernel is asked to keep the logits, its default (``inplace_backward=False``). Where a framework's habit is to compute
    metrics (``training_metrics = losses``), every micro-batch ends with PyTorch's cross-entropy of the same logits, cast to fp32,
    for the loss and again for the perplexity.
Source: FlashAttention (Dao-AILab/flash-attention), ``flash_attn/losses/cross_entropy.py`` and ``csrc/xentropy``, after NVIDIA
    Apex's kernel; llm-foundry's ``loss_fn: fused_crossentropy``; metrics: Composer, ``Trainer._eval_train_metrics``.
"""

from __future__ import annotations

from collections.abc import Iterator

from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Ledger, Matmul, Resident, Stream
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass

_KEY = "narrow_cross_entropy"
_PASSES = {"forward": 1.0, "backward": 2.0}  # over the logits: read; read, and their gradient written
_METRICS = 2.0  # loss and perplexity: a cast, log-softmax and the loss of each


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Logits and their gradient as wide as what the projection computes in, one kernel each way."""
    width = dtype_bytes(ctx.format.core)

    def product(item: Matmul) -> Item | None:
        wide = item.what == "head.logits" and item.out_bytes is not None
        return item.but(out_bytes=None, by=_KEY) if wide else None

    def kernels(item: Stream) -> Item | None:
        if "loss" not in item.tags or item.phase not in _PASSES:
            return None
        return item.but(bytes_per_element=width * _PASSES[item.phase], launches=1.0, by=_KEY)

    def narrow(item: Resident) -> Item | None:
        return item.but(bytes_per_element=width, by=_KEY) if item.what == "head.logits" else None

    ledger = ledger.edit(Matmul, product).edit(Stream, kernels).edit(Resident, narrow)
    return ledger.add(_metrics(ledger, width)) if ctx.stack.habits["training_metrics"] == "losses" else ledger


def _metrics(ledger: Ledger, width: float) -> Iterator[Item]:
    """Losses that nobody differentiates, once a micro-batch's activations are gone."""
    for item in ledger.items:
        if isinstance(item, Stream) and "loss" in item.tags and item.phase == "backward":
            moved = width + 3 * 4.0  # logits to fp32, those to their log-softmax
            yield item.but(
                what="head.metrics", bytes_per_element=_METRICS * moved, launches=_METRICS * 3, by=_KEY
            )
        elif isinstance(item, Resident) and item.what == "head.logits":
            held = width + 2 * 4.0
            yield item.but(what="head.metrics", bytes_per_element=held, lifetime="step", by=_KEY)


def _held(subject: Pass) -> float:
    """Bytes per logit that are there at once."""
    ledger, _ = figures.run("loss_kernel", subject, model="llama3-8b", seq=8192, loss_kernel="fused_16bit")
    held = figures.total_bytes(ledger, ledger.of(Resident, pool="logits", lifetime="block"))
    return held / (8192 * 128256)


TECHNIQUE = Technique(
    key=_KEY,
    name="Cross-entropy of 16-bit logits",
    slot="loss_kernel",
    choices=("fused_16bit",),
    searched=False,
    asked=True,
    source="https://github.com/Dao-AILab/flash-attention flash_attn/losses/cross_entropy.py",
    summary="Loss of 16-bit logits in one kernel, their gradient beside them",
    figures=(
        Figure(
            "bytes per logit at once: 16-bit logits, and a 16-bit gradient that is not written over them",
            4.0,
            1e-9,
            "FlashAttention, flash_attn/losses/cross_entropy.py: inplace_backward=False",
            _held,
        ),
    ),
    apply=apply,
)
