"""What the ways to split a sequence over ranks share: the split itself, and the two ways for queries to meet distant keys.

Either heads are swapped for tokens (all-to-alls around attention), or keys and values travel (a ring beside attention, or a
gather before it). The two compose: heads are swapped inside a group, and keys travel between such groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.costs.precision import dtype_bytes
from planner.ledger import (
    Array,
    AttentionCore,
    Collective,
    Group,
    Item,
    Kernel,
    Ledger,
    Resident,
    Stream,
    role,
    times,
)
from planner.technique import Check, Context

__all__ = [
    "divides",
    "gather_keys",
    "gather_ring",
    "pass_keys",
    "pass_queries",
    "sequence_checks",
    "shard_sequence",
    "swap_heads",
]

_TOKENS = ("seq", "encoder_seq")
_SUM_BYTES = 8.0  # an fp32 sum is read and written
_BUFFERS = 4  # keys and values, and their gradients, in use and arriving


def divides(count: Array | float, ranks: Array) -> NDArray[np.bool_]:
    """Whether ``count`` things are dealt to ``ranks`` evenly, or copied evenly where they are fewer."""
    few = np.maximum(count, 1.0)
    return np.asarray((few % ranks == 0) | (ranks % few == 0))


def sequence_checks(ctx: Context, parts: Array) -> Iterable[Check]:
    """Whole parts of every sequence, and nothing but attention to mix tokens."""
    alone = ctx.mesh.cp == 1
    for name, length in (("sequence", ctx.workload.seq_len), ("encoder", ctx.workload.encoder_seq_len)):
        if length:
            yield Check(f"{name} length not divisible among cp ranks", alone | (length % parts == 0))
    mixers = [block.ssm for block in ctx.model.blocks.values() if block.ssm is not None]
    yield Check("context parallelism of state-space layers is not modelled", alone | (not mixers))


def shard_sequence(ledger: Ledger, ctx: Context, by: str) -> Ledger:
    """Divides the tokens of every rank by cp; the keys that attention sees stay whole.

    An indexer chooses among all keys before any of them is used: its own are gathered however the others travel, stay for the
    backward, and their gradients are reduce-scattered (Megatron-LM ``experimental_attention_variant/dsa.py``).
    """
    names = (*_TOKENS, "residual_seq", "encoder_residual_seq", "logit_seq")
    ledger = ledger.shard(**dict.fromkeys(names, ctx.mesh.cp))
    keys = [item for item in ledger.of(Resident) if item.what.endswith(".index_k")]
    added: list[Item] = []
    for item in keys:
        gather = Collective(
            what=f"{item.what}.gather", block=item.block, tags=frozenset({"qkv", "indexer", "cp"}), by=by, kind="all_gather",
            group=ctx.mesh.group("cp"), size=times(item.size, "context_ranks"), dtype=ctx.format.activation,
        )  # fmt: skip
        scatter = replace(
            gather, what=f"{item.what}.scatter_gradient", phase="backward", kind="reduce_scatter"
        )
        distant = times(item.size, "distant_ranks")
        added += [gather, scatter, item.but(what=f"{item.what}.distant", size=distant, by=by)]
    if keys:
        ledger = ledger.set_axes(context_ranks=ctx.mesh.cp, distant_ranks=ctx.mesh.cp - 1.0)
    return ledger.add(added)


class _Core(NamedTuple):
    """Attention of one block and phase: its kernels, and expressions for the rank's own tensors."""

    region: str
    kernels: tuple[Kernel, ...]
    tensors: Mapping[str, Resident]

    def size(self, *names: str) -> str:
        """Elements of the named tensors."""
        return " + ".join(self.tensors[name].size for name in names)

    def collective(
        self, what: str, kind: str, size: str, group: Group, ctx: Context, by: str, **more: Any
    ) -> Collective:
        """An exchange of this attention's tensors."""
        first = self.kernels[0]
        return Collective(
            what=f"{self.region}.{what}", block=first.block, phase=first.phase, tags=frozenset({"core_attn", "cp"}), by=by,
            kind=kind, group=group, size=size, dtype=ctx.format.activation, **more,
        )  # fmt: skip


def _cores(ledger: Ledger) -> list[_Core]:
    kernels: dict[tuple[str, str, str], list[Kernel]] = defaultdict(list)
    tensors: dict[tuple[str, str], dict[str, Resident]] = defaultdict(dict)
    for item in ledger.items:
        region, _, name = item.what.partition(".")
        if isinstance(item, Kernel) and "core_attn" in item.tags:
            kernels[item.block, region, item.phase].append(item)
        elif isinstance(item, Resident) and name in ("q", "k", "v", "core_output"):
            tensors[item.block, region][name] = item
    return [
        _Core(region, tuple(group), tensors[block, region]) for (block, region, _), group in kernels.items()
    ]


