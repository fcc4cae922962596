"""Closed forms of serving deployments: prefill queues, the way of keys and values, batches of a pipeline in each other's way.

Sources: Y. Zhong et al., "DistServe", OSDI 2024, section 3.1 (prefill as M/D/1); L. Kleinrock, Queueing Systems, vol. 1, 1975,
section 5.8 (mean wait of M/D/1); P. Patel et al., "Splitwise", ISCA 2024, section 4.2 (transfer layer by layer);
A. Agrawal et al., "SARATHI", arXiv:2308.16369, section 3.3 (bubbles between unlike batches of a pipeline); R. Zhu et al.,
"MegaScale-Infer", arXiv:2504.02263, section 4.1 (micro-batches between attention and experts).
"""

from __future__ import annotations

import numpy as np

from planner.costs.arrays import Real

__all__ = ["held_up_share", "kv_transfer_s", "ping_pong_s", "queue_load", "replicas_needed"]

_BISECTIONS = 50


def queue_load(room_s: Real, service_s: Real, quantile: float | None = None, most: float = 1.0) -> Real:
    """Largest load ``ρ``, the fraction of time at work, of an M/D/1 queue whose wait stays within ``room_s``.

    The wait is its mean, or a quantile of it.

    The mean wait is ``W = ρ·D/(2(1 − ρ))``, so ``ρ = 2w/(D + 2w)``. The wait's tail is taken as exponential with the mean of
    those who wait, ``P(wait > x) = ρ·exp(−ρx/W)``, exact for M/M/1 and in heavy traffic; its quantile is found by bisection.

    Args:
        room_s: what a request may wait; below 0: no load keeps it.
        service_s: time of one service, ``D``.
        quantile: of requests, 0 to 1; None: the mean.
        most: cap on the load.

    >>> round(float(queue_load(1.0, 2.0)), 6)  # W = 0.5 * 2 / (2 * 0.5) = 1
    0.5
    """
    room = np.asarray(room_s, dtype=np.float64)
    if quantile is None:
        loads = np.where(
            np.isinf(room), most, 2.0 * room / (service_s + 2.0 * np.where(np.isinf(room), 0.0, room))
        )
        return np.where(room >= 0.0, np.minimum(loads, most), 0.0)[()]
    low, high = (
        np.zeros(np.broadcast_shapes(room.shape, np.shape(service_s))),
        np.full_like(room + 0.0 * np.asarray(service_s), most),
    )
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        tail_s = service_s / (2.0 * (1.0 - middle)) * np.log(np.maximum(middle / (1.0 - quantile), 1.0))
        low, high = np.where(tail_s <= room, middle, low), np.where(tail_s <= room, high, middle)
    return np.where(room >= 0.0, low, 0.0)[()]


def kv_transfer_s(n_bytes: Real, bytes_per_s: Real, prefill_s: Real, layers: Real) -> Real:
    """Seconds that a cache's way to another pool adds to a prompt: the last layer, and whatever the prompt was too short to hide.

    ``κ/(L·β) + max(0, (κ/β − T)·(L − 1)/L)`` with ``κ`` bytes, ``β`` bytes per second, ``T`` the prompt's time, ``L`` layers.

    >>> float(kv_transfer_s(1e9, 50e9, 0.1, 40.0)) * 1e3  # 20 ms hide behind 100 ms but for a layer's share
    0.5
    """
    whole_s = n_bytes / bytes_per_s
    return whole_s / layers + np.maximum(0.0, (whole_s - prefill_s) * (layers - 1.0) / layers)


def replicas_needed(rate_per_s: Real, replica_per_s: Real, headroom: Real = 0.0) -> Real:
    """Number of replicas for a rate: ``⌈λ(1 + h)/λ*⌉``, ``λ*`` what one answers within its limits; none for no requests.

    >>> replicas_needed(np.array([0.0, 10.0, 11.0]), 5.0, 0.0).tolist()
    [0.0, 2.0, 3.0]
    """
    needed: Real = np.ceil(np.multiply(rate_per_s, 1.0 + np.asarray(headroom)) / replica_per_s - 1e-9) + 0.0
    return needed


def held_up_share(prompts: Real, parts: Real, stages: Real) -> Real:
    """Fraction of the rounds of a pipeline's batches in which a prompt holds them up: ``1 − exp(−x(1 + (k − 1)/p))``.

    Batches cannot overtake, so that one with prompt tokens delays a round of all others to its own. The ``k`` parts of a prompt
    go with batches one behind the other, of which ``p`` make a round.

    Args:
        prompts: that come in a round, on average, as a Poisson stream.
        parts: that a prompt is cut into; below 1 where several run together.
        stages: of the pipeline.

    >>> round(float(held_up_share(0.5, 1.0, 4.0)), 4)  # 1 − e^{−1/2}
    0.3935
    """
    rounds = np.where(np.asarray(parts) > 1.0, 1.0 + (parts - 1.0) / stages, parts)
    return -np.expm1(-prompts * rounds)


def ping_pong_s(attention_s: Real, experts_s: Real, way_s: Real, layers: Real, batches: Real) -> Real:
    """Seconds in which micro-batches pass all layers between attention and experts on devices of their own.

    A layer keeps a micro-batch for ``A + E + 2C`` and each side for ``F = max(A, E)`` of each, so that a layer of all takes
    ``max(m·F, A + E + 2C)``; where the first is longer, this is the paper's ``A + E + 2C + F(mL − 1)``.

    Args:
        attention_s, experts_s: of one layer and micro-batch.
        way_s: of its tokens from one side to the other.
        layers: that have experts.
        batches: micro-batches ``m``.

    >>> [round(float(ping_pong_s(1.0, 1.0, 0.4, 100.0, m)) / m, 1) for m in (1, 2, 3)]  # 2.8 a layer; 3 hide it
    [280.0, 140.5, 100.6]
    """
    slower_s, once_s = np.maximum(attention_s, experts_s), attention_s + experts_s + 2.0 * np.asarray(way_s)
    between_s = np.maximum(batches * slower_s, once_s)
    passed: Real = (layers - 1.0) * between_s + once_s + (batches - 1.0) * slower_s
    return passed
