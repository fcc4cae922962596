"""Eager experts: the activation between an expert's two products, weighted by its tokens' probabilities, operator by operator.

What it does: probabilities are fp32, so that what comes after them is fp32 too; backward makes their gradient beside the input's.
    Every operator of the function is a kernel. All else is one kernel, as in ``fused``.
Saves: nothing.
Costs: per element of an expert's activation 22 bytes forward and 130 backward, in place of 6 and 10; 52 and 178 where values are
    limited before, which keeps both halves as they were. Of a squared ReLU 20 and 62 in place of 4 and 6.
Assumes: that every operator is a kernel is inferred from runs of four GPUs and two models, with nothing fitted; this function's
    kernels were not timed by anyone. PyTorch is asked to fuse it: ``jit_fuser`` is ``torch.compile`` in every release read
    (core_v0.14.0, 0.16.0, 0.16.1; ``megatron/core/jit.py``), and Megatron-Bridge's recipes of Qwen3, GPT-OSS and DeepSeek-V3 set
    ``bias_activation_fusion`` (v0.1.0rc3 to v0.6.0). But its plain sibling does not run as one kernel either: on H100 a single
    Triton kernel in place of Megatron-Core 0.16.1's SwiGLU is 1.57 to 1.63 times as fast forward, 2.46 to 2.66 times with the
    backward (linkedin/Liger-Kernel, pull request 1326). By traffic that is 10 bytes per element forward, as operator by operator,
    and about 30 backward, where one kernel moves 10 and the operators 58: so the backward here is an upper bound. A graph of the
    whole iteration runs experts in Transformer Engine's fused operators, which have one kernel for it.
Source: Megatron-Core ``transformer/moe/experts.py`` (``TEGroupedMLP``), ``fusions/fused_bias_swiglu.py`` (``weighted_swiglu``,
    ``weighted_swiglu_back``), ``fused_bias_geglu.py`` (``weighted_bias_quick_geglu_impl``, ``weighted_quick_geglu_back``) and, of
    ungated experts, ``fused_weighted_squared_relu.py``, which Megatron-Bridge's recipes of Nemotron 3 ask for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from planner.costs.precision import dtype_bytes
from planner.ledger import Ledger, Resident, Stream
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.elementwise_kernel.kernels import Kernels, run_apart

_KEY = "eager_experts"

# Activation (read, write), product (two reads, write); by the probability to fp32; back to 16 bits. Backward: gradient by
# probability to fp32; sigmoid (2), its product with that, sigmoid (2), from 1 (2), by the input (3), plus 1 (2), both products;
# activation (2), its product; both halves joined in fp32 and cast; for the probability's gradient the output again (5), the
# gradient cast, their product, its sum.
_WEIGHTED = {
    "forward": Kernels(4.0, plain=5.0, casts=2.0),
    "backward": Kernels(18.0, fp32=15.0, plain=23.0, casts=4.0),
}
# Both halves limited (4) and joined (4); input scaled (2), sigmoid (2), product (3), offset of the other half (2), product (3);
# as above. Backward: the same chain over that function, and the limits' own (6) with their halves joined (4).
_LIMITED = {
    "forward": Kernels(10.0, plain=20.0, casts=2.0),
    "backward": Kernels(26.0, fp32=17.0, plain=43.0, casts=4.0),
}
# ReLU (read, write), square (read, write); as above. Backward: gradient by probability to fp32, twice it (2), ReLU (2), their
# product (3); for the probability's gradient ReLU and square again (4), the gradient cast, their product (3), its sum (1); cast.
_SQUARED = {
    "forward": Kernels(4.0, plain=4.0, casts=2.0),
    "backward": Kernels(10.0, fp32=7.0, plain=8.0, casts=3.0),
}


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Prices experts' activations kernel by kernel, and adds what limits keep."""
    if ctx.knobs.get("cuda_graph") == "full":
        return ledger
    width = dtype_bytes(ctx.format.activation)
    kept = _kept(ledger, ctx, width)
    return run_apart(ledger, width, _KEY, lambda item: _kernels(item, ctx), kept)


def _kernels(item: Stream, ctx: Context) -> Mapping[str, Kernels]:
    """By phase, the kernels of experts' activation; empty for anything else."""
    if item.what != "moe.act":
        return {}
    moe = ctx.model.layer_in(item.block).moe
    if moe is None:
        return {}
    return _SQUARED if not moe.gated else _LIMITED if moe.limited else _WEIGHTED


def _kept(ledger: Ledger, ctx: Context, width: float) -> Iterator[Resident]:
    """Both halves before their limits."""
    for item in ledger.of(Stream, phase="forward"):
        if _kernels(item, ctx) is _LIMITED:
            yield Resident(
                what="moe.act.unlimited", block=item.block, tags=item.tags | {"saved"}, by=_KEY, size=item.size,
                bytes_per_element=2.0 * width, pool="activations", lifetime="micro_batch",
            )  # fmt: skip


def _traffic(subject: Pass, model: str = "qwen3-30b-a3b") -> float:
    """Bytes that an expert's activation moves per 16-bit element, forward and backward."""
    ledger, _ = figures.run("elementwise_kernel", subject, model=model, elementwise_kernel="eager_experts")
    return sum(item.bytes_per_element for item in ledger.of(Stream, what="moe.act"))


TECHNIQUE = Technique(
    key=_KEY,
    name="Eager activations of experts",
    slot="elementwise_kernel",
    choices=("eager_experts",),
    searched=False,
    asked=True,
    source="Megatron-Core fusions/fused_bias_swiglu.py",
    summary="Experts' activations as Megatron-Core weights them, operator by operator in fp32",
    figures=(
        Figure(
            "bytes that SwiGLU weighted by fp32 probabilities moves per 16-bit element, forward and backward",
            22.0 + 130.0,
            1e-9,
            "Megatron-Core fusions/fused_bias_swiglu.py, what its operators read and write",
            _traffic,
        ),
        Figure(
            "the same of a squared ReLU",
            20.0 + 62.0,
            1e-9,
            "Megatron-Core fusions/fused_weighted_squared_relu.py, what its operators read and write",
            partial(_traffic, model="nemotron-3-nano-30b-a3b"),
        ),
    ),
    apply=apply,
)
