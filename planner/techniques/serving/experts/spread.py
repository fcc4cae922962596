"""What the ways to bring tokens to experts share: experts cut over a replica's ranks, and products that read busy ones only."""

from __future__ import annotations

from collections.abc import Iterable

from planner.ledger import Item, Ledger, Matmul
from planner.technique import Check, ServingContext

__all__ = ["mixtures", "spread", "whole_experts"]


def mixtures(ctx: ServingContext) -> list[str]:
    """Blocks with experts."""
    return [name for name, block in ctx.model.blocks.items() if block.moe is not None]


def whole_experts(ctx: ServingContext) -> Iterable[Check]:
    """The experts' mesh holds the replica's ranks; whole experts and columns per rank."""
    mesh = ctx.mesh
    yield Check("etp·ep differs from tp·cp·dp", mesh.etp * mesh.ep == mesh.tp * mesh.cp * mesh.dp)
    for block in mixtures(ctx):
        moe = ctx.model.blocks[block].moe
        assert moe is not None
        yield Check("experts not divisible by ep", moe.experts % mesh.ep == 0)
        yield Check("expert width not divisible by etp", moe.expert_ffn % mesh.etp == 0)


def spread(ledger: Ledger, ctx: ServingContext, by: str) -> Ledger:
    """Cuts experts, and lets their products read the experts that were chosen."""
    mesh = ctx.mesh

    def busy(item: Matmul) -> Item | None:
        if not item.grouped:
            return None
        b = item.block
        return item.but(groups=f"busy_experts@{b}", m=f"routed_tokens@{b}/busy_experts@{b}", by=by)

    return (
        ledger.shard(experts=mesh.ep, expert_ffn=mesh.etp)
        .scale(expert_rows=mesh.cp * mesh.dp)
        .edit(Matmul, busy)
    )
