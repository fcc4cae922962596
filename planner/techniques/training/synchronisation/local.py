"""What local training shares: workers that train on their own for many steps, and agree once in a while.

A worker is a group of neighbouring data-parallel ranks that does what data parallelism does, on its own. Between workers, an
outer optimizer averages what they have learnt, once every ``inner_steps`` steps; its traffic is counted as that share of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from planner.costs.collectives import group_members
from planner.ledger import Array, Collective, Item, Ledger, Resident, Stream, times
from planner.technique import Check, Context, Detail, off, whole_number
from planner.techniques.training.zero_stage.states import MESHES, mesh_of, within

__all__ = ["KNOBS", "apart", "local", "outer_traffic", "workers_checks"]

_STEPS, _WORKERS = "inner_steps", "sync_workers"
_DEFAULT_STEPS = 500  # of DiLoCo's main experiment (arXiv:2311.08105, section 3)
_OUTER_BYTES = 4.0  # fp32 copies of what was last agreed on, and their momentum
_UPDATE_BYTES = 5 * _OUTER_BYTES  # read weights, copy and momentum; write copy and momentum
KNOBS = (
    Detail(
        _STEPS,
        f"steps between two agreements of workers ({_DEFAULT_STEPS} unless given)",
        read=whole_number,
        expected="a whole number from 1",
    ),
    Detail(
        _WORKERS,
        "workers that train on their own (one per scale-up domain unless given)",
        read=whole_number,
        expected="a whole number from 1",
    ),
)


def workers_checks(ctx: Context) -> Iterable[Check]:
    """Workers are equal groups of whole replicas, and share no states."""
    yield Check("workers do not divide dp·cp", np.mod(ctx.mesh.group("dp_cp").size, _workers(ctx)) == 0)
    yield Check("workers that train on their own cut no group further (zero_group)", _whole_group(ctx))


def _whole_group(ctx: Context) -> bool:
    return str(ctx.knobs.get("zero_group", off("zero_group"))) == off("zero_group")


def apart(ctx: Context) -> NDArray[np.bool_]:
    """Rows with more than one worker."""
    return np.asarray(_workers(ctx) > 1)


def local(
    ledger: Ledger,
    ctx: Context,
    by: str,
    copies: float,
    exchange: Callable[[Resident, Array], Iterable[Item]],
) -> Ledger:
    """Shrinks data parallelism to a worker, holds the outer optimizer's copies, adds the exchange between workers.

    Args:
        ledger: the ledger.
        ctx: its context.
        by: key of the technique.
        copies: fp32 values per parameter that the outer optimizer holds.
        exchange: of trained weights (of one block and mesh; their share of a worker's rank) and the number of workers.
    """
    workers = _workers(ctx)
    sizes = {of: np.maximum(np.floor(ctx.mesh.group(of).size / workers), 1.0) for of in set(MESHES.values())}
    steps = float(ctx.knobs.get(_STEPS, _DEFAULT_STEPS))
    ledger = within(ledger, ctx, sizes, "worker", by).set_axes(
        inner_steps=steps, outer=apart(ctx).astype(float)
    )
    axes = {f"zero_{mesh}": sizes[of] for mesh, of in MESHES.items()}
    added: list[Item] = []
    for weights in _weights(ledger):
        what, tags = weights.what.removesuffix("parameters"), (weights.tags - {"parameters"}) | {"optimizer"}
        copy = times(weights.size, "outer")  # one worker alone agrees with itself
        added += [
            replace(
                weights, what=f"{what}outer_states", pool="optimizer", tags=tags, by=by, size=copy,
                bytes_per_element=copies * _OUTER_BYTES,
            ),
            Stream(
                what=f"{what}outer_update", block=weights.block, phase="step", tags=tags, by=by,
                size=times(copy, "/inner_steps"), bytes_per_element=_UPDATE_BYTES,
            ),
        ]  # fmt: skip
        added += exchange(weights, workers)
    return ledger.set_axes(**axes).add(added)


def outer_traffic(
    weights: Resident, ctx: Context, kind: str, workers: Array, by: str, tensors: float = 1.0
) -> Collective:
    """What a rank exchanges with its counterparts in other workers, as a share of every step."""
    of = MESHES[str(mesh_of(weights))]
    group = ctx.mesh.subgroup(of, f"{of}.workers", np.minimum(workers, ctx.mesh.group(of).size), inner=False)
    size = times(weights.size, "/inner_steps")
    return Collective(
        what=f"{weights.what}.outer", block=weights.block, phase="step", by=by,
        tags=(weights.tags - {"parameters"}) | {"gradients", "data_parallel", "outer"}, kind=kind, group=group,
        size=size if tensors == 1.0 else times(size, f"{tensors:g}"), dtype="fp32",
    )  # fmt: skip


def _weights(ledger: Ledger) -> list[Resident]:
    """Trained weights, divided as their optimizer states are."""
    found = []
    for weights in ledger.of(Resident, pool="parameters", lifetime="always"):
        mesh = mesh_of(weights)
        if mesh is not None and "frozen" not in weights.tags:
            states = ledger.of(Resident, pool="optimizer", block=weights.block)
            suffix = f"/zero_{mesh}"
            sharded = any(suffix in item.size for item in states) and suffix not in weights.size
            found.append(replace(weights, size=times(weights.size, suffix)) if sharded else weights)
    return found


def _workers(ctx: Context) -> Array:
    """How many there are on each row: as many as named, or one per innermost tier."""
    group = ctx.mesh.group("dp_cp")
    if _WORKERS in ctx.knobs:
        return np.full(np.shape(ctx.mesh.dp * ctx.mesh.cp), float(ctx.knobs[_WORKERS]))
    inside = group_members(group.size, group.stride, ctx.cluster.tiers[0].size, float(ctx.cluster.devices))
    return np.asarray(group.size / inside, dtype=np.float64)
