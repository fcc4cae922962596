"""Expert parallelism: experts are spread over ``ep`` ranks, each cut over ``etp``, on a mesh folded over the dense one.

What it does: every rank keeps experts/ep experts (1/etp of each); tokens travel to their experts and back by all-to-all.
Saves: expert weights, divided by ep·etp.
Costs: dispatch and combine, k·T·h elements each way, forward and backward; with etp > 1 an all-gather of the dispatched
    tokens and a reduce-scatter of the results; the busiest rank works and waits ``expert_load_factor`` times the mean.
Assumes: tokens of the sequence-parallel shard are dispatched; a capacity factor pads every expert's tokens up to it; all-to-alls
    are exposed.
Source: Lepikhin et al. 2020 (GShard, arXiv:2006.16668) §3; Liu et al. 2025 (MoE parallel folding, arXiv:2504.14960).
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.ledger import Collective, Item, Ledger, Stream
from planner.technique import Check, Context, Knob, Technique


def valid(ctx: Context) -> Iterable[Check]:
    """Both meshes hold the same ranks; whole experts per rank."""
    mesh = ctx.mesh
    ranks = mesh.tp * mesh.cp * mesh.dp
    yield Check("etp·ep does not divide tp·cp·dp", ranks % (mesh.etp * mesh.ep) == 0)
    moes = [block.moe for block in ctx.model.blocks.values() if block.moe is not None]
    if not moes:
        yield Check("expert degrees without experts", (mesh.ep == 1) & (mesh.etp == 1))
    for moe in moes:
        yield Check("experts not divisible by ep", moe.experts % mesh.ep == 0)
        yield Check("expert width not divisible by etp", moe.expert_ffn % mesh.etp == 0)
        yield Check(
            "experts with tp > 1 need sequence parallelism",
            (mesh.tp == 1) | (ctx.knobs["sequence_parallel"] == "true"),
        )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shards experts, multiplies the rows per expert, adds the exchanges."""
    if not any(block.moe for block in ctx.model.blocks.values()):
        return ledger
    ep, etp, workload = ctx.mesh.ep, ctx.mesh.etp, ctx.workload
    skew = workload.expert_load_factor
    if workload.capacity_factor is not None:
        skew = max(min(skew, workload.capacity_factor), 1.0)
    rows = max(skew, workload.capacity_factor or 0.0)
    ledger = ledger.shard(experts=ep, expert_ffn=etp).scale(expert_rows=ep * etp * rows)
    added: list[Item] = []
    for item in ledger.of(Stream):
        if item.what not in ("moe.permute", "moe.unpermute"):
            continue
        # The backward of the dispatch is a combine and vice versa: same bytes.
        tags = item.tags - {"activation"}
        added.append(
            Collective(
                what=item.what.replace("unpermute", "combine").replace("permute", "dispatch"), block=item.block, phase=item.phase,
                tags=tags, by="moe_folding", source="arXiv:2006.16668", kind="all_to_all", group=ctx.mesh.group("ep"),
                size=item.size, dtype=ctx.format.activation, skew=rows,
            )
        )  # fmt: skip
        outward = (item.what == "moe.permute") == (item.phase == "forward")
        added.append(
            Collective(
                what=f"{item.what}.expert_tensor", block=item.block, phase=item.phase, tags=tags, by="moe_folding", source="arXiv:2504.14960",
                kind="all_gather" if outward else "reduce_scatter", group=ctx.mesh.group("etp"),
                size=f"{item.size}*etp_ranks", dtype=ctx.format.activation, skew=rows,
            )
        )  # fmt: skip
    return ledger.set_axes(etp_ranks=etp).add(added)


TECHNIQUE = Technique(
    key="moe_folding",
    name="Expert parallelism on a folded mesh",
    slot="expert",
    choices=("folded",),
    default=True,
    source="arXiv:2504.14960",
    summary="Experts spread over ep ranks and cut over etp",
    knobs=(Knob("ep", "expert-parallel degree"), Knob("etp", "expert-tensor-parallel degree")),
    valid=valid,
    apply=apply,
)