def swap_heads(ledger: Ledger, ctx: Context, degree: Array, group: Group, by: str) -> Ledger:
    """Inside attention, a rank of ``group`` holds the group's tokens of its share of the heads."""
    axes = ledger.axes
    inside: dict[str, Array] = {f"swapped_{name}": axes[name] * degree for name in _TOKENS}
    for name in axes.names():
        if role(name) in ("heads", "kv_heads"):
            inside[f"swapped_{name}"] = np.maximum(axes[name] / degree, 1.0)
            inside[f"copies_{name}"] = np.maximum(
                degree / axes[name], 1.0
            )  # of a KV head that several ranks need
    ledger = ledger.set_axes(**inside)
    added: list[Item] = []
    changed: dict[int, Item] = {}
    for core in _cores(ledger):
        kv_heads = next((f for f in core.size("k").split("*") if role(f) == "kv_heads"), "")
        keys = times(core.size("k", "v"), f"copies_{kv_heads}") if kv_heads else core.size("k", "v")
        for what, size in (
            ("swap_qkv", f"{core.size('q')} + {keys}"),
            ("swap_output", core.size("core_output")),
        ):
            added.append(core.collective(what, "all_to_all", size, group, ctx, by))
        changed |= {id(kernel): _swapped(kernel, inside) for kernel in core.kernels}
    return replace(ledger, items=(*(changed.get(id(item), item) for item in ledger.items), *added))


def _swapped(kernel: Kernel, inside: Mapping[str, Array]) -> Kernel:
    """The kernel on the group's tokens and the rank's share of the heads."""

    def swap(size: str) -> str:
        return "*".join(
            f"swapped_{axis}" if f"swapped_{axis}" in inside else axis for axis in size.split("*")
        )

    kept = {field.name for field in fields(Item)} | {"dtype"}
    sizes: dict[str, Any] = {f.name: getattr(kernel, f.name) for f in fields(kernel) if f.name not in kept}
    swapped: dict[str, Any] = {name: swap(size) for name, size in sizes.items() if isinstance(size, str)}
    return kernel.but(**swapped)


def pass_keys(
    ledger: Ledger,
    ctx: Context,
    degree: Array,
    group: Group,
    by: str,
    sent_share: str = "1",
    work_share: str = "1",
) -> Ledger:
    """Blocks of keys and values travel around the group beside attention on the block at hand.

    The first block is the rank's own and hides nothing; the others take the longer of a message and a block's attention.

    Args:
        ledger: the ledger.
        ctx: its context.
        degree: ranks on the ring.
        group: these ranks.
        by: key of the technique.
        sent_share: axis that says which part of the distant blocks a rank receives.
        work_share: axis by which the busiest rank's work on distant blocks differs from an even share.
    """
    ledger = ledger.set_axes(
        ring=degree, ring_steps=degree - 1.0, ring_buffers=np.where(degree > 1.0, _BUFFERS, 0.0)
    )
    added: list[Item] = []
    changed: dict[int, Item] = {}
    for core in _cores(ledger):
        first = core.kernels[0]
        window = f"ring.{core.region}.{first.block}.{first.phase}"
        local = _after_swap(ledger, core.size("k", "v"))
        # The backward also hands the gradients of K and V on.
        steps = f"{'1' if first.phase == 'forward' else '2'}*ring_steps*{sent_share}"
        sent = times(local, steps)
        added.append(
            core.collective("pass_kv", "point_to_point", sent, group, ctx, by, window=window, track="ring")
        )
        if first.phase == "forward":
            added.append(_buffer(first, times(local, "ring_buffers"), ctx, by))
        for kernel in core.kernels:
            if isinstance(kernel, AttentionCore):
                changed[id(kernel)] = kernel.but(kv=f"{kernel.kv}/ring")
                distant = kernel.but(
                    what=f"{kernel.what}.distant",
                    kv=times(f"{kernel.kv}/ring", f"ring_steps*{work_share}"),
                )
                added.append(replace(distant, window=window))
            else:
                changed[id(kernel)] = kernel.but(window=window)
                ledger = ledger.cut(window, degree)
    return replace(ledger, items=(*(changed.get(id(item), item) for item in ledger.items), *added))


