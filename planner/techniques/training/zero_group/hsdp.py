"""Hybrid sharding (HSDP, MiCS): states are sharded over neighbouring ranks and replicated across such groups.

What it does: the shard group of every ZeRO collective shrinks to the ranks inside one domain of the innermost tier (``node``), or
    to ``zero_group_ranks`` neighbours (``ranks``); gradient shards are then all-reduced across the replicas.
Saves: cross-node traffic: gathers and scatters stay inside the group, 1/F of the gradient leaves it.
Costs: states divided by the group's ranks only; one all-reduce of a gradient shard per step (under stages 2 and 3 the
    reduce-scatter of every micro-batch stays inside, the all-reduce is still once per step).
Assumes: ``node`` is as large as the innermost tier allows; experts are replicated as often as dense weights, or less where they
    have fewer copies.
Source: Zhang et al. 2022 (MiCS, arXiv:2205.00119); Zhao et al. 2023 (PyTorch FSDP, arXiv:2304.11277) §3.2.2.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from planner.costs.collectives import group_members
from planner.ledger import Array, Collective, Ledger, times
from planner.technique import Check, Context, Detail, Figure, Knob, Technique, whole_number
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.zero_stage.states import MESHES, mesh_of, owned_among, within


def valid(ctx: Context) -> Iterable[Check]:
    """Replicated states have no shard group; groups are equal."""
    yield Check("zero_group needs sharded states (zero_stage ≥ 1)", ctx.knobs.get("zero_stage") != "0")
    if ctx.knobs["zero_group"] == "ranks":
        yield Check("zero_group=ranks needs zero_group_ranks", _RANKS in ctx.knobs)
        left = np.mod(ctx.mesh.group("dp_cp").size, ctx.knobs.get(_RANKS, 1))
        yield Check("zero_group_ranks does not divide dp·cp", left == 0)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shrinks the shard groups, adds the all-reduce between replicas."""
    sizes = {of: _inside(ctx, of) for of in set(MESHES.values())}
    between = [
        item.but(what=item.what.replace("reduce_scatter", "all_reduce"), kind="all_reduce", by="hsdp", phase="step",
            group=ctx.mesh.subgroup(of, f"{of}.replica", item.group.size / sizes[of], inner=False), track="gradients",
            size=times(item.size, f"/zero_{mesh_of(item)}"), messages="1",
        )
        for item in ledger.of(Collective)
        if item.kind == "reduce_scatter" and "data_parallel" in item.tags and (of := item.group.name) in sizes
    ]  # fmt: skip
    ledger = within(ledger, ctx, sizes, "shard", "hsdp", lambda item: item.kind != "all_reduce")
    ledger = ledger.set_axes(**{f"zero_{mesh}": sizes[of] for mesh, of in MESHES.items()})
    return owned_among(ledger, ctx, sizes["dp_cp"]).add(between)


def _inside(ctx: Context, of: str) -> Array:
    """Copies of a weight inside one shard group."""
    group, domain = ctx.mesh.group(of), ctx.cluster.tiers[0].size
    if ctx.knobs["zero_group"] == "ranks" and _RANKS in ctx.knobs:
        replicas = ctx.mesh.group("dp_cp").size / ctx.knobs[_RANKS]
        return np.asarray(np.maximum(np.floor(group.size / replicas), 1.0))
    return np.asarray(
        group_members(group.size, group.stride, domain, float(ctx.cluster.devices)), dtype=np.float64
    )


def _differs(ctx: Context) -> NDArray[np.bool_] | bool:
    """Rows where a group holds more than one copy, but not all."""
    if ctx.knobs.get("zero_stage") == "0":
        return False
    inside = _inside(ctx, "dp_cp")
    return np.asarray((inside > 1) & (inside < ctx.mesh.dp * ctx.mesh.cp))


def _between_hosts(subject: Pass) -> float:
    """Elements per parameter that a rank sends between hosts of 8, of 512 fully sharded ranks."""
    ledger, _ = figures.run(
        "zero_group",
        subject,
        model="gpt2-xl",
        dp=512,
        zero_stage="3",
        zero_group="node",
        cluster="a100-sxm-80gb:64x8",
    )
    sent = figures.sent_elements(
        ledger, lambda i: "data_parallel" in i.tags and float(np.max(i.group.size * i.group.stride)) > 8
    )
    return sent / figures.parameters(ledger)


def _between_groups(subject: Pass) -> float:
    """Elements per parameter that a rank sends to other groups of 64, of 512 ranks."""
    ledger, _ = figures.run(
        "zero_group", subject, model="gpt2-xl", dp=512, zero_stage="3", zero_group="ranks", zero_group_ranks=64,
        cluster="a100-sxm-80gb:64x8",
    )  # fmt: skip
    sent = figures.sent_elements(
        ledger, lambda i: "data_parallel" in i.tags and i.group.name.endswith("replica")
    )
    return sent / figures.parameters(ledger)


_RANKS = "zero_group_ranks"
_SOURCE = "arXiv:2304.11277"
TECHNIQUES = (
    Technique(
        key="hsdp",
        name="Hybrid sharding (HSDP, MiCS)",
        slot="zero_group",
        choices=("node",),
        source=_SOURCE,
        summary="States sharded inside a scale-up domain, replicated across",
        knobs=(
            Knob(
                "zero_group",
                "ranks that share one copy of the states",
                ("full", "node", "ranks", "secondary"),
                "full",
            ),
        ),
        figures=(
            Figure(
                "elements per parameter that cross hosts, W = 512, G = 8: 2(W − 1)/(GW)",
                0.249512,
                0.015,  # the paper's form takes W for the W/G members of a replica group; exact is 2/G·(R − 1)/R = 0.2461
                "Zhao et al. 2023 (PyTorch FSDP, arXiv:2304.11277), section 3.2.2",
                _between_hosts,
            ),
        ),
        valid=valid,
        apply=apply,
        active=_differs,
    ),
    Technique(
        key="hsdp_ranks",
        name="Hybrid sharding over a number of ranks",
        slot="zero_group",
        choices=("ranks",),
        searched=False,  # any divisor of the replicas: the domain is where traffic changes
        asked=True,
        source=_SOURCE,
        summary="States sharded over so many neighbouring ranks, replicated across",
        knobs=(
            Detail(
                _RANKS,
                "ranks that share one copy (zero_group=ranks)",
                read=whole_number,
                expected="a whole number from 1",
                needed_by="zero_group=ranks",
            ),
        ),
        figures=(
            Figure(
                "elements per parameter sent between groups, W = 512, F = 64: 2/F·(R − 1)/R with R = W/F",
                2 / 64 * 7 / 8,
                1e-6,
                "Zhao et al. 2023 (PyTorch FSDP, arXiv:2304.11277), section 3.2.2: an all-reduce of a shard over W/F ranks",
                _between_groups,
            ),
        ),
        valid=valid,
        apply=apply,
        active=_differs,
    ),
)
