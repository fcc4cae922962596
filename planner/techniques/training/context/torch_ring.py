"""PyTorch's ring attention: keys and values gathered once, merged block by block; their gradients go around a ring.

What it does: all ranks' keys and values are gathered before the first distant block (``allgather``, the default rotation); blocks
    are attended one after the other; in the backward every rank adds its gradients of a block and hands them on.
Saves: activations and token-wise work, divided by cp.
Costs: 2·b·s·h elements gathered forward and again backward, heads repeated for every query's as model code does before attention;
    2·b·s·h in fp32 around the ring backward; one sum in fp32 per block and tensor; gathered keys and values.
Assumes: exchanges are exposed: compiled code waits for a functional collective where it is issued. Causal work is balanced by
    zig-zag chunks (sequence divisible by 2·cp).
Source: PyTorch ``torch/distributed/tensor/experimental/_attention.py`` (2024-12); repeated heads, torchtitan
    ``models/llama/model.py`` @9dec370.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planner.ledger import Collective, Ledger
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.context import ring_attention
from planner.techniques.training.context.exchange import gather_ring, shard_sequence

_KEY = "torch_ring"


def valid(ctx: Context) -> Iterable[Check]:
    """What any ring asks of the sequence, and fused kernels."""
    yield from ring_attention.valid(ctx)
    fused = ctx.knobs["attention_kernel"] == "flash"
    yield Check("PyTorch's ring needs fused attention", (ctx.mesh.cp == 1) | np.bool_(fused))


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shards the sequence; keys and values are gathered, their gradients passed on."""
    return gather_ring(shard_sequence(ledger, ctx, _KEY), ctx, _KEY)


def _sent(subject: Pass) -> float:
    """Bytes that a rank of 4 sends and gathers per layer, over the 16-bit bytes of its own keys and values of 32 heads."""
    ledger, ctx = figures.run(
        "context",
        subject,
        model="llama3-8b",
        seq=8192,
        cp=4,
        attention_kernel="flash",
        context="gathered_ring",
    )
    sent = figures.sent_elements(ledger, lambda item: "cp" in item.tags)
    wide = [item for item in ledger.of(Collective) if item.dtype == "fp32" and "cp" in item.tags]
    again = sum(float(ledger.axes[item.size].flat[0]) for item in wide)
    return (sent + again) / (2 * 8192 / 4 * ctx.model.hidden)


TECHNIQUE = Technique(
    key=_KEY,
    name="Ring attention of PyTorch (gathered keys, rotated gradients)",
    slot="context",
    choices=("gathered_ring",),
    searched=False,  # PyTorch's alone, slower than either form that is searched
    source="PyTorch torch.distributed.tensor.experimental",
    summary="Keys and values gathered once, attended block by block; gradients go around a ring",
    figures=(
        Figure(
            "bytes exchanged per layer by a rank of P = 4, in 16-bit keys and values of its own: 2(P - 1) + 2P",
            14.0,
            1e-9,
            "PyTorch _attention.py: two all-gathers, P sends of fp32 gradients",
            _sent,
        ),
    ),
    valid=valid,
    apply=apply,
    active=lambda ctx: ctx.mesh.cp > 1,
)
