"""Pipelines in closed form: bubbles, activations in flight, and latency where it has a formula.

Sources: Y. Huang et al., "GPipe", arXiv:1811.06965, section 2.3; D. Narayanan et al., "Efficient Large-Scale
Language Model Training on GPU Clusters", arXiv:2104.04473, section 2.2; S. Fan et al., "DAPPLE",
arXiv:2007.01045; P. Qi et al., "Zero Bubble Pipeline Parallelism", arXiv:2401.10241, Table 1; L. Zheng et
al., "Alpa", arXiv:2201.12023, equation 2. ``pp`` is the number of devices, ``micro_batches`` the number per
pipeline and step, stages and devices count from 0. All functions broadcast. Lower bounds for unequal stages
are in :mod:`planner.costs.pipeline_bounds`.
"""

from __future__ import annotations

import numpy as np

from planner.costs.arrays import Real

__all__ = [
    "bubble_fraction_of_total",
    "bubble_ratio_to_ideal",
    "bubble_s",
    "in_flight_1f1b",
    "in_flight_gpipe",
    "in_flight_interleaved",
    "in_flight_zb_h1",
    "in_flight_zb_h2",
    "latency_1f1b_s",
    "latency_alpa_s",
    "span_bubble_zb_h1_s",
    "span_bubble_zb_h2_s",
]


def bubble_s(pp: Real, forward_s: Real, backward_s: Real, chunks: Real = 1.0) -> Real:
    """Idle time of a device in GPipe and 1F1B, and interleaved 1F1B of ``chunks``: ``(p − 1)(t_f + t_b)/v``.

    ``forward_s`` and ``backward_s`` (full backward) are a device's time for one micro-batch through all its
    chunks. Range: equal stages, no transfer time; interleaved with ``m`` a multiple of ``p``. Huang et al.,
    section 2.3; Narayanan et al., sections 2.2.1 and 2.2.2.

    >>> bubble_s(4, 1.0, 2.0), bubble_s(8, 1.0, 2.0, 4)
    (9.0, 5.25)
    """
    return (pp - 1.0) * (forward_s + backward_s) / chunks


def bubble_fraction_of_total(pp: Real, micro_batches: Real, chunks: Real = 1.0) -> Real:
    """Bubble as a fraction of the step: ``(p − 1)/(m·v + p − 1)`` (Huang et al.'s convention; range of
    :func:`bubble_s`).

    >>> bubble_fraction_of_total(4, 9)
    0.25
    """
    return (pp - 1.0) / (micro_batches * chunks + pp - 1.0)


def bubble_ratio_to_ideal(pp: Real, micro_batches: Real, chunks: Real = 1.0) -> Real:
    """Bubble relative to the time without it: ``(p − 1)/(m·v)`` (Narayanan et al.'s convention; range of
    :func:`bubble_s`).

    >>> bubble_ratio_to_ideal(4, 12), bubble_ratio_to_ideal(4, 12, 2)
    (0.25, 0.125)
    """
    return (pp - 1.0) / (micro_batches * chunks)


def span_bubble_zb_h1_s(pp: Real, forward_s: Real, backward_s: Real, weight_s: Real) -> Real:
    """ZB-H1: idle time between a device's first and last operation, ``(p − 1)(F + B − W)`` (Qi et al., Table
    1).

    ``backward_s`` is the input gradient alone. Range: equal stages, no transfer time, largest over devices,
    ``m ≥ p``, ``W ≤ F`` and ``W ≤ B``.

    >>> span_bubble_zb_h1_s(4, 1.0, 1.0, 1.0)
    3.0
    """
    return (pp - 1.0) * (forward_s + backward_s - weight_s)


def span_bubble_zb_h2_s(pp: Real, forward_s: Real, backward_s: Real, weight_s: Real) -> Real:
    """ZB-H2: idle time between a device's first and last operation, ``(p − 1)(F + B − 2W)``, at least 0 (Qi
    et al., Table 1).

    The makespan still holds the ``(p − 1)·F`` by which the last device starts later. Range: as for ZB-H1, ``m
    ≥ 2p``.

    >>> float(span_bubble_zb_h2_s(4, 1.0, 1.0, 1.0))
    0.0
    """
    return np.maximum((pp - 1.0) * (forward_s + backward_s - 2.0 * weight_s), 0.0)


