"""Hybrid sharding (HSDP, MiCS): states are sharded inside a scale-up domain and replicated across domains.

What it does: the shard group of every ZeRO collective shrinks to the ranks inside one domain of the innermost tier; gradient
    shards are then all-reduced across the replicas.
Saves: cross-node traffic: gathers and scatters stay inside the domain, 1/F of the gradient crosses it.
Costs: states divided by the domain's ranks only; one all-reduce of a gradient shard per step (per micro-batch under stage 2
    and 3 the reduce-scatter is local, the all-reduce still once per step).
Assumes: the shard group is as large as the innermost tier allows.
Source: Zhang et al. 2022 (MiCS, arXiv:2205.00119); Zhao et al. 2023 (arXiv:2304.11277) §3.2.2.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.costs.collectives import group_members
from planner.ledger import Array, Collective, Item, Ledger, times
from planner.technique import Context, Technique

_GROUPS = {"dp_cp": ("dense", "tied"), "edp": ("expert",)}


def shard_size(ctx: Context, of: str) -> Array:
    """Replicas of a weight inside one domain of the innermost tier."""
    group = ctx.mesh.group(of)
    size, stride = np.broadcast_arrays(group.size, group.stride)
    return np.asarray(
        group_members(size, stride, ctx.cluster.tiers[0].size, float(ctx.cluster.devices)), dtype=np.float64
    )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shrinks the shard groups, adds the all-reduce between replicas."""
    added: list[Item] = []
    sizes = {of: shard_size(ctx, of) for of in _GROUPS}

    def shrink(item: Collective) -> Item | None:
        of = item.group.name
        if "data_parallel" not in item.tags or of not in _GROUPS or item.kind == "all_reduce":
            return None
        inner = ctx.mesh.subgroup(of, f"{of}.shard", sizes[of], inner=True)
        if item.kind == "reduce_scatter":
            mesh = next(m for m in _GROUPS[of] if m in item.tags)
            outer = ctx.mesh.subgroup(of, f"{of}.replica", ctx.mesh.group(of).size / sizes[of], inner=False)
            added.append(
                replace(
                    item, what=item.what.replace("reduce_scatter", "all_reduce"), kind="all_reduce", group=outer, by="hsdp",
                    size=times(item.size, f"/zero_{mesh}"), phase="step", track="gradients", messages="1",
                )
            )  # fmt: skip
        return replace(item, group=inner, by="hsdp")

    ledger = ledger.edit(Collective, shrink)
    degrees = {f"zero_{mesh}": sizes[of] for of, meshes in _GROUPS.items() for mesh in meshes}
    return ledger.set_axes(**degrees).add(added)


def _differs(ctx: Context) -> np.ndarray:
    """Rows where the domain holds more than one replica, but not all."""
    inside = shard_size(ctx, "dp_cp")
    return (inside > 1) & (inside < ctx.mesh.dp * ctx.mesh.cp)


TECHNIQUE = Technique(
    key="hsdp",
    name="Hybrid sharding (HSDP, MiCS)",
    slot="zero_group",
    choices=("node",),
    source="arXiv:2304.11277",
    summary="States sharded inside a scale-up domain, replicated across",
    apply=apply,
    active=_differs,
)
