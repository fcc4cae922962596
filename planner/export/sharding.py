"""How FSDP2 lays a plan's ranks out: a device mesh, outermost dimension first, and what is sharded over it."""

from __future__ import annotations

import numpy as np

from planner.export.rules import distributed_optimizer_instances
from planner.export.target import Target
from planner.technique import Check, Context

__all__ = ["mesh_dimensions", "replicas_outside", "replication_rule"]


def replicas_outside(ctx: Context) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Copies of the sharded states: one unless states stay inside a scale-up domain, all where nothing is sharded."""
    dp = np.asarray(ctx.mesh.dp, dtype=np.float64)
    if ctx.knobs.get("zero_stage") == "0":
        return dp
    if ctx.knobs.get("zero_group") == "node":
        return np.asarray(distributed_optimizer_instances(ctx)[0], dtype=np.float64)
    if ctx.knobs.get("zero_group") == "ranks" and "zero_group_ranks" in ctx.knobs:
        return np.asarray(dp * ctx.mesh.cp / float(ctx.knobs["zero_group_ranks"]))
    return np.ones_like(dp)


def replication_rule(ctx: Context) -> Check:
    """Whether whole data-parallel ranks are replicated: a mesh has no words for a part of a context-parallel group."""
    copies = replicas_outside(ctx)
    return Check("hybrid sharding inside a context-parallel group", np.mod(ctx.mesh.dp, copies) == 0)


def mesh_dimensions(target: Target) -> dict[str, int]:
    """Dimensions of the device mesh of a plan that keeps :func:`replication_rule`; their product is the world size.

    Ranks run fastest along tp, then cp, dp and pp, as the plan's mesh has it; hybrid sharding splits dp.
    """
    mesh = target.plan.mesh
    copies = int(replicas_outside(target.context()).flat[0])
    return {
        "pp": mesh["pp"],
        "dp_replicate": copies,
        "dp_shard": mesh["dp"] // copies,
        "cp": mesh["cp"],
        "tp": mesh["tp"],
    }
