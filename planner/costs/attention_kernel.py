"""FLOP, bytes and seconds of one fused attention kernel, forward or backward, prefill or decode.

The kernel deals tiles of queries to the multiprocessors, and each tile walks over the keys that its queries
see. So its time has four parts (:func:`attention_s`): arithmetic and traffic of all tiles together, start and end of
every tile, and the walk of the longest tile, which nobody shortens while others idle. Only with one query per
sequence (decode) is the walk itself split.

Sources: T. Dao et al., "FlashAttention", arXiv:2205.14135; T. Dao, "FlashAttention-2", arXiv:2307.08691
(queries as the parallel dimension); T. Dao et al., "Flash-Decoding", 2023 (split keys); J. Shah et al.,
"FlashAttention-3", arXiv:2407.08608 (exponentials beside products).
"""

from __future__ import annotations

import numpy as np

from planner.costs.arrays import Real
from planner.costs.compute import cool_compute_s, roofline_s

__all__ = [
    "FLASH_BACKWARD_PASSES",
    "attention_bytes",
    "attention_flop",
    "attention_s",
    "causal_fraction",
]

FLASH_BACKWARD_PASSES = 2.5
"""Products in the fused attention backward (S, dV, dP, dQ, dK) per product in its forward (S, O).

T. Dao, "FlashAttention-2", arXiv:2307.08691, section 4.1.
"""


def causal_fraction(queries: Real, keys: Real, window: Real = np.inf) -> Real:
    """Fraction of the (queries × keys) score matrix that a causal, possibly sliding, window leaves.

    The queries are the last of the keys' positions (``queries <= keys``: equal in training, fewer in a
    prefill chunk or a decode step); every query sees at most ``window`` keys, itself included.

    Counted exactly: query ``i`` sees ``min(keys − queries + i, window)`` keys, ``i = 1 … queries``.

    >>> float(causal_fraction(4, 4))  # (1 + 2 + 3 + 4) / 16
    0.625
    >>> float(causal_fraction(4, 4, window=2))  # (1 + 2 + 2 + 2) / 16
    0.4375
    """
    past = keys - queries * 1.0
    growing = np.clip(window - past, 0.0, queries)  # queries that still see every key before them
    seen = growing * (past + (growing + 1.0) / 2.0)
    capped = queries - growing
    # An infinite window caps nobody, and 0 · inf is not a number.
    return (seen + capped * np.minimum(window, keys)) / (1.0 * queries * keys)


def attention_flop(
    batch: Real,
    heads: Real,
    queries: Real,
    keys: Real,
    qk_dim: Real,
    v_dim: Real | None = None,
    *,
    visible: Real = 1.0,
    passes: Real = 1.0,
) -> Real:
    """FLOP of softmax(QKᵀ)V: ``2·batch·heads·queries·keys·(qk_dim + v_dim)·visible·passes``.

    ``visible`` is the fraction of scores computed (:func:`causal_fraction`, or 1 in conventions that count
    the full matrix), ``passes`` is 1 forward and :data:`FLASH_BACKWARD_PASSES` in the fused backward, which
    computes the scores again.

    >>> attention_flop(1, 96, 2048, 2048, 128) / (4 * 2048**2 * 12288)  # Narayanan et al. 2021: 4·b·s²·h
    1.0
    """
    width = qk_dim + (qk_dim if v_dim is None else v_dim)
    return 2.0 * batch * heads * queries * keys * visible * passes * width


def attention_bytes(
    batch: Real,
    heads: Real,
    kv_heads: Real,
    queries: Real,
    keys: Real,
    qk_dim: Real,
    v_dim: Real | None = None,
    bytes_per_element: Real = 2.0,
    passes: Real = 1.0,
    kv_bytes_per_element: Real | None = None,
) -> Real:
    """Bytes a fused attention moves that touches every tensor once: Q and O, K and V.

    The backward reads Q, K, V, O, dO and writes dQ, dK, dV, which is twice as much (``passes=2``). Keys and
    values have ``kv_bytes_per_element`` where a cache holds them in another format.

    >>> attention_bytes(1, 32, 8, 1, 8192, 128) / 1e6  # decode: 2 * 8 * 8192 * 128 elements of K and V
    33.570816
    """
    width = qk_dim + (qk_dim if v_dim is None else v_dim)
    stored = bytes_per_element if kv_bytes_per_element is None else kv_bytes_per_element
    return passes * batch * width * (bytes_per_element * heads * queries + stored * kv_heads * keys)


