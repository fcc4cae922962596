"""Secondary weight shards (hpZ of ZeRO++): a second copy of the weights, sharded inside a scale-up domain, serves the backward.

What it does: the forward gathers weights from all ranks, as ZeRO stage 3 does; what a domain's ranks then hold is kept there in
    shards of its own, and the backward gathers from these.
Saves: the backward's gather between domains: one of three passes over the weights.
Costs: 2Ψ/F more bytes of weights per device in a domain of F ranks, in the 16-bit format.
Assumes: the domain is the innermost tier; every micro-batch's forward gathers anew, as weights do not change within a step.
Source: Wang et al. 2023 (ZeRO++, arXiv:2306.10209) §3.2; DeepSpeed ``zero_hpz_partition_size``.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from planner.costs.collectives import group_members
from planner.costs.precision import dtype_bytes
from planner.ledger import Array, Collective, Ledger, Resident
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.zero_stage.states import MESHES, mesh_of, within

_KEY = "hpz"


def valid(ctx: Context) -> Iterable[Check]:
    """Only gathered weights have a second shard."""
    yield Check("secondary weight shards need ZeRO stage 3", ctx.knobs.get("zero_stage") == "3")


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Gathers inside the domain in the backward; holds the second shards."""
    sizes = {of: _domain(ctx, of) for of in set(MESHES.values())}
    second = [
        item.but(what=f"{item.what}.secondary", by=_KEY, bytes_per_element=dtype_bytes(ctx.format.activation),
            size=item.size.replace(f"/zero_{mesh}", f"/secondary_{mesh}"),
        )
        for item in ledger.of(Resident, pool="parameters", lifetime="always")
        if (mesh := mesh_of(item)) is not None
    ]  # fmt: skip
    ledger = within(ledger, ctx, sizes, "domain", _KEY, _gathers_again)
    return ledger.set_axes(**{f"secondary_{mesh}": sizes[of] for mesh, of in MESHES.items()}).add(second)


def _gathers_again(item: Collective) -> bool:
    return item.kind == "all_gather" and item.phase == "backward"


def _domain(ctx: Context, of: str) -> Array:
    """Copies of a weight inside one domain."""
    group = ctx.mesh.group(of)
    members = group_members(group.size, group.stride, ctx.cluster.tiers[0].size, float(ctx.cluster.devices))
    return np.asarray(members, dtype=np.float64)


def _differs(ctx: Context) -> NDArray[np.bool_]:
    """Rows whose domain holds several copies, but not all."""
    inside = _domain(ctx, "dp_cp")
    return np.asarray((inside > 1) & (inside < ctx.mesh.dp * ctx.mesh.cp))


def _between_nodes(subject: Pass) -> float:
    """Elements per parameter that a rank gathers across nodes of 8, of 512 ranks; the fully sharded one gathers 2."""
    ledger, _ = figures.run(
        "zero_group", subject, model="gpt2-xl", dp=512, zero_stage="3", zero_group="secondary", cluster="a100-sxm-80gb:64x8",
    )  # fmt: skip
    far = figures.sent_elements(ledger, lambda i: i.kind == "all_gather" and float(np.max(i.group.size)) > 8)
    return far / figures.parameters(ledger)


TECHNIQUE = Technique(
    key=_KEY,
    name="Secondary weight shards (hpZ)",
    slot="zero_group",
    choices=("secondary",),
    searched=False,  # 2Ψ/F bytes for a gather between nodes, which hybrid sharding saves too
    source="arXiv:2306.10209",
    summary="A second copy of the weights, sharded inside a scale-up domain, for the backward",
    figures=(
        Figure(
            "weights gathered across nodes per step, in M: the forward's M, and 0 in the backward",
            1.0,
            3e-3,  # 511/512
            "Wang et al. 2023 (arXiv:2306.10209), section 3.2 and the communication table: M + 0 + M",
            _between_nodes,
        ),
    ),
    valid=valid,
    apply=apply,
    active=_differs,
)
