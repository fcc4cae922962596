"""Tokens and sequences that a paged cache holds, and the memory that an iteration's activations take.

Symbols: ``P`` prompt tokens, ``O`` tokens of an answer, ``B`` tokens of a block.

Sources: W. Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180
(blocks and their waste); the length bias of a sequence seen at a random moment is renewal theory (W. Feller, An Introduction to
Probability Theory and Its Applications, vol. 2, chapter XI).
"""

from __future__ import annotations

import numpy as np

from planner.costs.arrays import Real

__all__ = ["block_waste_tokens", "iteration_activation_bytes", "mean_held_tokens", "overflow_probability"]


def block_waste_tokens(block_tokens: Real) -> Real:
    """Tokens of a sequence's last block that stay empty, expected: ``(B − 1)/2``.

    >>> block_waste_tokens(16) / 190  # below 4 % from 190 tokens on (Kwon et al., figure 2: vLLM wastes under 4 %)
    0.039473684210526314
    """
    return (1.0 * block_tokens - 1.0) / 2.0


def mean_held_tokens(isl: Real, osl: Real, length_scv: Real = 0.0, block_tokens: Real = 1.0) -> Real:
    """Tokens that a generating sequence holds at a random moment: ``P + E[O²]/(2E[O]) + (B − 1)/2``.

    Long answers are seen more often than they come: ``E[O²]/(2E[O]) = O(1 + c²)/2`` with the squared coefficient of variation
    ``c²`` of answers' lengths.

    >>> mean_held_tokens(1000, 200), mean_held_tokens(1000, 200, 1.0, 16)
    (1100.0, 1207.5)
    """
    return 1.0 * isl + osl * (1.0 + length_scv) / 2.0 + block_waste_tokens(block_tokens)


def overflow_probability(
    sequences: Real,
    isl: Real,
    osl: Real,
    capacity_tokens: Real,
    length_scv: Real = 0.0,
    block_tokens: Real = 1.0,
) -> Real:
    """Probability that sequences at random moments of their lives ask for more tokens than there are: a normal tail.

    Lengths seen at a random moment have the mean of :func:`mean_held_tokens`; their variance is that of a uniform age in
    answers of equal length, ``O²/12``, times ``1 + 4c²`` (exact for ``c² = 0``; for exponential answers, whose age is
    exponential, 0.42 of ``O²`` instead of 1).

    >>> float(overflow_probability(100, 1000, 200, 110000.0))  # half of the time above the mean
    0.5
    """
    mean = sequences * mean_held_tokens(isl, osl, length_scv, block_tokens)
    deviation = np.sqrt(sequences * osl * osl * (1.0 + 4.0 * length_scv) / 12.0)
    return 0.5 * (1.0 - _erf((capacity_tokens - mean) / np.maximum(deviation, 1e-9) / np.sqrt(2.0)))


def iteration_activation_bytes(
    tokens: Real,
    hidden: Real,
    widest: Real,
    sampled: Real = 0.0,
    vocab: Real = 0.0,
    bytes_per_element: Real = 2.0,
) -> Real:
    """Live activations of one iteration: ``T·β·(2h + w)``, or fp32 logits of the sequences that sample, ``4·n·V``.

    Args:
        tokens: tokens of the iteration on a device.
        hidden: width of the residual stream, of which one copy is kept and one is at work.
        widest: elements per token of the widest pair of tensors in between, on a device: ``2f/t`` or queries, keys and values.
        sampled, vocab: sequences that sample, and a device's share of the vocabulary.
        bytes_per_element: of activations.

    >>> float(iteration_activation_bytes(8192, 8192, 2 * 28672 / 4)) / 1e6  # Llama-3 70B on 4 devices
    503.31648
    """
    layers = tokens * bytes_per_element * (2.0 * hidden + widest)
    most: Real = np.maximum(layers, 4.0 * sampled * vocab)[()]
    return most


def _erf(x: Real) -> Real:
    """The error function, within 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26)."""
    z = np.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * z)
    series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    value: Real = np.sign(x) * (1.0 - series * np.exp(-z * z))
    return value
