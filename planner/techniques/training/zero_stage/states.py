"""What data parallelism and the ZeRO stages share: gradient synchronisation and sharded states.

Dense weights are replicated over dp·cp, expert weights over edp. The shard degrees are the axes ``zero_dense``, ``zero_tied``
and ``zero_expert``, so that a later pass can shard over fewer ranks. Updates are sharded from the start (no stage makes them
faster), and undone where states are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from planner.costs.optimizer import FUSED_UPDATES
from planner.costs.precision import dtype_bytes
from planner.ledger import Array, Collective, Item, Ledger, Matmul, Resident, Stream, times
from planner.specs.model import Block, Model
from planner.specs.parameters import embedding_parameters, head_parameters, parameter_count
from planner.technique import Check, Context

__all__ = [
    "MESHES",
    "accumulated",
    "accumulated_in_place",
    "gather_updated",
    "gather_weights",
    "largest_tensor",
    "mesh_of",
    "owned_among",
    "shard",
    "shard_everything",
    "share_of_sum",
    "synchronise",
    "weight_tensors",
    "whole",
    "whole_update",
    "with_buckets",
    "with_degrees",
    "with_shards_apart",
    "with_whole",
    "within",
]

_OWNERS = "matrix_owners", "vector_owners"  # axes, per weight
_ENDS = "embedding", "head"  # the blocks that no layer is
MESHES = {"dense": "dp_cp", "tied": "dp_cp", "expert": "edp"}
"""The group that holds copies of a weight, by the mesh that the weight lives on."""


def accumulated(ctx: Context) -> Iterable[Check]:
    """Stages that shard what the step's end leaves need something to be left."""
    yield Check(
        "an update without gradients that last leaves ZeRO stages 1 and 2 nothing to shard",
        (ctx.mesh.dp * ctx.mesh.cp == 1) | (ctx.knobs.get("optimizer") not in FUSED_UPDATES),
    )


def with_degrees(ledger: Ledger, ctx: Context) -> Ledger:
    """Declares the shard degrees: all copies of a weight."""
    if "zero_dense" in ledger.axes:
        return ledger
    return ledger.set_axes(**{f"zero_{mesh}": ctx.mesh.group(group).size for mesh, group in MESHES.items()})


def mesh_of(item: Item) -> str | None:
    """The mesh that a weight, its gradient or its states live on."""
    return next((mesh for mesh in MESHES if mesh in item.tags), None)


def shard(ledger: Ledger, ctx: Context, pools: tuple[str, ...], by: str) -> Ledger:
    """Divides what the pools hold throughout by the shard degree of its mesh."""

    def part(item: Resident) -> Item | None:
        mesh = mesh_of(item)
        if item.pool not in pools or mesh is None or item.lifetime != "always":
            return None
        return item.but(size=times(item.size, f"/zero_{mesh}"), by=by)

    return with_degrees(ledger, ctx).edit(Resident, part)


def shard_everything(ledger: Ledger, ctx: Context, by: str) -> Ledger:
    """Shards every state; gathers weights per block, forward and backward; reduces gradients per block.

    Two blocks' weights are whole at once: the one at work and the next one, gathered on a stream of its own. A stack
    may keep what no layer holds, one unit then, whole from its forward to the end of the backward.
    """
    added: list[Item] = [
        *gather_weights(ledger, ctx, by, phase="forward", track="gather"),
        *gather_weights(ledger, ctx, by, phase="backward", track="gather"),
        *synchronise(ledger, ctx, "reduce_scatter", by, phase="backward", track="gather"),
    ]
    ledger = accumulated_in_place(ledger, ctx, reduced_at_once=True)
    weights, buffers = list(whole(ledger, "parameters", by)), list(whole(ledger, "gradients", by))
    for item in weights:
        gathered = item.but(what=f"{item.what}.gathered", lifetime="apart")
        added.append(gathered)
        if ctx.stack.habits["end_weights"] == "kept" and item.block in _ENDS:
            (other,) = (end for end in _ENDS if end != item.block)
            beside = gathered.but(block=other, size=times(item.size, "one_stage"))
            added += item.but(lifetime="always"), beside
        else:
            buffers.append(item.but(bytes_per_element=2.0 * item.bytes_per_element))
    sharded = shard(ledger, ctx, ("optimizer", "gradients", "parameters"), by)
    return with_whole(sharded.set_axes(one_stage=(ctx.mesh.pp == 1).astype(float)).add(added), buffers)


