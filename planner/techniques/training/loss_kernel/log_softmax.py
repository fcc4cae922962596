"""PyTorch's cross-entropy of fp32 logits: log-softmax, then the log-probability of the target.

What it does: the projection writes 16-bit logits; they are cast to fp32, log-softmax writes their log-probabilities and the
    loss reads those of the targets. Backward, the loss writes a gradient of whole size, log-softmax turns it into that of the
    logits, which is cast back.
Saves: nothing; it is what ``functional.cross_entropy(logits.float(), targets)`` does without a compiler.
Costs: three fp32 copies of the logits at once, 12sbV/t bytes: log-probabilities, their gradient, the logits' gradient; over a
    sharded vocabulary probabilities as well, 16sbV/t.
Assumes: 16-bit logits are freed before the backward; the loss reads of the log-probabilities only those of the targets.
Source: PyTorch ``tools/autograd/derivatives.yaml`` (_log_softmax saves its result, nll_loss_backward writes a gradient of its
    input's size); sharded vocabulary: ``torch/distributed/tensor/parallel/loss.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Ledger, Matmul, Resident, Stream, times
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass

# fp32 passes over the logits. Forward: log-softmax reads and writes. Backward: the gradient of the log-probabilities is written,
# then two are read and the logits' gradient is written. Each phase has a cast beside them.
_FP32_PASSES = {"forward": 2.0, "backward": 4.0}


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """One more copy of the logits, and the casts around the loss."""
    width = dtype_bytes(ctx.format.core)
    cast_bytes = 4.0 + width if width < 4.0 else 0.0

    def product(item: Matmul) -> Item | None:
        narrow = item.what == "head.logits" and item.out_bytes is not None
        return item.but(out_bytes=None, by="log_softmax") if narrow else None

    def kernels(item: Stream) -> Item | None:
        if "loss" not in item.tags or item.phase not in _FP32_PASSES:
            return None
        moved = 4.0 * _FP32_PASSES[item.phase] + cast_bytes
        return item.but(bytes_per_element=moved, launches=2.0 + bool(cast_bytes), by="log_softmax")

    def wide(item: Resident) -> Item | None:
        gradient = item.what == "head.logits_gradient"
        return item.but(bytes_per_element=4.0, by="log_softmax") if gradient else None

    def copies() -> Iterator[Item]:
        for item in ledger.of(Resident):
            if item.what == "head.logits":
                yield item.but(what="head.log_probabilities_gradient", by="log_softmax")
                # Too small for the fp32 tensors behind it, an allocator keeps the memory of the 16-bit logits.
                yield item.but(
                    what="head.narrow_logits",
                    bytes_per_element=width,
                    lifetime="freed",
                    by="log_softmax",
                )
                size = times(item.size, "sharded_vocabulary")
                yield item.but(what="head.probabilities", size=size, by="log_softmax")

    ledger = ledger.set_axes(sharded_vocabulary=(ctx.mesh.tp > 1).astype(float))
    return ledger.edit(Matmul, product).edit(Stream, kernels).edit(Resident, wide).add(copies())


def _copies(subject: Pass) -> float:
    """fp32 copies of the logits that are there at once."""
    ledger, _ = figures.run("loss_kernel", subject, model="llama3-8b", seq=8192, loss_kernel="log_softmax")
    held = figures.total_bytes(ledger, ledger.of(Resident, pool="logits", lifetime="block"))
    return held / (4.0 * 8192 * 128256)


TECHNIQUE = Technique(
    key="log_softmax",
    name="PyTorch's cross-entropy",
    slot="loss_kernel",
    choices=("log_softmax",),
    searched=False,
    asked=True,
    source="https://github.com/pytorch/pytorch tools/autograd/derivatives.yaml",
    summary="Log-softmax of fp32 logits: log-probabilities and two gradients of their size",
    figures=(
        Figure(
            "fp32 copies of the logits at once",
            3.0,
            1e-9,
            "PyTorch 2.13's MemTracker (torch.distributed._tools) on functional.cross_entropy of bf16 logits cast to fp32",
            _copies,
        ),
    ),
    apply=apply,
)
