"""Sizes of compressed gradients.

Sources: T. Vogels et al., "PowerSGD", arXiv:1905.13727, Algorithm 1.
"""

from __future__ import annotations

from planner.costs.arrays import Real

__all__ = ["low_rank_flop", "low_rank_ratio"]


def low_rank_ratio(rows: Real, columns: Real, rank: Real) -> Real:
    """Elements of a matrix over those of its two factors: ``mn/(r(m + n))``.

    >>> low_rank_ratio(2600, 650, 1)
    520.0
    """
    return 1.0 * rows * columns / (rank * (rows + columns))


def low_rank_flop(rows: Real, columns: Real, rank: Real) -> Real:
    """FLOP of one power iteration and of the product that undoes it: ``P = MQ``, ``Q = MᵀP``, ``PQᵀ``, ``2mnr`` each.

    >>> low_rank_flop(2600, 650, 2) / (2600 * 650)
    12.0
    """
    return 6.0 * rows * columns * rank
