"""The ledger of a model before any technique: every operator of every block kind, forward and backward, in fp32.

One block kind at a time, as eager kernels on one device: matrix products, memory-bound kernels, the tensors that the
backward pass needs (named by the recompute region that produces them), and the weights. All sizes are expressions over
named axes, so that passes can shard them. The same operators serve training (with a backward pass) and inference
(``training=False``: forward only, nothing saved, keys and values held in a cache). The operators themselves, with their
sources, are in ``planner.operators``.
"""

from __future__ import annotations

import numpy as np

from planner.costs.attention_kernel import causal_fraction
from planner.ledger import Array, Axes, Item, Ledger
from planner.operators.block import block
from planner.operators.ends import embedding, head
from planner.operators.graph import ENCODER, Graph
from planner.specs.model import Attention, Block, Model

__all__ = ["EMBEDDING", "HEAD", "baseline", "block_order"]

EMBEDDING, HEAD = "embedding", "head"


def baseline(
    model: Model,
    *,
    batch: Array | float,
    seq: Array | float,
    kv_seq: Array | float | None = None,
    encoder_seq: Array | float | None = None,
    document_len: float | None = None,
    training: bool = True,
) -> Ledger:
    """The ledger of one micro-batch (or one inference iteration) on one device.

    Args:
        model: the model.
        batch: sequences in the micro-batch, scalar or one per row.
        seq: query tokens per sequence (1 in a decode iteration).
        kv_seq: keys that a query can see, per sequence; None means ``seq``.
        encoder_seq: tokens per sequence on the encoder's side.
        document_len: packed documents that attention does not cross.
        training: with backward items and saved tensors, or forward only with a KV cache.
    """
    kv_seq = seq if kv_seq is None else kv_seq
    sizes: dict[str, Array | float] = {
        "batch": batch,
        "seq": seq,
        "residual_seq": seq,
        "kv_seq": kv_seq,
        "logit_seq": seq if training else 1.0,
        "encoder_seq": seq if encoder_seq is None else encoder_seq,
        "encoder_residual_seq": seq if encoder_seq is None else encoder_seq,
        "encoder_kv_seq": seq if encoder_seq is None else encoder_seq,
        "hidden": float(model.hidden),
        "vocab": float(model.vocab),
        "tied_copy": 0.0,  # a pipeline keeps a second copy of a tied embedding on its last stage
    }
    graphs: list[Graph] = []
    for name, spec in _kinds(model):
        graph = Graph(name, model, training=training)
        block(graph, spec)
        graphs.append(graph)
        if spec.attention is not None:
            sizes |= _key_axes(name, spec.attention, kv_seq, document_len, training)
    for name, emit in ((EMBEDDING, embedding), (HEAD, head)):
        graph = Graph(name, model, training=training)
        emit(graph, model)
        graphs.append(graph)
    ahead = model.ahead.attention if model.mtp_modules and training else None
    if ahead is not None:
        sizes |= _key_axes(HEAD, ahead, kv_seq, document_len, training)
    items: list[Item] = []
    for graph in graphs:
        items += graph.finish()
        sizes |= graph.sizes
    return Ledger(Axes(sizes), tuple(items), {})


def block_order(model: Model) -> list[str]:
    """Block kinds in the order of execution, one entry per layer: the encoder's layers, then the decoder's."""
    order = [ENCODER + name for name, repeat in model.encoder_layers for _ in range(repeat)]
    return order + [name for name, repeat in model.layers for _ in range(repeat)]


def _kinds(model: Model) -> list[tuple[str, Block]]:
    """Every block kind once, by the name of its items."""
    stacks = (ENCODER, model.encoder_layers), ("", model.layers)
    names = {prefix + name: name for prefix, layers in stacks for name, _ in layers}
    return [(kind, model.blocks[name]) for kind, name in names.items()]


def _key_axes(
    name: str, attention: Attention, kv_seq: Array | float, document_len: float | None, training: bool
) -> dict[str, Array | float]:
    """``visible@``: mean fraction of the keys that attention works on; ``index_keys@``: mean keys that an indexer scores."""
    limits = [limit for limit in (attention.window, attention.index_top_k) if limit]
    window = min(limits, default=None)
    axes = {f"visible@{name}": _visible(attention, window, kv_seq, document_len, training)}
    if attention.index_heads:
        scored = _visible(attention, attention.window, kv_seq, document_len, training)
        axes[f"index_keys@{name}"] = scored * kv_seq
    return dict(axes)


def _visible(
    attention: Attention,
    window: int | None,
    kv_seq: Array | float,
    document_len: float | None,
    training: bool,
) -> Array:
    """Mean fraction of the keys that a query sees: causal mask, packed documents, and at most ``window`` keys."""
    keys = np.asarray(kv_seq, dtype=np.float64)
    if attention.cross:
        return np.ones_like(keys)
    span = keys if document_len is None or not training else np.minimum(keys, document_len)
    most = span if window is None else np.minimum(span, window)
    if attention.causal and training:
        return np.asarray(causal_fraction(span, span, most) * span / keys)
    return np.asarray(most / keys)
