"""What one iteration of a serving replica holds, and the ledger that describes it.

An iteration passes some sequences that generate one token each and some tokens of prompts through the model together. Its ledger
is that of one sequence of all these tokens, whose attention is split by the serving passes into generation and prompts; what
depends on the batch are sizes of axes, so that one ledger prices any number of compositions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from planner.costs.moe import distinct_experts, random_load_factor
from planner.ledger import PART, Array, Ledger
from planner.mesh import Mesh
from planner.operators.baseline import baseline
from planner.specs.model import Attention, Model

__all__ = ["Composition", "composition_axes", "iteration_ledger"]

_AMOUNTS = ("decodes", "context_tokens", "prefill_tokens")
_NOTHING = 1e-9  # experts that no token chose: keeps a quotient finite


@dataclass(frozen=True, slots=True, eq=False)
class Composition:
    """Batches of a whole replica, arrays over rows.

    Attributes:
        decodes: sequences that generate one token.
        context_tokens: tokens in their caches, summed over them.
        prefill_tokens: tokens of prompts, all chunks together.
        prefill_context: keys that a prompt token attends to, itself included, mean: (P + 1)/2 for a whole prompt of P tokens,
            s + (c + 1)/2 for a chunk of c behind s others.
        step_tokens: tokens that every generating sequence passes through the model: 1, and those that a draft proposes.
    """

    decodes: Array
    context_tokens: Array
    prefill_tokens: Array
    prefill_context: Array
    step_tokens: float = field(default=1.0, kw_only=True)


def iteration_ledger(model: Model) -> Ledger:
    """The forward ledger of a model before any technique, in fp32, for :func:`composition_axes` to size.

    The axis ``repeat@BLOCK`` says how many layers are of a kind.

    >>> from planner.specs.models import load_model
    >>> sorted({item.phase for item in iteration_ledger(load_model("llama3-8b")).items})
    ['forward']
    """
    repeats: dict[str, float] = {}
    for name, repeat in model.layers:
        repeats[f"repeat@{name}"] = repeats.get(f"repeat@{name}", 0.0) + repeat
    return baseline(model, batch=1.0, seq=1.0, kv_seq=1.0, training=False).set_axes(**repeats)


def composition_axes(
    model: Model,
    mesh: Mesh,
    batch: Composition,
    expert_load_factor: float | None = None,
    micro_batches: int = 1,
) -> dict[str, Array]:
    """Sizes, per rank, of the axes that an iteration's batch decides. Ranks of ``cp`` share the prompts' tokens evenly.

    Args:
        model: the model.
        mesh: the replica's degrees, one row or as many as the batch has.
        batch: what the iteration holds.
        expert_load_factor: busiest expert rank relative to the mean; None: that of random routing.
        micro_batches: equal parts of the batch; of more than one, the same sizes for a part as well.
    """
    if micro_batches > 1:
        amounts = {name: getattr(batch, name) / micro_batches for name in _AMOUNTS}
        part = composition_axes(model, mesh, replace(batch, **amounts), expert_load_factor)
        whole = composition_axes(model, mesh, batch, expert_load_factor)
        return whole | {f"{PART}{name}": size for name, size in part.items()}
    ranks, shared = mesh.dp, mesh.cp
    decodes = np.maximum(batch.decodes / ranks, np.minimum(batch.decodes, 1.0))
    prefill = batch.prefill_tokens / (ranks * shared)
    steps = batch.step_tokens
    tokens = decodes * steps + prefill
    context = batch.context_tokens / np.maximum(batch.decodes, 1.0) + (steps + 1.0) / 2.0
    pairs = decodes * steps * context + prefill * batch.prefill_context
    axes: dict[str, Array] = {
        "seq": tokens,
        "residual_seq": tokens,
        "kv_seq": pairs / np.maximum(tokens, _NOTHING),
        "logit_seq": decodes * steps + np.minimum(prefill, 1.0),
        "decodes": decodes,
        "step_tokens": np.full_like(decodes, steps),
        "prefill_tokens": prefill,
    }
    for name, block in model.blocks.items():
        if block.attention is not None:
            axes |= _keys(name, block.attention, context, prefill * shared, batch.prefill_context)
            if np.any(shared > 1.0):
                axes[f"context_keys@{name}"] = np.maximum(prefill * shared, axes[f"prefill_keys@{name}"])
            if block.attention.index_heads:
                axes[f"index_keys@{name}"] = axes["kv_seq"]
        if block.moe is not None:
            everything = batch.decodes * steps + batch.prefill_tokens
            experts, top_k = float(block.moe.experts), float(block.moe.top_k)
            load: Array | float = expert_load_factor or _load(everything, top_k, mesh.ep)
            busy = distinct_experts(everything, top_k, experts) / mesh.ep
            axes[f"busy_experts@{name}"] = np.maximum(busy, _NOTHING)
            axes[f"routed_tokens@{name}"] = everything * top_k / mesh.ep * load
    return axes


def _load(tokens: Array, top_k: float, ranks: Array) -> Array:
    """Busiest rank relative to the mean under random routing; no rank gets more than every token's every choice."""
    choices = np.maximum(tokens, 1.0)
    return np.asarray(np.minimum(random_load_factor(choices, top_k, ranks), ranks))


def _keys(
    name: str, attention: Attention, context: Array, prefill: Array, prefill_context: Array
) -> dict[str, Array]:
    """Keys that a generating sequence and that prompt tokens attend to in one kind of block.

    Prompt tokens see evenly spread numbers of keys around their mean: at most half their own number to either side, and none
    fewer than one; a window cuts the larger ones.
    """
    limits = [limit for limit in (attention.window, attention.index_top_k) if limit]
    window = float(min(limits)) if limits else np.inf
    half = np.maximum(np.minimum((prefill - 1.0) / 2.0, prefill_context - 1.0), 0.0)
    low, high = prefill_context - half, prefill_context + half
    longest = np.minimum(high, window)
    # Mean of min(keys, window) over keys between low and high.
    above = np.clip(high - window, 0.0, None) if np.isfinite(window) else np.zeros_like(high)
    cut = np.where(half > 0.0, above**2 / np.maximum(4.0 * half, _NOTHING), above)
    seen = np.where(low >= window, window, prefill_context - cut) if np.isfinite(window) else prefill_context
    longest = np.maximum(longest, 1.0)
    return {
        f"decode_keys@{name}": np.minimum(context, window),
        f"prefill_keys@{name}": longest,
        f"prefill_visible@{name}": np.clip(seen / longest, 0.0, 1.0),
    }
