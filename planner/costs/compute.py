"""Time of one kernel: matrix products and streaming kernels on a roofline with smooth shoulders.

A kernel takes ``launch + roofline(compute, memory)``: what it computes and what it moves overlap, but not
wholly (:func:`roofline_s`). The constants are arguments, because they belong to a device: its profile says where
each was fitted. What is fixed here is the shape of the curves:

- a matrix product is paid in whole half-tiles, and its work is dealt evenly to all multiprocessors;
- a contraction of ``k`` is split between idle multiprocessors; the best split of a long one takes time with
  ``√k`` (pieces of ``k/s`` in parallel, ``s`` partial sums to add: the optimum of ``a·k/s + b·s`` is
  ``2·√(a·b·k)``);
- a kernel that is timed alone, over and over, finds its operands in the second-level cache
  (:func:`uncached_bytes`) and a chip that has not yet throttled its clocks; a training step finds neither.

The roofline is S. Williams, A. Waterman, D. Patterson, CACM 52(4), 2009. Fused attention is in
:mod:`planner.costs.attention_kernel`.
"""

from __future__ import annotations

import numpy as np

from planner.costs.arrays import Real

__all__ = [
    "cool_compute_s",
    "matmul_bytes",
    "matmul_flop",
    "matmul_s",
    "matmul_waves",
    "memory_bound_s",
    "product_s",
    "roofline_s",
    "uncached_bytes",
]

_SETTLE_S = 1e-2
"""Length of a kernel whose repetitions heat the chip half-way to its sustained clock. Chosen among 1, 5, 10 and 20 ms by the
products of 10 ms and more on H100 and B200 (aiconfigurator's bf16 tables): their median error falls from 6.5 % at 1 ms to
4.5 % at 10 ms, and no further."""


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
    weight_bytes_per_element: Real | None = None,
) -> Real:
    """Bytes that ``batch`` products must move once: both operands in, the result out.

    The (k, n) operand has ``weight_bytes_per_element`` where it is stored in another format.

    >>> matmul_bytes(2, 3, 4)  # 2 * (8 + 12 + 6)
    52.0
    """
    out = bytes_per_element if out_bytes_per_element is None else out_bytes_per_element
    if weight_bytes_per_element is None:
        return batch * (bytes_per_element * k * (m + n) + out * m * n)
    return batch * (k * (bytes_per_element * m + weight_bytes_per_element * n) + out * m * n)


def matmul_waves(m: Real, n: Real, batch: Real = 1, *, tile: Real, multiprocessors: Real) -> Real:
    """Full waves of output tiles of ``batch`` products, edges rounded up to half tiles.

    ``batch·m'·n'/(tile²·multiprocessors)``, not rounded up to whole waves: libraries pick among tile shapes and
    split the contraction (Stream-K, M. Osama et al., PPoPP 2023, arXiv:2301.03598). Against aiconfigurator's
    bf16 products, dealing whole waves instead gains nothing on five of six GPUs.

    >>> float(matmul_waves(129, 256, tile=128, multiprocessors=100))  # 192 x 256 elements of 100 tiles of 128 x 128
    0.03
    """
    half = 0.5 * tile
    return np.ceil(m / half) * np.ceil(n / half) * (batch * (0.25 / multiprocessors))


def matmul_s(
    m: Real,
    n: Real,
    k: Real,
    batch: Real,
    peak_flop_per_s: Real,
    bytes_: Real,
    memory_bytes_per_s: Real,
    *,
    tile: Real,
    multiprocessors: Real,
    memory: Real = 1.0,
    overlap_loss: Real = 0.0,
    split_s: Real = 0.0,
    launch_s: Real = 0.0,
    boost: Real = 0.0,
) -> Real:
    """Seconds of ``batch`` products of (m, k) by (k, n) in one kernel: :func:`product_s` of its waves.

    >>> s = matmul_s(8192, 8192, 8192, 1, 312e12, 4e8, 2e12, tile=128, multiprocessors=108)
    >>> round(float(s * 1e3), 3)  # 2 * 8192**3 / 312e12 = 3.524 ms
    3.524
    """
    waves = matmul_waves(m, n, batch, tile=tile, multiprocessors=multiprocessors)
    return product_s(
        waves, k, bytes_, peak_flop_per_s, memory_bytes_per_s, tile=tile, multiprocessors=multiprocessors,
        memory=memory, overlap_loss=overlap_loss, split_s=split_s, launch_s=launch_s, boost=boost,
    )  # fmt: skip


