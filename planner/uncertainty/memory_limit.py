"""The chance of running out of memory as a limit of memory: what a peak may come to so that it is exceeded seldom enough.

Of a predicted peak ``p`` with ``s`` bytes of software, the measured one exceeds ``p·exp(q·√(f² + (s/p)²))`` with the chance whose
quantile of published errors is ``q``; ``f`` is what every process is uncertain by
(:class:`~planner.uncertainty.residuals.Spreads`). It grows with both ``p`` and ``s`` (as long as ``q·s < p``), so that a plan
which holds less of everything keeps the limit where another one does.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from planner.ledger import Array
from planner.specs.problem import Problem
from planner.uncertainty.residuals import Spread, load_residuals, scale

__all__ = ["exceeded_bytes", "room_bytes"]

_STEPS = (
    6  # each leaves less than a tenth of the error: the share of software in a full device hardly changes
)


def exceeded_bytes(problem: Problem, peak_bytes: Array, software_bytes: Array) -> Array:
    """What measured peaks exceed with the chance that the problem allows, to be held against the device's memory.

    Args:
        problem: with a ``max_oom_risk``.
        peak_bytes: predicted.
        software_bytes: what the framework, its communicators and buffers, and fragmentation hold of it.
    """
    residuals = load_residuals()
    if residuals is None or problem.max_oom_risk >= 1.0:
        return np.zeros_like(peak_bytes)
    known = residuals.peak
    quantile = _quantile(known.quantiles, known.tail, problem.max_oom_risk)
    found: Array = peak_bytes * np.exp(
        quantile * scale(known.floor, known.process, software_bytes / peak_bytes)
    )
    return found


def room_bytes(problem: Problem, idle_bytes: Array | float, *, filled: bool = True) -> Array:
    """What peaks may come to on a device whose memory, but for what the software holds anyway, is all activations.

    No plan there has more fragmentation, so that every plan within it keeps the limit, buffers aside. On a device that is not
    ``filled`` with activations, no plan has less, so that none beyond it keeps the limit.

    Args:
        problem: with a ``max_oom_risk``.
        idle_bytes: of the framework and its communicators.
    """
    budget = np.full_like(idle_bytes, problem.memory_budget_bytes, dtype=np.float64)
    fragmentation = problem.stack.fragmentation.value if filled else 0.0
    grown = fragmentation / (1.0 + fragmentation)
    total, room = float(problem.cluster.device.memory_bytes), budget
    for _ in range(_STEPS):
        software = idle_bytes + grown * np.maximum(room - idle_bytes, 0.0)
        room = np.minimum(budget, room * total / np.maximum(exceeded_bytes(problem, room, software), 1.0))
    return room


@cache
def _quantile(quantiles: tuple[float, ...], tail: float, chance: float) -> float:
    """The residual that is exceeded with a chance."""
    spread = Spread(quantiles, tail)
    low, high = -1.0, 1.0
    while spread.probability_above(1.0, np.exp(low)) < chance:
        low *= 2.0
    while spread.probability_above(1.0, np.exp(high)) > chance:
        high *= 2.0
    while high - low > 1e-12:
        middle = 0.5 * (low + high)
        low, high = (
            (middle, high) if spread.probability_above(1.0, np.exp(middle)) > chance else (low, middle)
        )
    return high
