"""Adapters: small trained bottlenecks behind the attention and behind the network of every frozen layer.

What it does: what attention and network add to the residual stream first passes h → r → h with a nonlinearity and a skip.
Saves: gradients, optimizer states, master weights and weight-gradient products of everything frozen, and the saved inputs of
    their products.
Costs: two thin products in series per adapter, which nothing runs beside; their inputs.
Assumes: adapters are whole on every tensor rank, which sees the summed output; norms stay frozen; rank 64 unless given.
Source: Houlsby et al. 2019 (arXiv:1902.00751) §2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from planner.ledger import Item, Ledger, Matmul, Resident, Stream, times
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.adaptation.frozen import ENDS, freeze, trained_weights
from planner.techniques.training.adaptation.lora import RANK

_KEY = "adapters"
_DEFAULT_RANK = 64  # the fixed size of the paper's second row, Table 1
_BEHIND = ("output", "fc2")


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Freezes every weight, adds a bottleneck behind each of two products of every layer."""
    found = [
        item
        for item in ledger.of(Matmul, phase="forward")
        if item.what.rpartition(".")[2] in _BEHIND and item.block not in ENDS
    ]
    added = [new for item in found for new in _bottleneck(item)]
    return freeze(ledger, ()).set_axes(bottleneck=float(ctx.knobs.get(RANK, _DEFAULT_RANK))).add(added)


def _bottleneck(item: Matmul) -> Iterator[Item]:
    name, rank, width = f"{item.what}.bottleneck", "bottleneck", item.n
    rows = item.m if item.groups == "1" else times(item.m, item.groups)
    tags = (item.tags - {"row", "column", "gemm"}) | {"adapter"}
    for what, n, k in (("down", rank, width), ("up", width, rank)):
        half = item.but(what=f"{name}_{what}", m=rows, n=n, k=k, groups="1", grouped=False, by=_KEY, tags=tags | {"gemm"},
            out_bytes=None,
        )  # fmt: skip
        yield half
        yield replace(half, phase="backward", n=half.k, k=half.n)
        yield replace(half, phase="weight", m=half.k, k=half.m)
    yield from trained_weights(name, item.block, f"2*{width}*{rank} + {width} + {rank}", _KEY)
    for what, size in (("input", times(width, rows)), ("middle", times(rank, rows))):
        yield Resident(
            what=f"{name}_{what}", block=item.block, tags=frozenset({"saved", "activation", "adapter"}), by=_KEY, size=size,
            bytes_per_element=4.0, pool="activations", lifetime="micro_batch",
        )  # fmt: skip
    for phase, passes in (("forward", 3.0), ("backward", 3.0)):  # the skip: two reads and a write, both ways
        yield Stream(
            what=f"{name}_skip", block=item.block, phase=phase, tags=tags | {"activation"}, by=_KEY, size=times(width, rows),
            bytes_per_element=4.0 * passes,
        )  # fmt: skip


def _added(subject: Pass) -> float:
    """Trained parameters of one adapter of BERT-large, size 64."""
    ledger, _ = figures.run(
        "adaptation", subject, model="bert-large", seq=512, adaptation=_KEY, adapter_rank=64
    )
    return sum(float(ledger.axes[i.size].flat[0]) for i in ledger.of(Resident, pool="gradients")) / 2


TECHNIQUE = Technique(
    key=_KEY,
    name="Adapters (bottlenecks in frozen layers)",
    slot="adaptation",
    choices=(_KEY,),
    searched=False,
    asked=True,
    source="arXiv:1902.00751",
    summary="Two trained bottlenecks per frozen layer",
    figures=(
        Figure(
            "parameters per adapter, biases included, d = 1024, m = 64: 2md + d + m",
            2 * 64 * 1024 + 1024 + 64.0,
            1e-9,
            "Houlsby et al. 2019 (arXiv:1902.00751), section 2.1",
            _added,
        ),
    ),
    apply=apply,
)