def accumulated_in_place(ledger: Ledger, ctx: Context, *, reduced_at_once: bool = False) -> Ledger:
    """Weight-gradient products add to the gradients in place: behind their arithmetic they read and write them.

    Where a kernel of its own accumulates, the product writes its own output, and that kernel says what it moves; where the update
    takes each gradient at once, none accumulates. Gradients that are reduced at once (``reduced_at_once``) accumulate in place
    only where there is no other replica to reduce with.
    """
    if ctx.knobs.get("gradient_accumulation") == "separate" or ctx.knobs.get("optimizer") in FUSED_UPDATES:
        return ledger
    moved = 2.0 * dtype_bytes(ctx.gradient_dtype)

    def accumulate(item: Matmul) -> Item | None:
        if item.phase != "weight":
            return None
        if not reduced_at_once:
            return item.but(out_bytes=moved)
        mesh = mesh_of(item) or "dense"
        own = dtype_bytes(item.dtype) if item.out_bytes is None else item.out_bytes
        return item.but(out_bytes=f"{own}*together_{mesh} + {moved}*alone_{mesh}")

    if reduced_at_once:
        for mesh, group in MESHES.items():
            alone = (ctx.mesh.group(group).size == 1).astype(float)
            ledger = ledger.set_axes(**{f"alone_{mesh}": alone, f"together_{mesh}": 1.0 - alone})
    return ledger.edit(Matmul, accumulate)


def whole_update(ledger: Ledger) -> Ledger:
    """Every rank updates all of its weights."""

    def unshard(item: Item) -> Item | None:
        suffix = f"/zero_{mesh_of(item)}"
        if "update" not in item.tags:
            return None
        if isinstance(item, Stream | Resident):
            return item.but(size=item.size.replace(suffix, ""))
        return item.but(groups=item.groups.replace(suffix, "")) if isinstance(item, Matmul) else None

    return ledger.edit(Item, unshard)


def with_buckets(ledger: Ledger, ctx: Context, by: str) -> Ledger:
    """Adds the copies of a bucket that the software holds beside the gradients.

    A bucket is no larger than a device's gradients. A device has one set of them, whatever else it holds: they are dealt to the
    layers, of which all devices have as many, and not to the embedding and the head.
    """
    copies, bucket = ctx.stack.bucket_copies, ctx.stack.copied_bucket_bytes or ctx.stack.gradient_bucket_bytes
    if copies is None:
        return ledger
    model, width = ctx.model, dtype_bytes(ctx.gradient_dtype) / (ctx.mesh.tp * ctx.mesh.pp)
    ends = embedding_parameters(model) + head_parameters(model)
    held, layers = parameter_count(model) * width, (parameter_count(model) - ends) * width
    several = ctx.mesh.dp * ctx.mesh.cp > 1
    buffers = [
        item.but(what=f"{item.what}.buckets", size=times(item.size, "bucket_share"), pool="buffers", by=by)
        for item in ledger.of(Resident, pool="gradients", lifetime="always")
        if item.block not in ("embedding", "head")
    ]
    return ledger.set_axes(bucket_share=several * copies.value * np.minimum(bucket.value, held) / layers).add(
        buffers
    )


def with_shards_apart(ledger: Ledger, ctx: Context, by: str) -> Ledger:
    """Adds the share of reduced gradients that a rank updates from, and a block's gathered weights, where they have memory apart.

    Whole gradients stay beside the share until the last block's are reduced; before the sums are whole.
    """
    if ctx.stack.habits["shards"] == "in_place":
        return ledger
    gathered = [
        item.but(what=f"{item.what}.gathered", lifetime="apart") for item in whole(ledger, "parameters", by)
    ]
    shares = [
        item.but(
            what=f"{item.what}.share", lifetime="step", size=times(item.size, f"/zero_{mesh_of(item)}"), by=by
        )
        for item in ledger.of(Resident, pool="gradients", lifetime="always")
        if mesh_of(item) is not None
    ]
    return with_degrees(ledger, ctx).add([*gathered, *shares])


