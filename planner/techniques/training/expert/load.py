"""How unevenly tokens fall on expert ranks: what the job says of its experts, on a row's mesh."""

from __future__ import annotations

import numpy as np

from planner.costs.moe import skewed_load_factor, zipf_shares
from planner.ledger import Array
from planner.technique import Context

__all__ = ["loads", "popular"]


def loads(ctx: Context, replicated: int = 0) -> tuple[Array | float, Array | float]:
    """Work of the busiest expert rank, and what it exchanges, relative to an even spread of all tokens.

    A capacity factor gives every expert as many tokens. Otherwise the measured load factor and the skew of experts multiply.
    Tokens of replicated experts are worked on where they are, and not exchanged.
    """
    workload = ctx.workload
    if workload.capacity_factor is not None:
        return workload.capacity_factor, workload.capacity_factor
    work: Array | float = workload.expert_load_factor
    experts = max((block.moe.experts for block in ctx.model.blocks.values() if block.moe), default=1)
    if not workload.expert_zipf:
        return work, work * (1.0 - replicated / experts)
    shares = zipf_shares(experts, workload.expert_zipf)
    skewed = np.asarray(skewed_load_factor(shares, ctx.mesh.ep, replicated))
    stays = np.asarray(shares[:replicated].sum() / 1.0)
    return work * skewed, work * np.maximum(skewed - stays, 0.0)


def popular(ctx: Context) -> int:
    """Experts of the layer that has most."""
    return max((block.moe.experts for block in ctx.model.blocks.values() if block.moe), default=0)
