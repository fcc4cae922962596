"""Norms between casts: an RMSNorm of one kernel on an fp32 copy of its input, made again in the backward.

What it does: the code casts a norm's 16-bit input to fp32 and gives it to a kernel that writes 16 bits. Both run again in the
    backward, so that only the 16-bit input is kept; where a whole layer is recomputed, as part of that. The two operators of
    a gated activation are kernels of their own.
Saves: nothing; against operators one by one (``eager``), two thirds of a norm's traffic.
Costs: per element 46 bytes of a norm, in place of 10, and 28 of an activation; the activated gate is kept.
Assumes: the weights' format is 16 bits; the final norm is made again as well.
Source: InternLM/InternLM @20fe5ac297, ``internlm/model/modeling_internlm.py`` (``norm1(residual.float())``, under
    ``dropout_selective_checkpoint``, on unless a whole layer is recomputed) and ``linear.py`` (``F.silu(w1(x)) * w2(x)``);
    NVIDIA/apex, ``csrc/layer_norm_cuda_kernel.cu`` (MixedFusedRMSNorm: the gain's gradient is a kernel of its own, which
    reads both inputs again).
"""

from __future__ import annotations

from collections.abc import Mapping

from planner.costs.precision import dtype_bytes
from planner.ledger import Ledger, Stream
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.elementwise_kernel.kernels import (
    GATED,
    Kernels,
    activated_gate,
    is_gated,
    is_rmsnorm,
    run_apart,
)

_KEY = "cast_norms"

# Cast; norm (reads fp32, writes 16 bits). Backward: both again; the input's gradient (reads the output's and the copy, writes
# fp32); the gain's (reads both, and sums over rows); cast.
_FORWARD = Kernels(2.0, fp32=1.0, plain=1.0, casts=1.0)
_NORM = {"forward": _FORWARD, "backward": Kernels(6.0, fp32=4.0, plain=3.0, casts=2.0)}
# Where the whole layer is made again, the norm is once more with it.
_OF_RECOMPUTED = {"forward": _FORWARD, "backward": Kernels(4.0, fp32=3.0, plain=2.0, casts=1.0)}


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Prices norms and gated activations by their kernels."""
    width = dtype_bytes(ctx.format.activation)
    gates = [
        activated_gate(item, width, _KEY)
        for item in ledger.of(Stream, phase="forward")
        if is_gated(item, ctx)
    ]
    return run_apart(ledger, width, _KEY, lambda item: _kernels(item, ctx), gates)


def _kernels(item: Stream, ctx: Context) -> Mapping[str, Kernels]:
    """By phase, the kernels of a norm or a gated activation; empty for any other operator."""
    if is_rmsnorm(item, ctx):
        return _OF_RECOMPUTED if ctx.knobs.get("recompute") == "full" else _NORM
    return GATED if is_gated(item, ctx) else {}


def _norm_traffic(subject: Pass) -> float:
    """Bytes that a norm moves per element, forward and backward."""
    ledger, _ = figures.run("elementwise_kernel", subject, model="llama2-7b", elementwise_kernel=_KEY)
    return sum(item.bytes_per_element for item in ledger.of(Stream, what="norm1"))


TECHNIQUE = Technique(
    key=_KEY,
    name="Norms between casts",
    slot="elementwise_kernel",
    choices=(_KEY,),
    searched=False,
    asked=True,
    source="InternLM modeling_internlm.py",
    summary="Norms by one kernel on an fp32 copy, again in the backward; gated activations by operator",
    figures=(
        Figure(
            "bytes that RMSNorm moves per 16-bit element: (2 + 4) + (4 + 2), again, (2 + 4 + 4) + (2 + 4), (4 + 2)",
            12.0 + 34.0,
            1e-9,
            "InternLM modeling_internlm.py @20fe5ac297, apex csrc/layer_norm_cuda_kernel.cu: what kernels read and write",
            _norm_traffic,
        ),
    ),
    apply=apply,
)
