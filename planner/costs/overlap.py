"""Time of work on several streams at once: what hides behind what, and what stays exposed.

Streams are compute, one per network tier, host link, disk. While two run they slow each other by a factor
``contention`` (κ ≥ 1, measured on a device: Galvatron calls it the overlap coefficient, X. Miao et al., VLDB
2023, arXiv:2211.13878).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.costs.arrays import Real

__all__ = [
    "bucket_exposure_s",
    "overlapped_s",
    "pipelined_s",
    "serial_finish_s",
    "uniform_bucket_exposure_s",
]


def overlapped_s(streams: Sequence[Real], contention: Real = 1.0) -> Real:
    """Seconds of a window in which all streams start together and none waits for another.

    ``longest + (κ − 1)·overlapped``, where ``overlapped`` is how long at least two streams run (the second
    longest), but never more than running them one after the other.

    >>> float(overlapped_s([10.0, 4.0]))
    10.0
    >>> float(overlapped_s([10.0, 4.0, 3.0], contention=1.25))  # 10 + 0.25 * 4
    11.0
    """
    longest, second, total = _longest_second_total(streams)
    return np.minimum(longest + (contention - 1.0) * second, total)


def pipelined_s(
    streams: Sequence[Real], chunks: Real, contention: Real = 1.0, contended_s: Real = np.inf
) -> Real:
    """Seconds of a chain of streams that pass a job on in ``chunks`` equal parts.

    ``longest·(N−1)/N + Σ/N``: exact for a flow shop of equal jobs, here ``N`` chunks through any number of
    streams. With one chunk the streams run one after the other, with infinitely many they only overlap. The
    overlapped share ``(N−1)/N`` of the second longest stream costs ``κ − 1`` more, but of no more than
    ``contended_s``; the total never exceeds the sum.

    Wang et al., "Overlap Communication with Dependent Computation via Decomposition", ASPLOS 2023, for two
    streams.

    >>> float(pipelined_s([8.0, 4.0], 4))  # 8 * 3/4 + 12/4
    9.0
    >>> float(pipelined_s([8.0, 4.0], 1))
    12.0
    >>> float(pipelined_s([8.0, 4.0], np.inf, 1.5, contended_s=1.0))  # a slow network's traffic: 8 + 0.5 * 1
    8.5
    """
    if len(streams) == 1:
        return streams[0]
    longest, second, total = _longest_second_total(streams)
    overlapped = longest + (contention - 1.0) * np.minimum(second, contended_s)
    return np.minimum(overlapped + (total - overlapped) * np.divide(1.0, chunks), total)


def serial_finish_s(ready_s: Real, duration_s: Real) -> Real:
    """When a serial stream has done a list of jobs (first axis), each of which may start when it is ready.

    The recursion ``end[k] = max(end[k−1], ready[k]) + duration[k]`` unrolled: ``max over k of ready[k] + Σ_{j
    ≥ k} duration[j]``. Exact. It is the finish of gradient buckets on the network (``ready`` from the
    backward), and of layers whose parameters are gathered ahead (``ready`` from the network).

    >>> float(serial_finish_s(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 0.5])))  # 1 -> 3 -> 5 -> 5.5
    5.5
    """
    remaining = np.cumsum(np.asarray(duration_s)[::-1], axis=0)[::-1]
    finish_s: Real = np.max(ready_s + remaining, axis=0)
    return finish_s


def bucket_exposure_s(ready_s: Real, bucket_s: Real, backward_s: Real) -> Real:
    """Seconds by which gradient buckets (first axis) outlast the backward that fills them.

    ``ready_s`` is when each bucket is full, ``bucket_s`` how long its collective takes, ``backward_s`` when
    the backward ends (S. Li et al., "PyTorch Distributed", VLDB 2020, arXiv:2006.15704, section 3.2.3).

    >>> float(bucket_exposure_s(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 0.5]), 3.0))
    2.5
    """
    return np.maximum(serial_finish_s(ready_s, bucket_s) - backward_s, 0.0)


def uniform_bucket_exposure_s(total_s: Real, backward_s: Real, buckets: Real) -> Real:
    """:func:`bucket_exposure_s` of ``buckets`` equal buckets that fill at an even pace, in closed form.

    ``max(total/K, total − backward·(1 − 1/K))``: the last bucket is never hidden. Exact: bucket ``k`` is
    ready at ``backward·k/K``, so the finish of :func:`serial_finish_s` is linear in ``k`` and the first or
    the last decides.

    >>> float(uniform_bucket_exposure_s(8.0, 10.0, 4))  # the last bucket
    2.0
    >>> float(uniform_bucket_exposure_s(12.0, 10.0, 4))  # 12 - 7.5
    4.5
    """
    share = np.divide(1.0, buckets)
    return np.maximum(total_s * share, total_s - backward_s * (1.0 - share))


def _longest_second_total(streams: Sequence[Real]) -> tuple[Real, Real, Real]:
    longest: Real = 0.0
    second: Real = 0.0
    total: Real = 0.0
    for stream in streams:
        second = np.maximum(second, np.minimum(longest, stream))
        longest = np.maximum(longest, stream)
        total = total + stream
    return longest, second, total
