"""TokenRing: keys and values stay, queries travel one way around the ring and partial outputs the other.

What it does: shards every token-wise operator by cp; each rank attends with its own keys to the queries that pass by, and hands
    what it adds to their outputs back.
Saves: activations and token-wise work, divided by cp; where keys are as wide as queries, half of the ring's bytes per direction.
Costs: b·s·h·(cp − 1)/cp elements each way forward; twice that one way and once the other backward. With fewer KV heads than query
    heads more than keys and values would.
Assumes: links that carry both directions at once; fused attention kernels; zig-zag chunks; the outputs' log-sum-exp, one number
    per query and head, is neglected.
Source: Wang et al. 2024 (TokenRing, arXiv:2412.20501) §3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from planner.ledger import Ledger
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.context.exchange import pass_queries, sequence_checks, shard_sequence

_KEY = "token_ring"


def valid(ctx: Context) -> Iterable[Check]:
    """Two zig-zag chunks per rank, fused kernels, queries of one kind."""
    yield from sequence_checks(ctx, 2 * ctx.mesh.cp)
    fused = ctx.knobs["attention_kernel"] == "flash"
    yield Check("queries travel a ring past fused attention kernels alone", fused)
    latent = any(
        block.attention is not None and block.attention.latent for block in ctx.model.blocks.values()
    )
    yield Check("queries over latent keys do not travel a ring", (ctx.mesh.cp == 1) | (not latent))


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shards the sequence; queries and outputs travel."""
    return pass_queries(shard_sequence(ledger, ctx, _KEY), ctx, ctx.mesh.cp, ctx.mesh.group("cp"), _KEY)


def _one_way(subject: Pass) -> float:
    """Elements of the forward in the busier direction, over those of keys and values on a ring: 2·b·s·h·(cp − 1)/cp."""
    case: dict[str, Any] = {
        "model": "gpt3-13b", "seq": 65536, "cp": 8, "attention_kernel": "flash", "context": "tokens",
    }  # fmt: skip
    ledger, ctx = figures.run("context", subject, **case)
    ways = [
        figures.sent_elements(ledger, lambda i, way=way: i.phase == "forward" and i.track == way)  # type: ignore[misc]
        for way in ("pass_q", "return_output")
    ]
    return max(ways) / (2 * 7 / 8 * 65536 * ctx.model.hidden)


TECHNIQUE = Technique(
    key=_KEY,
    name="TokenRing (queries and outputs travel)",
    slot="context",
    choices=("tokens",),
    searched=False,  # for attention with as many KV heads as query heads, which recent models do not have
    source="arXiv:2412.20501",
    summary="Queries travel one way around the ring, partial outputs the other",
    figures=(
        Figure(
            "bytes per direction relative to a ring of keys and values, multi-head attention: Q one way, output the other",
            0.5,
            1e-6,
            "Wang et al. 2024 (arXiv:2412.20501), section 3: concurrent transmission of Q and block outputs",
            _one_way,
        ),
    ),
    valid=valid,
    apply=apply,
    active=lambda ctx: ctx.mesh.cp > 1,
)
