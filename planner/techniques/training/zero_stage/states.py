"""What data parallelism and the ZeRO stages share: gradient synchronisation and sharded states.

Dense weights are replicated over dp·cp, expert weights over edp. The shard degrees are the axes ``zero_dense`` and
``zero_expert``, so that a later pass can shard over fewer ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from planner.costs.precision import dtype_bytes
from planner.ledger import Collective, Item, Kernel, Ledger, Resident, Stream, times
from planner.technique import Context

__all__ = ["MESHES", "gather_weights", "shard_pool", "shard_update", "synchronise", "with_degrees"]

MESHES = {"dense": "dp_cp", "tied": "dp_cp", "expert": "edp"}


def with_degrees(ledger: Ledger, ctx: Context) -> Ledger:
    """Declares the shard degrees: all replicas of a weight."""
    mesh = ctx.mesh
    return ledger.set_axes(zero_dense=mesh.dp * mesh.cp, zero_tied=mesh.dp * mesh.cp, zero_expert=mesh.edp)


def shard_pool(ledger: Ledger, pools: tuple[str, ...], by: str) -> Ledger:
    """Divides what the pools hold by the shard degree of its mesh."""

    def shard(item: Resident) -> Item | None:
        mesh = _mesh(item)
        if item.pool not in pools or mesh is None or item.lifetime != "always":
            return None
        return replace(item, size=times(item.size, f"/zero_{mesh}"), by=by, tags=item.tags | {"sharded"})

    return ledger.edit(Resident, shard)


def shard_update(ledger: Ledger, by: str) -> Ledger:
    """Divides the optimizer's kernels by the shard degree of their mesh."""

    def shard(item: Kernel) -> Item | None:
        mesh = _mesh(item)
        if "update" not in item.tags or mesh is None or not isinstance(item, Stream):
            return None
        return replace(item, size=times(item.size, f"/zero_{mesh}"), by=by)

    return ledger.edit(Kernel, shard)


def synchronise(ledger: Ledger, ctx: Context, kind: str, by: str, **fields: Any) -> list[Collective]:
    """Gradient collectives of every block; in buckets once per step unless ``fields`` says otherwise."""
    dtype = ctx.knobs.get("gradient_dtype", ctx.format.gradient)
    return _collectives(
        ledger, ctx, "gradients", kind, dtype, by, {"phase": "step", "track": "gradients", **fields}
    )


def gather_weights(ledger: Ledger, ctx: Context, by: str, **fields: Any) -> list[Collective]:
    """All-gathers of the weights in use of every block; once per step unless ``fields`` says otherwise."""
    dtype = ctx.format.activation
    return _collectives(
        ledger, ctx, "parameters", "all_gather", dtype, by, {"phase": "step", "track": "weights", **fields}
    )


def _collectives(
    ledger: Ledger, ctx: Context, pool: str, kind: str, dtype: str, by: str, fields: dict[str, Any]
) -> list[Collective]:
    bucketed = fields["phase"] == "step"
    bucket = ctx.stack.gradient_bucket_bytes.value / dtype_bytes(dtype)
    return [
        Collective(
            what=f"{mesh}_{pool}.{kind}", block=item.block, tags=frozenset({pool, mesh, "data_parallel"}), by=by,
            kind=kind, group=ctx.mesh.group(MESHES[mesh]), size=item.size, dtype=dtype,
            messages=times(item.size, f"/{bucket:.0f}") if bucketed else "1", **fields,
        )
        for item in ledger.of(Resident, pool=pool)
        if (mesh := _mesh(item)) is not None
    ]  # fmt: skip


def _mesh(item: Item) -> str | None:
    return next((mesh for mesh in MESHES if mesh in item.tags), None)
