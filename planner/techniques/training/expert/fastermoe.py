"""Shadowed experts (FasterMoE): the most popular experts are copied to every rank for the time that a layer is at work.

What it does: before a layer's experts work, the weights of the n most popular ones (``shadow1``, ``shadow4``) are broadcast to
    all expert ranks, which work on their own tokens for them; their gradients are reduced to the owner in the backward.
Saves: exchange of these experts' tokens, and the wait for the ranks that own them.
Costs: 2Ψ_e elements per shadowed expert, layer and micro-batch: weights forward, gradients backward; weights and gradients of
    these experts while the layer is at work.
Assumes: the job says how unlike experts are (``expert_zipf``); broadcast and reduction move a tensor once over the slowest link,
    exposed; weights stay for the backward.
Source: He et al. 2022 (FasterMoE, PPoPP, doi:10.1145/3503221.3508418) §4.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from planner.costs.precision import dtype_bytes
from planner.ledger import Collective, Item, Ledger, Resident, times
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.expert import moe_folding
from planner.techniques.training.expert.load import popular

__all__ = ["copied", "copies_checks"]

_KEY = "fastermoe"
_COUNTS = {f"shadow{count}": count for count in (1, 4)}


def valid(ctx: Context) -> Iterable[Check]:
    """Experts that differ, on ranks that share them."""
    yield from copies_checks(ctx, _COUNTS[ctx.knobs["expert"]])


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Deals the experts, copies the popular ones to every rank."""
    return copied(ledger, ctx, _COUNTS[ctx.knobs["expert"]], _KEY)


def copies_checks(ctx: Context, count: int) -> Iterable[Check]:
    """What copies of the ``count`` most popular experts ask for."""
    yield from moe_folding.valid(ctx)
    apart = ctx.mesh.ep > 1
    yield Check("shadowed experts need ep > 1", apart)
    yield Check("shadowed experts are whole on their ranks (etp = 1)", ctx.mesh.etp == 1)
    yield Check("more shadowed experts than there are", count <= popular(ctx))
    even = ctx.workload.capacity_factor is None
    yield Check("a capacity factor leaves no expert more popular than another", even)


def copied(ledger: Ledger, ctx: Context, count: int, by: str, track: str = "main") -> Ledger:
    """Deals the experts, and copies the ``count`` most popular ones to every rank, on a track."""
    ledger = moe_folding.folded(ledger, ctx, by, count)
    return ledger.set_axes(shadowed=float(count)).add(
        new
        for held in ledger.of(Resident, pool="parameters")
        if "expert" in held.tags
        for new in _copies(held, ctx, by, track)
    )


def _copies(held: Resident, ctx: Context, by: str, track: str) -> Iterator[Item]:
    # A rank holds experts/ep of all; one of them is that part of its weights.
    experts = next(factor for factor in held.size.split(" + ")[0].split("*") if factor.startswith("experts@"))
    size = times(times(held.size, "shadowed"), f"/{experts}")
    tags = frozenset({"moe", "shadow"})
    for what, phase in (("weights", "forward"), ("gradients", "backward")):
        yield Collective(
            what=f"moe.shadow_{what}", block=held.block, phase=phase, tags=tags, by=by, kind="point_to_point",
            group=ctx.mesh.group("ep"), size=size, dtype=ctx.format.activation, track=track,
        )  # fmt: skip
    width = 2.0 * dtype_bytes(ctx.format.activation)
    yield replace(
        held, what="moe.shadows", tags=tags, size=size, pool="gathered", lifetime="block", bytes_per_element=width, by=by
    )  # fmt: skip


def _moved(subject: Pass) -> float:
    """Elements that a shadowed expert costs per layer and micro-batch, over its parameters."""
    ledger, ctx = figures.run(
        "expert", subject, model="mixtral-8x7b", dp=8, ep=8, expert="shadow1", attention_kernel="flash"
    )
    moe = next(block.moe for block in ctx.model.blocks.values() if block.moe)
    sent = figures.sent_elements(ledger, lambda i: "shadow" in i.tags)
    return sent / (3 * ctx.model.hidden * moe.expert_ffn)


TECHNIQUE = Technique(
    key=_KEY,
    name="Shadowed experts (FasterMoE)",
    slot="expert",
    choices=tuple(_COUNTS),
    searched=False,  # for routers that leave experts uneven: the job has to say so
    source="doi:10.1145/3503221.3508418",
    summary="Copies of the most popular experts on every rank while a layer works",
    figures=(
        Figure(
            "elements per shadowed expert: its parameters out, its gradients back",
            2.0,
            1e-6,
            "He et al. 2022 (doi:10.1145/3503221.3508418), section 4.1: broadcast of parameters, reduction of gradients",
            _moved,
        ),
    ),
    valid=valid,
    apply=apply,
    active=lambda ctx: (ctx.mesh.ep > 1) & (popular(ctx) > 0),
)
