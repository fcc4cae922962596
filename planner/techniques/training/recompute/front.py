"""Points of a layer's front of recomputation against kept memory: what runs again ends in a tensor that the backward reads.

What it does: drops queries, keys and values (``qkv``), the activation's result (``act``) or all that the feed-forward network
    makes before its last product (``fc1``), with the norms that these begin with, and runs the kernels again that make them. No
    product runs twice whose result nothing but the next layer reads, and the second norm's input is kept.
Saves: whole modules run to their end and full recomputation runs everything; these points take the least of all that
    keep as little, by a search over all kernels and tensors of a layer (``planner solve recompute``).
Costs: the forward of the kernels named, their activation collectives included.
Assumes: a fused attention kernel, whose output is kept, and dense networks.
Source: Jain et al. 2020 (Checkmate, arXiv:1910.02653) §4, on the layer's graph of kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from planner.ledger import Item, Ledger, Matmul, Resident
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.recompute.again import recompute

_KEY = "recompute_front"
_REGIONS = {
    "norm+act+qkv": frozenset({"norm", "mlp_act", "qkv"}),
    "norm+fc1": frozenset({"norm", "mlp"}),
    "norm+qkv+fc1": frozenset({"norm", "qkv", "mlp"}),
}


def valid(ctx: Context) -> Iterable[Check]:
    """Layers whose kernels are those of the front."""
    blocks = ctx.model.blocks.values()
    plain = all(block.attention is not None and not block.attention.latent for block in blocks)
    yield Check("points of the recomputation front are for plain attention", plain)
    dense = all(block.mlp is not None and block.moe is None and block.ssm is None for block in blocks)
    yield Check("points of the recomputation front are for dense networks", dense)
    fused = ctx.knobs["attention_kernel"] == "flash"
    yield Check("points of the recomputation front need fused attention kernels", fused)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Drops what the regions produce, and copies what leads to it."""
    regions = _REGIONS[ctx.knobs["recompute"]]
    last = {(i.block, i.what) for i in ledger.of(Matmul, phase="forward") if {"mlp", "row"} <= i.tags}

    def inside(item: Item) -> bool:
        ends = not isinstance(item, Resident) and any(
            item.block == block and (item.what == what or item.what.startswith(f"{what}."))
            for block, what in last
        )
        return not ends and not regions.isdisjoint(item.tags)

    return recompute(ledger, inside, lambda item: False, _KEY)


def _kept(subject: Pass) -> float:
    """Bytes saved per layer of Llama-3 8B with the last of the points, in units of sbh."""
    case: dict[str, Any] = {
        "model": "llama3-8b",
        "seq": 8192,
        "attention_kernel": "flash",
        "recompute": "norm+qkv+fc1",
    }
    ledger, _ = figures.run("recompute", subject, **case)
    return figures.saved_bytes(ledger) / (8192 * 4096)


TECHNIQUE = Technique(
    key=_KEY,
    name="Recomputation up to the last tensor that is read",
    slot="recompute",
    choices=tuple(_REGIONS),
    searched=False,  # a launcher has no flags for them
    source="arXiv:1910.02653",
    summary="Kernels of a layer run again as far as the backward reads their results",
    figures=(
        Figure(
            "bytes saved per layer of Llama-3 8B, in sbh: both norms' inputs 2 + 2, attention's output 2 and log-sum-exp 4a/h",
            2 + 2 + 2 + 4 * 32 / 4096,
            1e-9,
            "Jain et al. 2020 (arXiv:1910.02653), equation 1, on one layer: `planner solve recompute` keeps the same tensors",
            _kept,
        ),
    ),
    valid=valid,
    apply=apply,
)
