"""Eager element-wise operators: RMSNorm, rotary embedding and gated activation as released code writes them.

What it does: each operator of the reference code is a kernel of its own, as PyTorch runs it without a compiler: norms and
    rotations are computed in fp32 between two casts. Without it (``fused``) each of the three is one kernel.
Saves: nothing; it needs no kernels of its own making.
Costs: per norm, an fp32 copy of its input instead of the input, and the normalised input before the gain; per gated
    activation, the activated gate; about ten times the traffic of a norm, five times that of a rotation, twice that of an
    activation.
Assumes: LayerNorm and ungated activations are one kernel in every framework; a block that is recomputed keeps its 16-bit input
    beside the copy, which is counted without it while the block is at work.
Source: Touvron et al. 2023 (LLaMA, arXiv:2302.13971), released code (``llama/model.py``: RMSNorm, apply_rotary_emb,
    FeedForward); what PyTorch's operators save and move: ``tools/autograd/derivatives.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from planner.costs.precision import dtype_bytes
from planner.ledger import Ledger, Resident, Stream
from planner.technique import Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.elementwise_kernel.kernels import (
    GATED,
    Kernels,
    activated_gate,
    is_gated,
    is_rmsnorm,
    run_apart,
    saved,
)

_KEY = "eager_elementwise"


# Cast; square (read, write), mean (read), scale (read, write); cast; gain (read, write). Backward: the gain's gradient (two
# reads, write; read) and its input's (read, write); cast; by the scale and by the input (5), sum over the row (1); through mean
# and square (2 + 2 + 2 + 3), sum of both paths (3); cast.
_NORM = {"forward": Kernels(8.0, 5.0, 2.0, 2.0), "backward": Kernels(16.0, 18.0, 6.0, 2.0)}
# Cast, product with the angles, cast; backward the same, and the conjugate of the angles.
_ROPE = {"forward": Kernels(3.0, 2.0, 0.0, 2.0), "backward": Kernels(4.0, 2.0, 0.0, 2.0)}


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Prices the three operators kernel by kernel and adds what they keep."""
    width = dtype_bytes(ctx.format.activation)
    kept = _kept(ledger, ctx, width)
    return run_apart(ledger, width, _KEY, lambda item: _kernels(item, ctx), kept)


def _kept(ledger: Ledger, ctx: Context, width: float) -> Iterator[Resident]:
    """What the operators keep for the backward beyond the ledger, in elements of ``width`` bytes."""
    held = {(item.block, item.what) for item in ledger.of(Resident)}
    for item in ledger.of(Stream, phase="forward"):
        kernels = _kernels(item, ctx)
        if kernels is _NORM:
            # The copy takes the place of the input, where the ledger has that.
            replaced = width if (item.block, _input_of(item.what)) in held else 0.0
            if replaced < 4.0:
                yield saved(item, "input_copy", 4.0 - replaced, _KEY)
            yield saved(item, "normalised", width, _KEY)
        elif kernels is GATED:
            yield activated_gate(item, width, _KEY)


def _kernels(item: Stream, ctx: Context) -> Mapping[str, Kernels]:
    """By phase, the kernels of an operator that eager code writes out; empty for any other."""
    if is_rmsnorm(item, ctx):
        return _NORM
    if item.what.rpartition(".")[2] == "rope":
        return _ROPE
    return GATED if is_gated(item, ctx) else {}


def _input_of(norm: str) -> str:
    """The resident that has a norm's input: of hidden states, of queries and keys, or of a latent."""
    region, _, name = norm.rpartition(".")
    if not region:
        return f"{norm}.input"
    return f"{norm}_input" if name == "qk_norm" else f"{region}.{name.removesuffix('_norm')}_latent"


def _kept_bytes(subject: Pass) -> float:
    """Bytes that a layer of Llama-2 7B keeps, in units of sbh."""
    ledger, _ = figures.run(
        "elementwise_kernel",
        subject,
        model="llama2-7b",
        seq=4096,
        attention_kernel="flash",
        elementwise_kernel="eager",
    )
    return figures.saved_bytes(ledger) / (4096 * 4096)


def _norm_traffic(subject: Pass) -> float:
    """Bytes that a norm moves per element, forward and backward."""
    ledger, _ = figures.run("elementwise_kernel", subject, model="llama2-7b", elementwise_kernel="eager")
    return sum(item.bytes_per_element for item in ledger.of(Stream, what="norm1"))


_TRACKER = "PyTorch 2.13's MemTracker (torch.distributed._tools) on LLaMA's released operators, norms' statistics left out"

TECHNIQUE = Technique(
    key=_KEY,
    name="Eager element-wise operators",
    slot="elementwise_kernel",
    choices=("eager",),
    searched=False,
    asked=True,
    source="arXiv:2302.13971",
    summary="Norms, rotary embeddings and gated activations as one kernel per PyTorch operator",
    knobs=(
        Knob(
            "elementwise_kernel",
            "kernels of norms, rotary embeddings and activations",
            ("fused", "cast_norms", "eager_experts", "eager"),
            "fused",
        ),
    ),
    figures=(
        Figure(
            "bytes saved per layer of Llama-2 7B, in sbh: 16 + 8 + 8f/h + 4a/h",
            45.53125,
            1e-9,
            _TRACKER,
            _kept_bytes,
        ),
        Figure(
            "bytes that RMSNorm moves per 16-bit element, forward and backward",
            36.0 + 96.0,
            1e-9,
            "PyTorch 2.13, operators of LLaMA's released RMSNorm and of its backward, their whole inputs and outputs",
            _norm_traffic,
        ),
    ),
    apply=apply,
)
