"""Tokens per step where a target model checks several drafted ones at once.

Sources: Y. Leviathan, M. Kalman, Y. Matias, "Fast inference from transformers via speculative decoding", ICML 2023,
arXiv:2211.17192: drafted tokens are accepted independently of each other; Y. Li et al., "EAGLE", ICML 2024, arXiv:2401.15077.
"""

from __future__ import annotations

import numpy as np

from planner.costs.arrays import Real

__all__ = ["accepted_tokens", "draft_head_parameters", "speculation_gain"]


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


def draft_head_parameters(layer_parameters: Real, hidden: Real) -> Real:
    """Parameters of a draft head: a layer, and the product that joins embedding and hidden state, ``2h·h`` (Li et al.).

    >>> round(float(draft_head_parameters(4 * 4096**2 + 3 * 4096 * 11008, 4096)) / 1e9, 3)  # Llama-2 7B
    0.236
    """
    return layer_parameters + 2.0 * np.square(hidden)


def speculation_gain(acceptance: Real, drafted: Real, cost: Real = 0.0) -> Real:
    """How much faster one sequence is answered whose step is as long as without drafts: ``Ω/(γc + 1)`` (their theorem 3.8).

    ``cost`` is a draft's step relative to the target's.

    >>> round(float(speculation_gain(0.75, 7, 0.02)), 3)
    3.157
    """
    return accepted_tokens(acceptance, drafted) / (np.multiply(drafted, cost) + 1.0)