def attention_s(
    batch: Real,
    heads: Real,
    kv_heads: Real,
    queries: Real,
    keys: Real,
    qk_dim: Real,
    v_dim: Real | None = None,
    *,
    visible: Real = 1.0,
    passes: Real = 1.0,
    peak_flop_per_s: Real,
    vector_flop_per_s: Real,
    bytes_: Real,
    memory_bytes_per_s: Real,
    multiprocessors: Real,
    tile: Real,
    softmax_flop: Real = 0.0,
    straggler: Real = 0.0,
    tile_s: Real = 0.0,
    split_s: Real = 0.0,
    splits: float = np.inf,
    memory: Real = 1.0,
    overlap_loss: Real = 0.0,
    launch_s: Real = 0.0,
    boost: Real = 0.0,
) -> Real:
    """Seconds of a fused attention kernel on ``multiprocessors`` (S) of them.

    A score costs ``s = 2·(qk_dim + v_dim)/peak + softmax_flop/vector``. Tiles hold ``tile`` (T) rows, the
    queries of all heads that share keys side by side: ``n = batch·kv_heads·⌈g·queries/T⌉`` of them,
    ``g = heads/kv_heads``. Blocks on the mask's edge are computed whole, so that of a matrix of which a
    fraction v is visible ``v + (1 − v)·min(1, T/queries)`` is paid. Then the time is::

        launch + roofline_s(scores·s + walk, bytes/(memory·bandwidth)) + n·tile_s/S
        walk = straggler·T·longest·s·S, with one query: at most split_s·√longest, at least walk/splits

    The bound of list scheduling: all multiprocessors are busy until the last tile starts, and it is among the longest. The walk
    matters while there are few tiles, and vanishes among many; ``longest = min(keys, 2·v·keys + T)`` keys of the last tile (all
    of them under a causal mask, about the window under a short one). Arithmetic, tiles and walk are ``passes`` times as long.
    No batch, no queries or no keys take no time.

    Args:
        peak_flop_per_s: rate that the products of a long kernel sustain, forward or backward.
        vector_flop_per_s: fp32 rate outside the matrix units.
        softmax_flop: vector FLOP per score that the products do not hide.
        straggler: how much longer the longest tile takes on a multiprocessor of its own than its share of
            the device's rate says, because one tile does not fill it.
        tile_s: start and end of a tile on its multiprocessor.
        split_s: seconds per √key of a walk that idle multiprocessors share.
        splits: among how many of them at most.
        boost: see :func:`planner.costs.compute.cool_compute_s`; 0 in a training step.

    >>> ideal = dict(peak_flop_per_s=1e15, vector_flop_per_s=6e13, bytes_=0.0, memory_bytes_per_s=3e12,
    ...              multiprocessors=132, tile=64)
    >>> s = attention_s(1, 32, 32, 8192, 8192, 128, **ideal)  # 4 * 32 * 8192**2 * 128 = 1.0995e12 FLOP
    >>> round(float(s) * 1e3, 3)
    1.1
    """
    group = 1.0 * heads / kv_heads
    tiles = np.ceil(group * queries / tile)  # of one sequence and one head of keys
    per_score_s = (2.0 * passes / peak_flop_per_s) * (qk_dim + (qk_dim if v_dim is None else v_dim)) + (
        passes * softmax_flop / vector_flop_per_s
    )
    sharers = 1.0 * batch * kv_heads
    paid = visible + (1.0 - visible) * np.minimum(1.0, tile / np.maximum(queries, 1.0))
    compute_s = sharers * tiles * keys * paid * (tile * per_score_s)
    longest = np.minimum(keys, 2.0 * visible * keys + tile)
    walk_s = longest * (straggler * tile * multiprocessors * per_score_s)
    shared_s = np.minimum(walk_s, split_s * np.sqrt(longest))
    if splits < np.inf:
        shared_s = np.maximum(shared_s, walk_s / splits)
    walk_s = np.where(queries > 1.0, walk_s, shared_s)
    arithmetic_s = compute_s + walk_s
    if np.any(boost):
        arithmetic_s = cool_compute_s(arithmetic_s, boost)
    memory_s = bytes_ * (1.0 / (memory * memory_bytes_per_s))
    tiles_s = sharers * tiles * (passes * tile_s / multiprocessors)
    busy_s = launch_s + roofline_s(arithmetic_s, memory_s, overlap_loss) + tiles_s
    return busy_s * np.greater(compute_s, 0)
