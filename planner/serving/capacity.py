"""How many sequences a replica holds: weights, activations, graphs and the paged cache compete for the same bytes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from planner.costs.kv_cache import iteration_activation_bytes
from planner.ledger import Array
from planner.serving.iteration import Footprint, Iterations

__all__ = ["Capacity", "capacity"]


@dataclass(frozen=True, slots=True, eq=False)
class Capacity:
    """What the devices of a replica can hold, per row.

    Attributes:
        weights_bytes, activation_bytes, reserved_bytes: taken on the fullest device before any request comes.
        cache_bytes: what is left on it for caches; negative where the model does not fit.
        sequences: requests of the given lengths that the whole replica holds at once, without preempting any.
        tokens: tokens of one context that fit into the replica's caches, whole blocks.
        request_bytes: what one request takes of the fullest device's cache.
    """

    weights_bytes: Array
    activation_bytes: Array
    reserved_bytes: float
    cache_bytes: Array
    sequences: Array
    tokens: Array
    request_bytes: Array

    def take(self, index: NDArray[np.intp]) -> Capacity:
        """Some rows."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[index] for name, value in columns.items() if np.ndim(value)})


def capacity(
    iterations: Iterations,
    isl: float,
    osl: float,
    chunk_tokens: Array | float,
    max_sequences: float | None = None,
    cache_fraction: float | None = None,
    preempting: bool = False,
) -> Capacity:
    """The capacity of a recipe's meshes for requests of ``isl`` prompt and ``osl`` answer tokens.

    Args:
        iterations: the recipe on its meshes.
        isl, osl: lengths.
        chunk_tokens: tokens of the largest iteration, per attention rank.
        max_sequences: cap per attention rank; None: the stack's.
        preempting: whether requests are counted as the engine admits them, which may have to give way later.
        cache_fraction: of the memory left for the cache, what it takes; None: the stack's.
    """
    software, ctx = iterations.software, iterations.ctx
    footprint = iterations.footprint()
    memory = float(software.memory_fraction) * float(ctx.cluster.device.memory_bytes)
    activation = _activation_bytes(iterations, chunk_tokens)
    reserved = float(software.reserved_bytes)
    left = memory - reserved - footprint.weights_bytes - activation
    share = float(software.free_fraction) if cache_fraction is None else cache_fraction
    left = np.where(left > 0.0, left * share, left)
    block = float(software.block_tokens)
    kept = float(software.headroom) if preempting else 1.0
    length = isl + kept * osl + iterations.step_tokens - 1.0
    each = footprint.cache_bytes(length, block)
    cap = float(software.max_sequences) if max_sequences is None else max_sequences
    held = np.floor(np.clip(left, 0.0, None) / np.maximum(each, 1.0))
    sequences = np.minimum(held, cap * ctx.mesh.pp) * footprint.copies
    return Capacity(
        footprint.weights_bytes,
        activation,
        reserved,
        left,
        sequences,
        _tokens(footprint, left, block),
        each,
    )


def _tokens(footprint: Footprint, left: Array, block: float) -> Array:
    """Tokens of caches that grow with the context, in whole blocks; windows count as part of them."""
    each = footprint.token_bytes + sum(footprint.window_bytes.values(), np.zeros_like(left))
    blocks = np.floor(np.clip(left, 0.0, None) / np.maximum(each * block, 1.0))
    return np.asarray(blocks * block * footprint.copies)


def _activation_bytes(iterations: Iterations, chunk_tokens: Array | float) -> Array:
    """Live activations of the largest iteration, per row."""
    model, mesh = iterations.ctx.model, iterations.ctx.mesh
    widest = np.zeros_like(mesh.tp)
    for block in model.blocks.values():
        widths = [np.zeros_like(mesh.tp)]
        if block.attention is not None:
            a = block.attention
            widths.append((a.heads * (a.query_dim + a.value_dim) + 2 * a.kv_heads * a.query_dim) / mesh.tp)
        if block.mlp is not None:
            widths.append((3.0 if block.mlp.gated else 2.0) * block.mlp.ffn / mesh.tp)
        if block.moe is not None:
            wide = (3.0 if block.moe.gated else 2.0) * block.moe.expert_ffn / mesh.etp + 2.0 * model.hidden
            widths.append(block.moe.top_k * wide * mesh.dp * mesh.cp / mesh.ep)
        if block.ssm is not None:
            widths.append(4.0 * block.ssm.inner / mesh.tp)
        widest = np.maximum(widest, np.max(widths, axis=0))
    cap = float(iterations.software.max_sequences)
    return np.asarray(
        iteration_activation_bytes(
            chunk_tokens / mesh.cp, model.hidden, widest, np.minimum(cap, 256.0), model.vocab / mesh.tp
        )
    )