def in_flight_gpipe(micro_batches: Real) -> Real:
    """Activations alive at once on every stage: all ``m`` (Huang et al., section 2.3).

    >>> in_flight_gpipe(8)
    8
    """
    return micro_batches


def in_flight_1f1b(pp: Real, micro_batches: Real, stage: Real) -> Real:
    """Activations alive at once on ``stage``: ``min(m, p − i)`` (Fan et al.; Narayanan et al., section
    2.2.1).

    >>> in_flight_1f1b(4, 8, np.arange(4)).tolist()
    [4, 3, 2, 1]
    """
    return np.minimum(micro_batches, np.subtract(pp, stage))


def in_flight_interleaved(
    pp: Real, micro_batches: Real, chunks: Real, device: Real, group: Real | None = None
) -> Real:
    """Chunk activations alive at once on ``device``: ``min(m·v, 2(p − 1 − r) + (v − 1)·group + 1)``.

    The warm-up forwards and the first forward after them; ``group`` is Megatron's micro-batch group size,
    ``p`` by default. Range: ``v ≥ 2``. Narayanan et al., section 2.2.2; Megatron-LM
    ``core/pipeline_parallel/schedules.py``.

    >>> int(in_flight_interleaved(8, 32, 4, 0))  # p·v + p − 1
    39
    """
    size = pp if group is None else group
    warm_up = 2 * (np.subtract(pp, device) - 1) + np.subtract(chunks, 1) * size
    alive: Real = np.minimum(np.multiply(micro_batches, chunks), warm_up + 1)
    return alive


def in_flight_zb_h1(pp: Real, micro_batches: Real, stage: Real) -> Real:
    """ZB-H1: micro-batches between F and B on ``stage``, ``min(m, p − i)``; a further ``i`` wait for W (Qi et
    al., Table 1).

    >>> in_flight_zb_h1(4, 8, np.arange(4)).tolist()
    [4, 3, 2, 1]
    """
    return np.minimum(micro_batches, np.subtract(pp, stage))


def in_flight_zb_h2(pp: Real, micro_batches: Real, stage: Real) -> Real:
    """ZB-H2: micro-batches between F and B on ``stage``, ``min(m, 2(p − i) − 1)``; a further ``2i`` wait for
    W.

    Qi et al., Table 1.

    >>> in_flight_zb_h2(4, 8, np.arange(4)).tolist()
    [7, 5, 3, 1]
    """
    alive: Real = np.minimum(micro_batches, 2 * np.subtract(pp, stage) - 1)
    return alive


def latency_alpa_s(stage_s: Real, micro_batches: Real) -> Real:
    """Alpa's pipeline latency ``Σ_i t_i + (m − 1)·max_i t_i``, stages along the first axis (Zheng et al.,
    equation 2).

    Exact for GPipe and 1F1B without transfer time and with equal stages; in general neither an upper nor a
    lower bound.

    >>> float(latency_alpa_s(np.array([3.0, 3.0, 3.0, 3.0]), 8))
    33.0
    """
    latency: Real = np.sum(stage_s, axis=0) + (micro_batches - 1.0) * np.max(stage_s, axis=0)
    return latency


def latency_1f1b_s(pp: Real, micro_batches: Real, stage_s: Real, hop_s: Real = 0.0) -> Real:
    """1F1B of equal stages with transfer time, exactly: ``N·T + 2c·⌊N(p − 1)/p⌋`` with ``N = m + p − 1``.

    ``stage_s`` is forward plus full backward of a micro-batch, ``hop_s`` the delay from a stage to its
    neighbour.
    Derivation: a longest path zigzags between stages; each turn at stages ``b`` (top) and ``a`` (bottom)
    moves it on by ``b − a + 1`` micro-batches. All zigzags with ``K`` sweeps up and down hold ``N`` forwards,
    ``N`` backwards and ``2(N − K)`` hops, and a sweep covers at most ``p`` stages, so ``K = ⌈N/p⌉``.

    >>> float(latency_1f1b_s(4, 8, 3.0)), float(latency_1f1b_s(4, 8, 3.0, 0.5))  # 11·3, 8 hops each way
    (33.0, 41.0)
    """
    n = micro_batches + pp - 1.0
    return n * stage_s + 2.0 * hop_s * (n - np.ceil(n / pp))
