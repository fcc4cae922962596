"""Time of one kernel: matrix products, fused attention and streaming kernels on a roofline with slopes.

A kernel takes ``max(compute, memory, floor)``. The fractions of peak are arguments, because they belong to a
device: its profile says where each was measured. What is fixed here is the shape of the curves:

- a matrix product is paid in whole half-tiles, its work is dealt evenly to all multiprocessors, and every
wave pays a
  prologue and an epilogue worth ``half_k`` of contraction length;
- a streaming kernel of ``x`` bytes runs at ``asymptote · x/(x + half)`` of the memory bandwidth (Hockney's
``n½``, "The
  Science of Computer Benchmarking", SIAM 1996), that is, it pays a constant ``half/(asymptote · bandwidth)``
  once.

The roofline is S. Williams, A. Waterman, D. Patterson, CACM 52(4), 2009.
"""

from __future__ import annotations

import numpy as np

from planner.costs.arrays import Real

__all__ = [
    "FLASH_BACKWARD_PASSES",
    "attention_bytes",
    "attention_flop",
    "attention_s",
    "causal_fraction",
    "matmul_bytes",
    "matmul_efficiency",
    "matmul_flop",
    "matmul_s",
    "memory_bound_s",
    "memory_efficiency",
]

FLASH_BACKWARD_PASSES = 2.5
"""Products in the fused attention backward (S, dV, dP, dQ, dK) per product in its forward (S, O).

T. Dao, "FlashAttention-2", arXiv:2307.08691, section 4.1.
"""


def matmul_flop(m: Real, n: Real, k: Real, batch: Real = 1) -> Real:
    """FLOP of ``batch`` products of (m, k) by (k, n): ``2·batch·m·n·k``.

    >>> matmul_flop(2, 3, 4)
    48.0
    """
    return 2.0 * m * n * k * batch


def matmul_bytes(
    m: Real,
    n: Real,
    k: Real,
    batch: Real = 1,
    bytes_per_element: Real = 2.0,
    out_bytes_per_element: Real | None = None,
) -> Real:
    """Bytes that ``batch`` products must move once: both operands in, the result out.

    >>> matmul_bytes(2, 3, 4)  # 2 * (8 + 12 + 6)
    52.0
    """
    out = bytes_per_element if out_bytes_per_element is None else out_bytes_per_element
    return batch * (bytes_per_element * k * (m + n) + out * m * n)


def matmul_efficiency(
    m: Real,
    n: Real,
    k: Real,
    batch: Real = 1,
    *,
    matmul: Real,
    tile: Real,
    half_k: Real,
    multiprocessors: Real,
) -> Real:
    """Fraction of peak FLOP rate that a product reaches when compute-bound.

    ``η = matmul · m·n/(m'·n') · w·k/(w·k + ⌈w⌉·half_k)``, with ``m'``, ``n'`` rounded up to half tiles and
    ``w = batch·m'·n'/(tile²·multiprocessors)`` waves; ``w·k/(w·k + half_k)`` within one wave, where the
    contraction is split between the multiprocessors. A full wave gives ``k/(k + half_k)``.

    Tiles are not dealt in whole waves: libraries pick among tile shapes and split the contraction (Stream-K,
    M. Osama et al., PPoPP 2023, arXiv:2301.03598). On cuBLAS measurements of aiconfigurator (444 bf16 shapes
    on H100), dealing whole 128×128 tiles leaves a mean error of 18 %, the even split 8 %, each with the
    constants that fit it best.

    ``matmul`` (0, 1], ``tile`` and ``half_k`` (elements) and ``multiprocessors`` come from the device.

    >>> constants = dict(matmul=0.8, tile=128, half_k=64, multiprocessors=132)
    >>> round(float(matmul_efficiency(128 * 132, 128, 4096, **constants)), 4)  # a full wave: 0.8 * 4096/4160
    0.7877
    """
    padded = _padded(m, n, batch, tile)
    waves = padded / (tile * tile * multiprocessors)
    return matmul * (1.0 * m * n * batch) / padded * (waves * k / (waves * k + np.ceil(waves) * half_k))


