"""Scripted activations: Megatron-Core's gated activations, whose functions PyTorch is asked to fuse and does not.

What it does: the activation between an expert's two products is multiplied by the routing probabilities, which are fp32, so that
    what comes after them is fp32 too; backward makes the probabilities' gradient beside the input's. Every operator of the
    function is a kernel. Norms and rotations are one kernel, as in ``fused``.
Saves: nothing.
Costs: per element of an expert's activation 22 bytes forward and 130 backward, in place of 6 and 10; 52 and 178 where values are
    limited before (the limits run outside of the function, and keep their input). A dense network's: 5 and 15.7 passes.
Assumes: a graph of the whole iteration runs experts in Transformer Engine's fused operators, which have one kernel for it;
    ungated activations are one kernel.
Source: Megatron-Core ``fusions/fused_bias_swiglu.py`` (``weighted_swiglu``, ``weighted_swiglu_back``) and ``fused_bias_geglu.py``
    (``weighted_bias_quick_geglu_impl``, ``weighted_quick_geglu_back``), operator by operator. Dense networks: measured on H100,
    linkedin/Liger-Kernel#1326: 1.57 to 1.63 times a single kernel's time forward, 2.46 to 2.66 times with the backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Ledger, Resident, Stream
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.elementwise_kernel.kernels import Kernels, is_gated

_KEY = "scripted_activation"

# Activation (read, write), product (two reads, write): 5 of the 3 passes of one kernel; (2.56 * 8 - 1.6 * 3) backward.
_DENSE = {"forward": Kernels(2.0, plain=5.0), "backward": Kernels(11.0, plain=15.7)}
# As in a dense network; by the probability to fp32; back to 16 bits. Backward: gradient by probability to fp32; sigmoid (2), its
# product with that, sigmoid (2), from 1 (2), by the input (3), plus 1 (2), both products; activation (2), its product; both
# halves joined in fp32 and cast; for the probability's gradient the output again (5), the gradient cast, their product, its sum.
_WEIGHTED = {
    "forward": Kernels(4.0, plain=5.0, casts=2.0),
    "backward": Kernels(18.0, fp32=15.0, plain=23.0, casts=4.0),
}
# Both halves limited (4) and joined (4); input scaled (2), sigmoid (2), product (3), offset of the other half (2), product (3); as
# above. Backward: the same chain over that function, and the limits' own (6) with their halves joined (4).
_LIMITED = {
    "forward": Kernels(10.0, plain=20.0, casts=2.0),
    "backward": Kernels(26.0, fp32=17.0, plain=43.0, casts=4.0),
}


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Prices gated activations kernel by kernel, and adds what limits keep."""
    width = dtype_bytes(ctx.format.activation)

    def slower(item: Stream) -> Item | None:
        phase = _kernels(item, ctx).get(item.phase)
        if phase is None:
            return None
        return replace(
            item, bytes_per_element=phase.bytes_per_element(width), launches=phase.launches, by=_KEY
        )

    training = any(item.phase == "backward" for item in ledger.items)
    return ledger.edit(Stream, slower).add(_kept(ledger, ctx, width) if training else ())


def _kernels(item: Stream, ctx: Context) -> Mapping[str, Kernels]:
    """By phase, the kernels of a gated activation; empty for anything else."""
    region, _, operator = item.what.rpartition(".")
    if operator != "act" or not is_gated(item.what, item.block, ctx):
        return {}
    if region != "moe":
        return _DENSE
    if ctx.knobs.get("cuda_graph") == "full":
        return {}
    return _LIMITED if _limited(item, ctx) else _WEIGHTED


def _limited(item: Stream, ctx: Context) -> bool:
    moe = ctx.model.blocks[item.block.removeprefix("encoder.")].moe
    return moe is not None and moe.limited


def _kept(ledger: Ledger, ctx: Context, width: float) -> Iterator[Resident]:
    """Both halves before their limits."""
    for item in ledger.of(Stream, phase="forward"):
        if _kernels(item, ctx) is _LIMITED:
            yield Resident(
                what=f"{item.what}.unlimited", block=item.block, tags=item.tags | {"saved"}, by=_KEY, size=item.size,
                bytes_per_element=2.0 * width, pool="activations", lifetime="micro_batch",
            )  # fmt: skip


def _expert_traffic(subject: Pass) -> float:
    """Bytes that an expert's activation moves per 16-bit element, forward and backward."""
    ledger, _ = figures.run("elementwise_kernel", subject, model="qwen3-30b-a3b", elementwise_kernel="scripted")
    return sum(item.bytes_per_element for item in ledger.of(Stream, what="moe.act"))


def _dense_slowdown(subject: Pass) -> float:
    """Bytes that a dense network's activation moves, relative to those of one kernel each way."""
    ledger, _ = figures.run("elementwise_kernel", subject, model="llama3-8b", elementwise_kernel="scripted")
    return sum(item.bytes_per_element for item in ledger.of(Stream, what="mlp.act")) / 16.0


TECHNIQUE = Technique(
    key=_KEY,
    name="Scripted activations",
    slot="elementwise_kernel",
    choices=("scripted",),
    searched=False,
    asked=True,
    source="Megatron-Core fusions/fused_bias_swiglu.py",
    summary="Megatron-Core's gated activations, operator by operator, weighted by fp32 probabilities in experts",
    figures=(
        Figure(
            "bytes that SwiGLU weighted by fp32 probabilities moves per 16-bit element, forward and backward",
            22.0 + 130.0,
            1e-9,
            "Megatron-Core fusions/fused_bias_swiglu.py, what its operators read and write",
            _expert_traffic,
        ),
        Figure(
            "time of a dense network's activation, relative to one kernel each way",
            2.56,
            0.05,  # 2.46 to 2.66
            "linkedin/Liger-Kernel#1326, H100, widths of 4,096 and 32,768",
            _dense_slowdown,
        ),
    ),
    apply=apply,
)
