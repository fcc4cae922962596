"""Failures, checkpoints and what is left of a run's time: interval, expected slowdown, stalls.

Failures come at random (exponentially, ``mtbf_s`` apart on average for all devices together), a restart costs
``restart_s`` and the work since the last checkpoint, and a checkpoint stalls training for ``stall_s``. Sources: J. Young,
"A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974, doi:10.1145/361147.361115; J. Daly, "A
higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006,
doi:10.1016/j.future.2004.11.016; A. Maurya et al., "DataStates-LLM", arXiv:2406.10707. All functions broadcast.
"""

from __future__ import annotations

import numpy as np

from planner.costs.arrays import Real

__all__ = [
    "adjacent_mtbf_s",
    "best_interval_s",
    "checkpoint_stall_s",
    "daly_interval_s",
    "expected_slowdown",
    "fleet_mtbf_s",
    "out_share",
    "resumed_s",
    "useful_share",
    "whole_replicas",
    "young_interval_s",
]


def fleet_mtbf_s(device_mtbf_s: Real, devices: Real) -> Real:
    """Mean time between failures of a job that any device's failure stops: ``M₁/n``.

    >>> round(fleet_mtbf_s(54 * 86400 * 16384 / 419, 16384) / 3600, 2)  # Llama 3: 419 failures in 54 days, hours apart
    3.09
    """
    return 1.0 * device_mtbf_s / devices


def young_interval_s(stall_s: Real, mtbf_s: Real) -> Real:
    """Work between two checkpoints, to first order: ``√(2δM)`` (Young). Range: ``δ ≪ M``.

    >>> float(young_interval_s(50.0, 10000.0))
    1000.0
    """
    interval: Real = np.sqrt(2.0 * stall_s * mtbf_s)
    return interval


def daly_interval_s(stall_s: Real, mtbf_s: Real) -> Real:
    """The same to higher order: ``√(2δM)(1 + ⅓√(δ/2M) + ⅑·δ/2M) − δ``, and ``M`` from ``δ = 2M`` on (Daly, equation 37).

    >>> round(float(daly_interval_s(50.0, 10000.0)), 2)
    966.94
    """
    x = np.sqrt(stall_s / (2.0 * mtbf_s))
    near = young_interval_s(stall_s, mtbf_s) * (1.0 + x / 3.0 + x * x / 9.0) - stall_s
    interval: Real = np.where(np.less(stall_s, 2.0 * mtbf_s), near, mtbf_s)[()]
    return interval


def best_interval_s(stall_s: Real, mtbf_s: Real) -> Real:
    """The interval that makes :func:`expected_slowdown` least, exactly: the root of ``(1 − τ/M)·e^((τ + δ)/M) = 1``.

    By Newton's iteration on ``−x − ln(1 − x) = δ/M`` with ``x = τ/M``, down from the right of the root. A stall of nothing asks
    for checkpoints all the time: 0.

    >>> round(float(best_interval_s(50.0, 10000.0)), 2), float(best_interval_s(0.0, 10000.0))
    (966.95, 0.0)
    """
    goal = np.divide(stall_s, mtbf_s)
    # With x = τ/M, −x − ln(1 − x) = goal: convex, at least x²/2, and above goal at 1 − e^(−1 − goal).
    x = np.minimum(np.sqrt(2.0 * goal), 1.0 - np.exp(-1.0 - goal))
    for _ in range(60):
        positive = np.maximum(x, 1e-300)
        step = (-positive - np.log1p(-positive) - goal) * (1.0 - positive) / positive
        x = np.where(goal > 0.0, np.maximum(positive - step, 0.0), 0.0)
    interval: Real = x * mtbf_s
    return interval


def expected_slowdown(interval_s: Real, stall_s: Real, restart_s: Real, mtbf_s: Real) -> Real:
    """Ratio of the expected time of a run to its time without failures and checkpoints: ``M·e^(R/M)·(e^((τ + δ)/M) − 1)/τ``.

    Daly, equation 20. Failures may strike during checkpoints and restarts too. Goodput is its inverse.

    >>> round(float(expected_slowdown(1000.0, 50.0, 0.0, 1e12)), 6)  # without failures: the stalls alone
    1.05
    """
    slowdown: Real = (
        mtbf_s
        * np.exp(np.divide(restart_s, mtbf_s))
        * np.expm1(np.divide(np.add(interval_s, stall_s), mtbf_s))
    ) / interval_s
    return slowdown


