"""Overlap: closed forms against a step-by-step replay of the streams."""

import numpy as np
import pytest

from planner.costs import (
    bucket_exposure_s,
    overlapped_s,
    pipelined_s,
    serial_finish_s,
    uniform_bucket_exposure_s,
)


def flow_shop_s(streams, chunks):
    """Replays ``chunks`` jobs through the streams one event at a time."""
    free = [0.0] * len(streams)
    for _ in range(chunks):
        done = 0.0
        for i, total in enumerate(streams):
            done = free[i] = max(done, free[i]) + total / chunks
    return free[-1]


@pytest.mark.parametrize("chunks", [1, 2, 3, 8])
@pytest.mark.parametrize("streams", [(8.0, 4.0), (4.0, 8.0), (3.0, 7.0, 5.0), (2.0, 2.0, 2.0, 9.0)])
def test_pipelined_is_the_flow_shop(streams, chunks):
    assert pipelined_s(streams, chunks) == pytest.approx(flow_shop_s(streams, chunks))


def test_contention_slows_the_overlapped_part_only():
    # 10 alone for 6, 4 s side by side at 1.3 of their cost: 10 + 0.3 · 4
    assert overlapped_s([10.0, 4.0], 1.3) == pytest.approx(11.2)
    assert overlapped_s([10.0, 0.0], 1.3) == 10.0
    assert pipelined_s([10.0, 4.0], 1, 1.3) == 14.0  # nothing overlaps
    assert overlapped_s([10.0, 10.0], 2.5) == 20.0  # never worse than one after the other


def test_serial_finish_replays_the_recursion():
    rng = np.random.default_rng(1)
    ready, duration = np.sort(rng.random((12, 50)), axis=0), rng.random((12, 50)) / 8
    end = np.zeros(50)
    for r, d in zip(ready, duration, strict=True):
        end = np.maximum(end, r) + d
    np.testing.assert_allclose(serial_finish_s(ready, duration), end)


def test_parameters_gathered_ahead_of_three_layers():
    # gathers of 2 arrive at 2, 4, 6; layers of 1, 3, 1 run 2–3, 4–7, 7–8
    assert serial_finish_s(np.cumsum([2.0, 2.0, 2.0]), np.array([1.0, 3.0, 1.0])) == 8.0


@pytest.mark.parametrize("buckets", [1, 2, 5, 40])
@pytest.mark.parametrize(("total", "backward"), [(1.0, 10.0), (9.0, 10.0), (25.0, 10.0)])
def test_uniform_buckets_agree_with_the_recursion(total, backward, buckets):
    ready = backward * np.arange(1, buckets + 1) / buckets
    durations = np.full(buckets, total / buckets)
    exact = bucket_exposure_s(ready, durations, backward)
    assert uniform_bucket_exposure_s(total, backward, buckets) == pytest.approx(exact)


def test_one_bucket_is_not_hidden():
    assert uniform_bucket_exposure_s(3.0, 100.0, 1) == 3.0
