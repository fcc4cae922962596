"""Context parallelism: the sequence is split over ``cp`` ranks, and attention fetches the keys and values it lacks.

What it does: shards every token-wise operator by cp. ``p2p`` passes blocks of K and V around a ring while attention works on
    the previous block; ``all_gather`` collects K and V before attention.
Saves: activations and token-wise work, divided by cp.
Costs: 2·b·s·h_kv·(cp−1)/cp elements forward (K and V), twice that backward (K and V again, dK and dV back). Weights are
    replicated over cp: their gradients are reduced over dp·cp.
Assumes: causal work is balanced by zig-zag chunks (sequence divisible by 2·cp); ring steps overlap with attention step by step.
Source: Liu et al. 2023 (arXiv:2310.01889); zig-zag balance, Brandon et al. 2023 (arXiv:2311.09431); all-gather form, Llama 3
    (arXiv:2407.21783) §3.3.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from planner.ledger import AttentionCore, Collective, Item, Ledger, Matmul, Resident, times
from planner.technique import Check, Context, Knob, Technique


def valid(ctx: Context) -> Iterable[Check]:
    """Zig-zag halves per rank, and attention layers to split."""
    cp = ctx.mesh.cp
    yield Check(
        "sequence length not divisible by 2·cp (zig-zag)", (ctx.workload.seq_len % (2 * cp) == 0) | (cp == 1)
    )
    attends = all(block.attention is not None for block in ctx.model.blocks.values())
    yield Check("context parallelism of state-space layers is not modelled", (cp == 1) | attends)


def shard_sequence(ledger: Ledger, ctx: Context) -> Ledger:
    """Divides the tokens of every rank by cp; keys stay whole inside attention."""
    cp = ctx.mesh.cp
    return ledger.shard(seq=cp, residual_seq=cp, logit_seq=cp, encoder_seq=cp, encoder_residual_seq=cp)


def key_values(ledger: Ledger, core: Item) -> tuple[str, str]:
    """Expressions for the local keys and values of an attention core."""
    region = core.what.partition(".")[0]
    k = next(i for i in ledger.of(Resident, block=core.block, what=f"{region}.k"))
    v = next(i for i in ledger.of(Resident, block=core.block, what=f"{region}.v"))
    return k.size, v.size


def ring(ledger: Ledger, ctx: Context) -> Ledger:
    """K and V blocks travel around the ring beside the attention kernels."""
    ledger = shard_sequence(ledger, ctx).set_axes(ring=ctx.mesh.cp, ring_steps=ctx.mesh.cp - 1.0)
    return _exchange(ledger, ctx, "p2p")


def gathered(ledger: Ledger, ctx: Context) -> Ledger:
    """K and V are gathered before attention; their gradients are reduce-scattered after it."""
    ledger = shard_sequence(ledger, ctx).set_axes(ring=ctx.mesh.cp)
    return _exchange(ledger, ctx, "all_gather")


def _exchange(ledger: Ledger, ctx: Context, how: str) -> Ledger:
    group, dtype = ctx.mesh.group("cp"), ctx.format.activation
    added: list[Item] = []
    for core in [*ledger.of(AttentionCore), *_eager_cores(ledger)]:
        local = " + ".join(key_values(ledger, core))
        window = f"ring.{core.what}.{core.block}.{core.phase}"
        common: dict[str, Any] = {
            "block": core.block,
            "phase": core.phase,
            "tags": frozenset({"core_attn", "cp"}),
            "by": "ring_attention",
            "dtype": dtype,
            "group": group,
        }
        if how == "p2p":
            # Every step moves one block of K and V; the backward also returns their gradients.
            passes = "1" if core.phase == "forward" else "2"
            added.append(
                Collective(
                    what=f"{core.what}.ring",
                    kind="point_to_point",
                    size=times(times(local, "ring_steps"), passes),
                    window=window,
                    track="ring",
                    **common,
                )
            )
            ledger = ledger.cut(window, ctx.mesh.cp).edit(
                type(core),
                lambda item, core=core, window=window: replace(item, window=window) if item is core else None,
            )
            continue
        full = times(local, "ring")
        added.append(Collective(what=f"{core.what}.gather_kv", kind="all_gather", size=full, **common))
        if core.phase == "backward":
            added.append(
                Collective(what=f"{core.what}.scatter_dkv", kind="reduce_scatter", size=full, **common)
            )
    return ledger.add(added)


def _eager_cores(ledger: Ledger) -> list[Matmul]:
    """The score products of eager attention, one per phase."""
    found: dict[tuple[str, str, str], Matmul] = {}
    for item in ledger.of(Matmul):
        if item.what.endswith(".scores"):
            found.setdefault((item.what, item.block, item.phase), item)
    return list(found.values())


_KNOBS = (
    Knob("cp", "context-parallel degree"),
    Knob("context", "how keys and values meet", ("p2p", "all_gather"), "p2p"),
)

TECHNIQUES = (
    Technique(
        key="ring_attention",
        name="Ring attention (context parallelism, zig-zag)",
        slot="context",
        choices=("p2p",),
        default=True,
        source="arXiv:2310.01889",
        summary="Keys and values travel around a ring beside attention",
        knobs=_KNOBS,
        valid=valid,
        apply=ring,
    ),
    Technique(
        key="all_gather_cp",
        name="All-gather context parallelism",
        slot="context",
        choices=("all_gather",),
        source="arXiv:2407.21783",
        summary="Keys and values are gathered before attention",
        knobs=_KNOBS,
        valid=valid,
        apply=gathered,
        active=lambda ctx: ctx.mesh.cp > 1,
    ),
)