def product_s(
    waves: Real,
    k: Real,
    bytes_: Real,
    peak_flop_per_s: Real,
    memory_bytes_per_s: Real,
    *,
    tile: Real,
    multiprocessors: Real,
    memory: Real = 1.0,
    overlap_loss: Real = 0.0,
    split_s: Real = 0.0,
    launch_s: Real = 0.0,
    boost: Real = 0.0,
) -> Real:
    """Seconds of a kernel of matrix products that fills ``waves`` waves of tiles and contracts over ``k``.

    ``launch_s + split_s·√k + roofline_s(compute, bytes/(memory·bandwidth))`` with
    ``compute = 2·waves·tile²·multiprocessors·k/peak``. No waves, no contraction or no operands take no time.

    Args:
        waves: see :func:`matmul_waves`; the sum over experts for a grouped product with uneven loads.
        k: contraction length, elements.
        bytes_: moved by the kernel.
        peak_flop_per_s: rate that a large product sustains.
        memory_bytes_per_s: of the data sheet; ``memory`` is the fraction that a long stream reaches.
        overlap_loss: see :func:`roofline_s`.
        split_s: seconds per √element of the contraction.
        launch_s: start and end of the kernel.
        boost: see :func:`cool_compute_s`; 0 in a training step.

    >>> s = product_s(10.0, 4096, 1e6, 312e12, 2e12, tile=128, multiprocessors=108, launch_s=2e-6)
    >>> round(float(s) * 1e6, 1)  # 2 + 2 * 10 * 128**2 * 108 * 4096 / 312e12 = 2 + 464.6
    466.6
    """
    compute_s = waves * k * (2.0 * tile * tile * multiprocessors / peak_flop_per_s)
    if np.any(boost):
        compute_s = cool_compute_s(compute_s, boost)
    memory_s = bytes_ * (1.0 / (memory * memory_bytes_per_s))
    busy_s = launch_s + split_s * np.sqrt(k) + roofline_s(compute_s, memory_s, overlap_loss)
    return busy_s * np.greater(compute_s, 0)


def memory_bound_s(
    bytes_: Real, memory_bytes_per_s: Real, *, memory: Real = 1.0, launch_s: Real = 0.0
) -> Real:
    """Seconds of a streaming kernel: ``launch_s + bytes/(memory·bandwidth)``; no bytes take no time.

    Half of the asymptotic rate is reached at ``launch_s·memory·bandwidth`` bytes (Hockney's ``n½``, "The
    Science of Computer Benchmarking", SIAM 1996).

    >>> float(memory_bound_s(2e9, 2e12))
    0.001
    """
    return (bytes_ * (1.0 / (memory * memory_bytes_per_s)) + launch_s) * np.greater(bytes_, 0)


def roofline_s(compute_s: Real, memory_s: Real, overlap_loss: Real = 0.0) -> Real:
    """Seconds of a kernel whose arithmetic and traffic overlap but for a fraction: ``max + loss·min``.

    ``overlap_loss`` 0 is the roofline, 1 no overlap at all.

    >>> float(roofline_s(3.0, 2.0, 0.25))
    3.5
    """
    return np.maximum(compute_s, memory_s) + overlap_loss * np.minimum(compute_s, memory_s)


def cool_compute_s(compute_s: Real, boost: Real) -> Real:
    """Seconds that arithmetic takes in a kernel timed alone, which a step at sustained clocks does in ``compute_s``.

    Large products draw more power than the chip may lose, so that it lowers its clock within moments. A
    short kernel that is repeated a few times runs ``1 + boost`` times faster, a long one does not:
    ``compute_s/(1 + boost·τ/(compute_s + τ))``, τ = 10 ms.

    >>> round(cool_compute_s(1e-6, 0.2) * 1e6, 3), round(cool_compute_s(10.0, 0.2), 3)
    (0.833, 9.998)
    """
    return compute_s / (1.0 + boost * (_SETTLE_S / (compute_s + _SETTLE_S)))


def uncached_bytes(
    bytes_: Real, l2_bytes: Real, l2_speedup: Real, working_set_bytes: Real | None = None
) -> Real:
    """Bytes from memory that take as long as ``bytes_`` of a repeated kernel, partly in the second-level cache.

    What the kernel reads before it comes back to the same operands (``working_set_bytes``, else ``bytes_``) is in
    the cache while it is smaller: a fraction ``1/(1 + (working set/l2)⁴)`` of the bytes, which are read
    ``l2_speedup`` times faster.

    >>> round(uncached_bytes(1e6, 50e6, 2.0)), round(uncached_bytes(1e6, 50e6, 2.0, 1e9))
    (500000, 999997)
    """
    ratio = (bytes_ if working_set_bytes is None else working_set_bytes) * (1.0 / l2_bytes)
    return bytes_ * (1.0 - (1.0 - 1.0 / l2_speedup) / (1.0 + ratio**4))
