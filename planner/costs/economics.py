"""Device hours and money of a run, and of a token."""

from __future__ import annotations

import numpy as np

from planner.costs.arrays import Real

__all__ = ["device_hours", "phases_run_s", "rental_usd", "tokens_run_s", "usd_per_token"]


def tokens_run_s(tokens: Real, tokens_per_step: Real, step_s: Real) -> Real:
    """Seconds to train on a token budget: ``tokens/tokens_per_step · step_s``.

    >>> tokens_run_s(1e12, 4e6, 8.64) / 86400  # 250,000 steps in days
    25.0
    """
    return 1.0 * tokens / tokens_per_step * step_s


def phases_run_s(tokens: Real, tokens_per_s: Real, switch_s: Real = 0.0) -> Real:
    """Seconds of a run whose phases differ, arrays along the last axis: ``Σ tokens_i/rate_i + Σ switch_i``.

    >>> float(phases_run_s(np.array([100.0, 100.0]), np.array([10.0, 5.0]), np.array([0.0, 3.0])))
    33.0
    """
    total: Real = np.sum(np.divide(tokens, tokens_per_s) + switch_s, axis=-1)
    return total


def device_hours(seconds: Real, devices: Real) -> Real:
    """Device hours: ``n·t/3600``.

    >>> device_hours(86400, 2048)
    49152.0
    """
    return 1.0 * seconds * devices / 3600.0


def rental_usd(hours: Real, usd_per_hour: Real) -> Real:
    """Money for device hours at a price per device and hour.

    >>> rental_usd(2.788e6, 2.0) / 1e6  # DeepSeek-V3, arXiv:2412.19437, Table 1: 5.576 M$
    5.576
    """
    return 1.0 * hours * usd_per_hour


def usd_per_token(usd_per_hour: Real, devices: Real, tokens_per_s: Real) -> Real:
    """Money per token at a steady rate of all devices together: ``n·price/(3600·rate)``.

    >>> usd_per_token(1.8, 8, 16000.0) * 1e6  # per million tokens: 14.4 $/h for 57.6 million an hour
    0.25
    """
    return 1.0 * usd_per_hour * devices / (3600.0 * tokens_per_s)