def pass_queries(ledger: Ledger, ctx: Context, degree: Array, group: Group, by: str) -> Ledger:
    """Queries travel one way around the group and partial outputs the other, beside attention on the block at hand.

    Keys and values stay. In the backward, queries and the output's gradients go one way, the queries' gradients the other.
    """
    ledger = ledger.set_axes(
        ring=degree, ring_steps=degree - 1.0, ring_buffers=np.where(degree > 1.0, _BUFFERS, 0.0)
    )
    added: list[Item] = []
    changed: dict[int, Item] = {}
    for core in _cores(ledger):
        first = core.kernels[0]
        window = f"ring.{core.region}.{first.block}.{first.phase}"
        queries, outputs = core.size("q"), core.size("core_output")
        forth, back = (queries, outputs) if first.phase == "forward" else (f"{queries} + {outputs}", queries)
        for what, size in (("pass_q", forth), ("return_output", back)):
            sent = times(size, "ring_steps")
            added.append(
                core.collective(what, "point_to_point", sent, group, ctx, by, window=window, track=what)
            )
        if first.phase == "forward":
            added.append(_buffer(first, times(queries, "ring_buffers"), ctx, by))
        for kernel in core.kernels:
            assert isinstance(kernel, AttentionCore), "queries travel past fused kernels alone"
            changed[id(kernel)] = kernel.but(kv=f"{kernel.kv}/ring")
            distant = times(f"{kernel.kv}/ring", "ring_steps")
            added.append(kernel.but(what=f"{kernel.what}.distant", kv=distant, window=window))
    return replace(ledger, items=(*(changed.get(id(item), item) for item in ledger.items), *added))


def gather_keys(ledger: Ledger, ctx: Context, degree: Array, group: Group, by: str) -> Ledger:
    """Keys and values are gathered before attention; their gradients are reduce-scattered after it."""
    ledger = ledger.set_axes(ring=degree, ring_buffers=np.where(degree > 1.0, degree, 0.0))
    added: list[Item] = []
    for core in _cores(ledger):
        local = core.size("k", "v")
        whole = times(local, "ring")
        added.append(core.collective("gather_kv", "all_gather", whole, group, ctx, by))
        if core.kernels[0].phase == "backward":
            added.append(core.collective("scatter_kv_gradient", "reduce_scatter", whole, group, ctx, by))
        else:
            added.append(_buffer(core.kernels[0], times(local, "ring_buffers"), ctx, by))
    return ledger.add(added)


def gather_ring(ledger: Ledger, ctx: Context, by: str) -> Ledger:
    """Keys and values are gathered once, attention works on them block by block, and their gradients travel around the ring.

    Every block's output is merged into the sum so far, and every block's gradients are added to theirs, in fp32. Heads of keys
    and values are repeated for every query's before they leave.
    """
    apart = np.where(ctx.mesh.cp > 1, 1.0, 0.0)
    ledger = ledger.set_axes(ring=ctx.mesh.cp, ring_steps=ctx.mesh.cp - 1.0, ring_apart=apart)
    width = dtype_bytes(ctx.format.activation)
    added: list[Item] = []
    for core in _cores(ledger):
        kernel = core.kernels[0]
        if not isinstance(kernel, AttentionCore):
            continue  # the rule leaves it ranks that have nothing to pass on
        keys = " + ".join(
            f"{kernel.batch}*{kernel.heads}*{kernel.kv}*{dim}" for dim in (kernel.qk_dim, kernel.v_dim)
        )
        added.append(core.collective("gather_kv", "all_gather", keys, ctx.mesh.group("cp"), ctx, by))
        if kernel.phase == "forward":
            summed = times(core.size("core_output"), "ring_steps")
            added.append(_buffer(kernel, times(keys, "ring_apart"), ctx, by))
        else:
            summed = times(f"{times(core.size('q'), 'ring')} + {keys}", "ring_apart")
            sent = core.collective(
                "pass_kv_gradient", "point_to_point", keys, ctx.mesh.group("cp"), ctx, by, messages="ring"
            )
            added.append(replace(sent, dtype="fp32"))
        added.append(
            Stream(
                what=f"{core.region}.merge", block=kernel.block, phase=kernel.phase, tags=frozenset({"core_attn", "cp"}), by=by,
                size=summed, bytes_per_element=_SUM_BYTES + width, dtype=ctx.format.activation,
            )
        )  # fmt: skip
    return ledger.add(added)


def _buffer(core: Kernel, size: str, ctx: Context, by: str) -> Resident:
    """Keys and values of other ranks, while the block is at work."""
    return Resident(
        what=f"{core.what.partition('.')[0]}.distant_kv", block=core.block, tags=frozenset({"core_attn"}), by=by, size=size,
        bytes_per_element=dtype_bytes(ctx.format.activation), pool="buffers", lifetime="block",
    )  # fmt: skip


def _after_swap(ledger: Ledger, size: str) -> str:
    """Keys and values of a rank once heads are swapped: as many elements, and copies of KV heads that ranks share."""
    kv_heads = next((f for f in size.replace(" + ", "*").split("*") if role(f) == "kv_heads"), "")
    return times(size, f"copies_{kv_heads}") if f"copies_{kv_heads}" in ledger.axes else size
