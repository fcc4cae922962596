"""Tokens per step where a target model checks several drafted ones at once.

Source: Y. Leviathan, M. Kalman, Y. Matias, "Fast inference from transformers via speculative decoding", ICML 2023,
arXiv:2211.17192: drafted tokens are accepted independently of each other.
"""

from __future__ import annotations

import numpy as np

from planner.costs.arrays import Real

__all__ = ["accepted_tokens", "speculation_gain"]


def accepted_tokens(acceptance: Real, drafted: Real) -> Real:
    """Expected tokens of a step with ``γ`` drafted tokens: ``(1 − α^(γ + 1))/(1 − α)`` (Leviathan et al., equation 1).

    Each drafted token is accepted with probability ``α`` if all before it were; the target adds one of its own.

    >>> round(float(accepted_tokens(0.8, 5)), 3)
    3.689
    >>> float(accepted_tokens(1.0, 4))
    5.0
    """
    alpha = np.asarray(acceptance, dtype=np.float64)
    steps = np.asarray(drafted, dtype=np.float64) + 1.0
    apart = np.where(alpha < 1.0, 1.0 - alpha, 1.0)
    return np.where(alpha < 1.0, (1.0 - alpha**steps) / apart, steps)[()]


def speculation_gain(acceptance: Real, drafted: Real, cost: Real = 0.0) -> Real:
    """How much faster one sequence is answered whose step is as long as without drafts: ``Ω/(γc + 1)`` (their theorem 3.8).

    ``cost`` is a draft's step relative to the target's.

    >>> round(float(speculation_gain(0.75, 7, 0.02)), 3)
    3.157
    """
    return accepted_tokens(acceptance, drafted) / (np.multiply(drafted, cost) + 1.0)