def whole(ledger: Ledger, pool: str, by: str, copies: float = 1.0) -> Iterable[Resident]:
    """Buffers for all of a block's weights or gradients while it is at work; before the pool is sharded."""
    for item in ledger.of(Resident, pool=pool, lifetime="always"):
        if mesh_of(item) is not None:
            size = copies * item.bytes_per_element
            yield item.but(
                what=f"{item.what}.whole",
                pool="gathered",
                lifetime="block",
                bytes_per_element=size,
                by=by,
            )


def with_whole(ledger: Ledger, buffers: Sequence[Resident]) -> Ledger:
    """Adds :func:`whole` buffers. The head's are not there while its loss holds the logits: of both, the larger counts."""

    def n_bytes(items: Iterable[Resident]) -> Array:
        return np.asarray(sum(ledger.axes[item.size] * item.bytes_per_element for item in items))

    logits = [item for item in ledger.of(Resident, block="head", pool="logits") if item.lifetime == "block"]
    head = [item for item in buffers if item.block == "head"]
    if not (logits and head):
        return ledger.add(buffers)
    beside = np.maximum(1.0 - n_bytes(logits) / np.maximum(n_bytes(head), 1.0), 0.0)
    others = [item for item in buffers if item.block != "head"]
    resized = [item.but(size=times(item.size, "beside_logits")) for item in head]
    return ledger.set_axes(beside_logits=beside).add([*others, *resized])


def within(
    ledger: Ledger,
    ctx: Context,
    sizes: Mapping[str, Array],
    name: str,
    by: str,
    where: Callable[[Collective], bool] = lambda item: True,
) -> Ledger:
    """Shrinks the groups of data-parallel collectives to so many neighbouring ranks of each.

    Args:
        ledger: the ledger.
        ctx: its context.
        sizes: ranks that remain, by the name of the whole group.
        name: of the smaller groups.
        by: key of the technique.
        where: which collectives.
    """

    def shrink(item: Collective) -> Item | None:
        of = item.group.name
        if "data_parallel" not in item.tags or of not in sizes or not where(item):
            return None
        return item.but(group=ctx.mesh.subgroup(of, f"{of}.{name}", sizes[of], inner=True), by=by)

    return ledger.edit(Collective, shrink)


def synchronise(ledger: Ledger, ctx: Context, kind: str, by: str, **fields: Any) -> list[Collective]:
    """Gradient collectives of every block; in buckets once per step unless ``fields`` says otherwise."""
    when = {"phase": "step", "track": "gradients", **fields}
    return _collectives(ledger, ctx, "gradients", kind, ctx.gradient_dtype, by, when)


def share_of_sum(ctx: Context) -> str:
    """Kind of the collective by which a rank gets its share of the gradients' sum."""
    return ctx.stack.habits["gradient_sums"]


def gather_weights(ledger: Ledger, ctx: Context, by: str, **fields: Any) -> list[Collective]:
    """All-gathers of the weights in use of every block; once per step, of those that change, unless ``fields`` says otherwise."""
    when = {"phase": "step", "track": "weights", **fields}
    found = _collectives(ledger, ctx, "parameters", "all_gather", ctx.format.activation, by, when)
    return [item for item in found if when["phase"] != "step" or "frozen" not in item.tags]


def gather_updated(ledger: Ledger, ctx: Context, by: str) -> Ledger:
    """What brings every rank's updated weights to all of them, once per step.

    Owners of whole tensors broadcast what they own one after the other (PyTorch's ZeroRedundancyOptimizer, InternLM's
    optimizer): as many calls as owners, each of which fills its ring anew, and the next forward waits for them. There are no
    more owners than tensors; those of a norm or a bias alone, where there are more ranks than matrices, send a few kilobytes.
    """
    if ctx.stack.habits["weight_shares"] == "slices":
        return ledger.add(gather_weights(ledger, ctx, by))
    ledger = _owned(with_degrees(ledger, ctx), ctx, ctx.mesh.dp * ctx.mesh.cp)
    for call in gather_weights(ledger, ctx, by, track="main"):
        call = call.but(what=call.what.replace("all_gather", "broadcast"), kind="broadcast")
        ledger = ledger.add(
            call.but(
                what=f"{call.what}.{of}", size=times(call.size, f"{of}_part"), messages=times(call.size, of)
            )
            for of in _OWNERS
        )
    return ledger