def matmul_s(
    m: Real,
    n: Real,
    k: Real,
    batch: Real,
    peak_flop_per_s: Real,
    bytes_: Real,
    memory_bytes_per_s: Real,
    *,
    matmul: Real,
    tile: Real,
    half_k: Real,
    multiprocessors: Real,
    memory: Real = 1.0,
    memory_half_bytes: Real = 0.0,
    floor_s: Real = 0.0,
) -> Real:
    """Seconds of ``batch`` products of (m, k) by (k, n) in one kernel.

    ``max(flop/(peak·η), memory_bound_s(bytes_), floor_s)`` with η of :func:`matmul_efficiency`, evaluated as
    ``2·tile²·multiprocessors·(w·k + ⌈w⌉·half_k)/(peak·matmul)``, which is the same and also holds where
    ``m``, ``n`` or ``k`` is 0. An empty product takes no time.

    >>> ideal = dict(matmul=1.0, tile=128, half_k=0.0, multiprocessors=108)
    >>> s = matmul_s(8192, 8192, 8192, 1, 312e12, 4e8, 2e12, **ideal)
    >>> round(float(s * 1e3), 3)  # 2 * 8192**3 / 312e12 = 3.524 ms
    3.524
    """
    wave_elements = tile * tile * multiprocessors
    waves = _padded(m, n, batch, tile) * (1.0 / wave_elements)
    compute_s = (waves * k + half_k * np.ceil(waves)) * (2.0 * wave_elements / matmul / peak_flop_per_s)
    memory_s = (bytes_ + memory_half_bytes) * (1.0 / (memory * memory_bytes_per_s))
    return np.maximum(np.maximum(compute_s, memory_s), floor_s) * np.greater(waves, 0)


def memory_efficiency(bytes_: Real, asymptote: Real, half_bytes: Real) -> Real:
    """Fraction of memory bandwidth of a streaming kernel: ``asymptote · x/(x + half)``, ``bytes_ > 0``.

    >>> memory_efficiency(1e6, 0.9, 1e6)
    0.45
    """
    return asymptote * (bytes_ / (bytes_ + half_bytes))


def memory_bound_s(
    bytes_: Real,
    memory_bytes_per_s: Real,
    *,
    memory: Real = 1.0,
    memory_half_bytes: Real = 0.0,
    floor_s: Real = 0.0,
) -> Real:
    """Seconds of a streaming kernel: ``max((x + half)/(asymptote · bandwidth), floor_s)``.

    No bytes take no time.

    >>> float(memory_bound_s(2e9, 2e12))
    0.001
    """
    time_s = (bytes_ + memory_half_bytes) * (1.0 / (memory * memory_bytes_per_s))
    return np.maximum(time_s, floor_s) * np.greater(bytes_, 0)


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
    return (
        2.0
        * batch
        * heads
        * queries
        * keys
        * visible
        * passes
        * (qk_dim + (qk_dim if v_dim is None else v_dim))
    )


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
) -> Real:
    """Bytes a fused attention moves that touches every tensor once: Q and O, K and V.

    The backward reads Q, K, V, O, dO and writes dQ, dK, dV, which is twice as much (``passes=2``).

    >>> attention_bytes(1, 32, 8, 1, 8192, 128) / 1e6  # decode: 2 * 8 * 8192 * 128 elements of K and V
    33.570816
    """
    width = qk_dim + (qk_dim if v_dim is None else v_dim)
    return (passes * bytes_per_element) * batch * width * (1.0 * heads * queries + 1.0 * kv_heads * keys)


def attention_s(
    flop: Real,
    bytes_: Real,
    peak_flop_per_s: Real,
    memory_bytes_per_s: Real,
    *,
    attention: Real,
    memory: Real = 1.0,
    memory_half_bytes: Real = 0.0,
    tiles: Real | None = None,
    multiprocessors: Real = 1.0,
    floor_s: Real = 0.0,
) -> Real:
    """Seconds of a fused attention kernel; see :func:`attention_flop` and :func:`attention_bytes`.

    ``max(flop/(peak·η), memory_bound_s(bytes_), floor_s)`` with ``η = attention · min(1,
    tiles/multiprocessors)``: one tile of queries of one head is a unit of work that is not split in training,
    so few heads and a short sequence leave multiprocessors idle. Pass ``tiles = batch·heads·⌈queries/tile⌉``
    to count that, or nothing to neglect it (decode kernels split the keys instead). ``attention`` is the
    fraction of peak of a long kernel: the forward's, or the backward's, which is lower. No FLOP take no time.

    >>> flop = attention_flop(1, 32, 8192, 8192, 128, visible=0.5)  # 549.8 GFLOP
    >>> round(float(attention_s(flop, 0.0, 1e15, 3e12, attention=0.7)) * 1e3, 3)
    0.785
    """
    compute_s = flop * (1.0 / (attention * peak_flop_per_s))
    if tiles is not None:
        compute_s = compute_s * np.maximum(multiprocessors / np.maximum(tiles, 1.0), 1.0)
    memory_s = (bytes_ + memory_half_bytes) * (1.0 / (memory * memory_bytes_per_s))
    return np.maximum(np.maximum(compute_s, memory_s), floor_s) * np.greater(flop, 0)


def _padded(m: Real, n: Real, batch: Real, tile: Real) -> Real:
    """Output elements paid for, with both edges rounded up to half tiles."""
    half = 0.5 * tile
    return np.ceil(m / half) * np.ceil(n / half) * (batch * (half * half))
