"""Fused gradient accumulation with placeholders: autograd is handed an empty gradient of every weight's shape.

What it does: the weight-gradient product accumulates in place, as in ``fused``; because autograd wants a gradient all the
    same, it is given a tensor that nobody reads. Layers share one for each shape and keep it for good; the head allocates its
    own.
Saves: nothing beside ``fused``.
Costs: one 16-bit copy of one layer's weights (one expert's, of a layer of experts), and of the head's while it is at work.
Assumes: a device holds layers of every kind, or at least one; where two kinds share a shape, the first one counts it.
Source: TransformerEngine ``pytorch/module/base.py`` (``get_dummy_wgrad``); Megatron-Core ``tensor_parallel/layers.py``
    (``LinearWithGradAccumulationAndAsyncCommunication``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from planner.costs.precision import dtype_bytes
from planner.ledger import Array, Ledger, Matmul, Resident, times
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass

_KEY = "placeholder_gradients"


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Adds what a device keeps of every shape once, dealt to its layers of a kind, and what the head holds at work."""
    shares = {f"once@{kind}": np.minimum(ctx.mesh.pp / layers, 1.0) for kind, layers in _layers(ctx).items()}
    return ledger.set_axes(**shares).add(_placeholders(ledger, ctx))


def _layers(ctx: Context) -> Counter[str]:
    """Layers of each kind."""
    stacks = ("encoder.", ctx.model.encoder_layers), ("", ctx.model.layers)
    return Counter({f"{prefix}{name}": n for prefix, layers in stacks for name, n in layers})


def _placeholders(ledger: Ledger, ctx: Context) -> Iterator[Resident]:
    seen: set[tuple[float, ...]] = set()
    for item in ledger.of(Matmul, phase="weight"):
        at_head = item.block == "head"
        shape = tuple(_first(ledger.axes[side]) for side in (item.m, item.n))
        if shape in seen and not at_head:
            continue
        seen.add(shape)
        size = times(item.n, item.m)
        yield Resident(
            what=f"{item.what}.placeholder", block=item.block, tags=frozenset({"placeholder"}), by=_KEY, pool="buffers",
            size=size if at_head else times(size, f"once@{item.block}"), bytes_per_element=dtype_bytes(ctx.format.activation),
            lifetime="block" if at_head else "always",
        )  # fmt: skip


def _first(values: Array) -> float:
    return float(np.ravel(values)[0])


def _kept(subject: Pass) -> float:
    """Bytes that a device keeps for the layers of Llama-3 70B."""
    ledger, _ = figures.run(
        "gradient_accumulation", subject, model="llama3-70b", gradient_accumulation="placeholders"
    )
    kept = [
        item
        for item in ledger.of(Resident, lifetime="always")
        if item.block == "dense" and item.pool == "buffers"
    ]
    return 80 * figures.total_bytes(ledger, kept)


TECHNIQUE = Technique(
    key=_KEY,
    name="Fused gradient accumulation with placeholders",
    slot="gradient_accumulation",
    choices=("placeholders",),
    searched=False,  # what a framework does about its autograd
    asked=True,
    source="https://github.com/NVIDIA/TransformerEngine transformer_engine/pytorch/module/base.py",
    summary="Weight gradients accumulate in place beside an empty gradient of every weight's shape",
    figures=(
        Figure(
            "bytes kept for the layers of Llama-3 70B: 2 of each of 10240·8192, 8192·8192, 57344·8192, 8192·28672",
            2.0 * 8192 * (10240 + 8192 + 57344 + 28672),
            1e-9,
            "TransformerEngine get_dummy_wgrad: one tensor per shape and dtype, cached",
            _kept,
        ),
    ),
    apply=apply,
)