def checkpoint_stall_s(
    mode: str, n_bytes: Real, store_bytes_per_s: Real, host_link_bytes_per_s: Real, step_compute_s: Real
) -> Real:
    """How long a checkpoint of ``n_bytes`` per device keeps training waiting.

    ``sync``: until everything is stored. ``async``: until a copy is in host memory. ``lazy``: the copy runs beside forward and
    backward, while nothing changes what it copies; what is left when the update is due (Maurya et al., section 4).

    >>> [float(checkpoint_stall_s(mode, 30e9, 1e9, 20e9, 1.0)) for mode in ("sync", "async", "lazy")]
    [30.0, 1.5, 0.5]

    Raises:
        ValueError: no such mode.
    """
    copied_s = np.divide(n_bytes, host_link_bytes_per_s)
    if mode == "sync":
        stall: Real = np.divide(n_bytes, store_bytes_per_s)
    elif mode == "async":
        stall = copied_s
    elif mode == "lazy":
        stall = np.maximum(copied_s - step_compute_s, 0.0)
    else:
        raise ValueError(f"no checkpoint mode {mode!r}; sync, async or lazy")
    return stall


def useful_share(lost_s: Real, mtbf_s: Real) -> Real:
    """Fraction of a run's time that is left where every failure costs ``lost_s``, once every ``mtbf_s`` of work: ``M/(M + L)``.

    The loss is the time to notice a failure, to find its cause, to start again, and the work since the last checkpoint (J. Dong
    et al. 2024, "C4", arXiv:2406.04594, section 3). To first order what :func:`expected_slowdown` gives.

    >>> float(useful_share(1.0, 3.0))
    0.75
    """
    share: Real = np.divide(mtbf_s, np.add(mtbf_s, lost_s))
    return share


def out_share(device_mtbf_s: Real, replace_s: Real) -> Real:
    """Fraction of time that a device is away, if another one takes its place ``replace_s`` after it was lost: ``R/(M₁ + R)``.

    >>> float(out_share(9.0, 1.0))
    0.1
    """
    share: Real = np.divide(replace_s, np.add(device_mtbf_s, replace_s))
    return share


def whole_replicas(replicas: int, devices_each: int, out: float) -> float:
    """Replicas that can be formed on average, as a fraction, where each device is away a share ``out`` of the time.

    Devices that are left form as many whole replicas as they can, whichever they belonged to (Varuna's morphing: S. Athlur et al.
    2022, arXiv:2111.04007, section 4.4). Devices are lost independently, so that their number is binomial.

    >>> round(whole_replicas(2, 1, 0.5), 9)  # one of two on average
    0.5
    >>> whole_replicas(1, 8, 0.0)
    1.0
    """
    if out <= 0.0:
        return 1.0
    n = replicas * devices_each
    missing = np.arange(n + 1)
    log_weight = np.cumsum(np.concatenate([[0.0], np.log(n - missing[:-1]) - np.log1p(missing[:-1])]))
    probability = np.exp(log_weight + missing * np.log(out) + (n - missing) * np.log1p(-out))
    formed = (n - missing) // devices_each
    return float(probability @ formed) / (replicas * float(probability.sum()))


def adjacent_mtbf_s(device_mtbf_s: Real, devices: Real, replace_s: Real) -> Real:
    """Mean time until a device is lost while a neighbour of it is still away: ``M₁²/(2nR)`` for ``R ≪ M₁``.

    Two neighbours in a pipeline hold each other's work (J. Thorpe et al. 2023, "Bamboo", arXiv:2204.12013, section 5): a loss
    comes every ``M₁/n``, and one of the two neighbours is lost within ``R`` after it with probability ``2R/M₁``.

    >>> float(adjacent_mtbf_s(1000.0, 10.0, 5.0))
    10000.0
    """
    mean: Real = np.divide(np.square(device_mtbf_s), 2.0 * np.multiply(devices, replace_s))
    return mean


def resumed_s(n_bytes: Real, devices_before: Real, devices_after: Real, store_bytes_per_s: Real) -> Real:
    """Seconds to store states under one plan and load them under another: every device writes, then reads, its equal part.

    States are stored in parts that do not depend on the plan: fp32 weights and moments of every parameter (X. Lian et al. 2024,
    "Universal Checkpointing", arXiv:2406.18820, section 4).

    >>> resumed_s(80e9, 8, 4, 1e9)  # 10 s to write, 20 s to read
    30.0
    """
    return n_bytes / store_bytes_per_s * (1.0 / devices_before + 1.0 / devices_after)