def owned_among(ledger: Ledger, ctx: Context, ranks: Array) -> Ledger:
    """Deals whole tensors, where a rank updates such, to so many ranks."""
    return _owned(ledger, ctx, ranks) if _OWNERS[0] in ledger.axes else ledger


def _owned(ledger: Ledger, ctx: Context, ranks: Array) -> Ledger:
    """Owners per weight of a device, by what they own, and the degree that says what the fullest owner has: all wait for it.

    Tensors are dealt out from the largest on, each to who has least so far: a rank gets a vector alone once there are no more
    matrices, and none has more than an equal part or the largest tensor.
    """
    model, pp = ctx.model, ctx.mesh.pp
    weights = float(parameter_count(model))
    matrices, vectors = weight_tensors(model)
    of_matrices = np.minimum(ranks, matrices / pp)
    of_vectors = np.minimum(np.maximum(ranks - matrices / pp, 0.0), vectors / pp)
    # A vector has about the length of a hidden state.
    apart = vectors * model.hidden / weights * np.greater(of_vectors, 0.0)
    parts = np.maximum(np.minimum(ranks, weights / (largest_tensor(model) * pp)), 1.0)
    per_weight = ctx.mesh.tp * pp / weights
    return ledger.set_axes(
        matrix_owners=of_matrices * per_weight, matrix_owners_part=1.0 - apart,
        vector_owners=of_vectors * per_weight, vector_owners_part=apart,
        zero_dense=parts, zero_tied=parts,
    )  # fmt: skip


def weight_tensors(model: Model) -> tuple[float, float]:
    """Trained tensors of a model: matrices (queries, keys and values in one; with those of both ends), and biases and norms.

    >>> from planner.specs.models import load_model
    >>> weight_tensors(load_model("llama3-8b"))  # 32 layers of 5 matrices and 2 norms; embedding and head, final norm
    (162.0, 65.0)
    """
    matrices, vectors = 2.0, 1.0
    for name, count in (*model.layers, *model.encoder_layers):
        of_layer = _tensors(model.blocks[name])
        matrices, vectors = matrices + count * of_layer[0], vectors + count * of_layer[1]
    return matrices, vectors


def largest_tensor(model: Model) -> float:
    """Weights of a model's largest matrix: of the embedding or the head, or a feed-forward network's.

    >>> from planner.specs.models import load_model
    >>> largest_tensor(load_model("llama3-8b")) / 4096  # its vocabulary
    128256.0
    """
    blocks = [model.blocks[name] for name, _ in (*model.layers, *model.encoder_layers)]
    return float(
        max(model.vocab, *(block.mlp.ffn for block in blocks if block.mlp is not None), 0) * model.hidden
    )


def _tensors(block: Block) -> tuple[float, float]:
    matrices, vectors = 0.0, float(block.norms * (2 if block.norm == "layernorm" else 1))
    for attention in (block.attention, block.cross_attention):
        if attention is not None:
            matrices += 2.0
            vectors += attention.qkv_bias + attention.out_bias
    for network, copies in ((block.mlp, 1.0), (block.moe, float(block.moe.experts) if block.moe else 0.0)):
        if network is not None:
            matrices += copies * (2.0 + network.gated)
            vectors += copies * (2.0 + network.gated) * network.bias
    return matrices, vectors


def _collectives(
    ledger: Ledger, ctx: Context, pool: str, kind: str, dtype: str, by: str, when: dict[str, Any]
) -> list[Collective]:
    of_gradients, of_weights = ctx.stack.gradient_bucket_bytes, ctx.stack.weight_bucket_bytes
    held = of_gradients if pool == "gradients" or of_weights is None else of_weights
    bucket, whole = held.value / dtype_bytes(dtype), ctx.mesh.group("dp_cp")
    call = Collective(what="", block="", by=by, kind=kind, group=whole, size="", dtype=dtype, **when)
    return [
        call.but(
            what=f"{mesh}_{pool}.{kind}", block=item.block, tags=(item.tags - {"parameters"}) | {pool, mesh, "data_parallel"},
            group=ctx.mesh.group(MESHES[mesh]), size=item.size,
            messages=times(item.size, f"/{bucket:.0f}") if when["phase"] == "step" else "1",
        )
        for item in ledger.of(Resident, pool="parameters")
        if pool == "parameters" or "frozen" not in item.tags  # every trained weight has a gradient
        if (mesh := mesh_of(item)) is not None
    ]  # fmt: skip
