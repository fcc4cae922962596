"""Separate gradient accumulation: a kernel of its own adds a micro-batch's weight gradients to the accumulated ones.

What it does: the weight-gradient product writes its own output; then a kernel reads it, and reads and writes the accumulated
    gradients. Without it (``fused``) the product accumulates in place, behind its arithmetic.
Saves: nothing; it needs no kernels of its own making.
Costs: traffic of a gradient in the product's dtype and of two accumulated ones per weight and micro-batch; where a framework
    keeps the former (DeepSpeed's ``BF16_Optimizer``: a 16-bit ``.grad`` of every weight beside fp32 accumulators), its memory.
Assumes: every micro-batch accumulates, the first included; gradients held whole on their rank.
Source: Megatron-LM ``--no-gradient-accumulation-fusion``; NVIDIA Apex ``fused_weight_gradient_mlp_cuda``.
"""

from __future__ import annotations

from dataclasses import replace

from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Ledger, Resident, Stream
from planner.technique import Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """One kernel per block and mesh, over all weights that the block trains."""
    width, kept = dtype_bytes(ctx.format.activation), ctx.stack.kept_gradients
    moved = width + 2 * dtype_bytes(ctx.gradient_dtype)
    added: list[Item] = [
        Stream(
            what=f"{held.what}.accumulate", block=held.block, phase="weight", tags=frozenset({"gradients"}), size=held.size,
            bytes_per_element=moved, by="separate_accumulation",
        )
        for held in ledger.of(Resident, pool="gradients", lifetime="always")
    ]  # fmt: skip
    if kept and dtype_bytes(ctx.gradient_dtype) > width:
        added += [
            replace(
                held,
                what=f"{held.what}.kept",
                bytes_per_element=kept.value * width,
                by="separate_accumulation",
            )
            for held in ledger.of(Resident, pool="gradients", lifetime="always")
        ]
    return ledger.add(added)


def _traffic(subject: Pass) -> float:
    """Bytes per weight and micro-batch, bf16 products and fp32 accumulation."""
    ledger, _ = figures.run(
        "gradient_accumulation",
        subject,
        model="gpt2-xl",
        precision="bf16",
        gradient_accumulation="separate",
    )
    moved = sum(
        float(ledger.axes[item.size].flat[0]) * item.bytes_per_element
        for item in ledger.of(Stream, phase="weight")
        if "gradients" in item.tags
    )
    return moved / figures.parameters(ledger)


TECHNIQUE = Technique(
    key="separate_accumulation",
    name="Separate gradient accumulation",
    slot="gradient_accumulation",
    choices=("separate",),
    searched=False,
    asked=True,
    source="Megatron-LM --no-gradient-accumulation-fusion",
    summary="Weight gradients are added to the accumulated ones by a kernel of their own",
    knobs=(
        Knob(
            "gradient_accumulation",
            "whether the weight-gradient product accumulates in place",
            ("fused", "in_place", "placeholders", "separate"),
            "fused",
        ),
    ),
    figures=(
        Figure(
            "bytes per weight and micro-batch: a bf16 gradient read, an fp32 one read and written",
            10.0,
            1e-6,
            "arithmetic of torch.Tensor.add_ on Megatron-LM's fp32 main_grad without gradient-accumulation fusion",
            _traffic,
        ),
    ),
    apply=apply,
)
