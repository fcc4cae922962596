"""Live activations read off one device's list agree with the schedule's own memory timeline, and stop growing with m."""

from __future__ import annotations

import numpy as np
import pytest

from planner.pipeline.composer import saturated
from planner.schedule.live import live_vectors
from planner.schedule.memory import peak_bytes
from planner.schedule.order import make_order

SHAPES = [
    ("gpipe", 4, 6, 1),
    ("1f1b", 4, 8, 1),
    ("1f1b", 8, 3, 1),
    ("interleaved", 4, 8, 2),
    ("interleaved", 8, 16, 3),
    ("interleaved", 4, 11, 2),  # groups of 6 and 5
    ("interleaved", 3, 23, 2),  # groups of 4 and 3
]


@pytest.mark.parametrize(("schedule", "p", "m", "v"), SHAPES)
def test_peak_is_the_timelines_peak(schedule: str, p: int, m: int, v: int) -> None:
    """Chunks of unequal size: the largest live combination is the peak over the device's list."""
    rng = np.random.default_rng(p * m * v)
    saved = rng.uniform(1.0, 5.0, size=p * v)
    expected = peak_bytes(make_order(schedule, p, m, v), saved)
    for device in range(p):
        chunks = np.eye(v)  # every chunk is a kind of its own
        live = live_vectors(schedule, p, m, v, device, chunks)
        assert (live @ saved[device::p]).max() == pytest.approx(expected[device])


@pytest.mark.parametrize(
    ("schedule", "p", "v"),
    [("1f1b", 4, 1), ("interleaved", 4, 2), ("interleaved", 8, 4), ("interleaved", 2, 5)],
)
def test_more_micro_batches_than_saturation_hold_no_more(schedule: str, p: int, v: int) -> None:
    """Beyond the saturation count, the live combinations are the same for any number of micro-batches."""
    enough = int(saturated(schedule, p, v, 100 * p))
    for device in range(p):
        at = live_vectors(schedule, p, enough, v, device, np.eye(v))
        for more in (2 * enough, 5 * enough):
            assert np.array_equal(at, live_vectors(schedule, p, more, v, device, np.eye(v)))
