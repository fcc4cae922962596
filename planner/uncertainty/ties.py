"""Which plans are within each other's noise: their order would come out right in less than four of five measurements.

What two plans have in common is as wrong for one as for the other, so the noise of a comparison grows with how much of the step
they spend differently. How fast is measured on published sweeps: runs of one job under several plans.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from math import log, sqrt
from typing import TYPE_CHECKING

from planner.uncertainty.residuals import Residuals, load_residuals

if TYPE_CHECKING:
    from planner.plans.plan import Estimate, Plan

__all__ = ["pair_distance", "pair_noise", "tied", "ties_with_first"]


def pair_distance(one: Estimate, other: Estimate) -> float:
    """How unlike two steps are: the sum of the differences of their terms, relative to the (geometric) mean step."""
    terms: Mapping[str, float] = {**one.breakdown_s, **other.breakdown_s}
    apart = sum(abs(one.breakdown_s.get(name, 0.0) - other.breakdown_s.get(name, 0.0)) for name in terms)
    return apart / sqrt(one.step_time_s * other.step_time_s)


def pair_noise(distance: float, residuals: Residuals) -> float:
    """|log| of the ratio of two predicted step times below which their order is noise; 0 where nothing is known.

    >>> from planner.uncertainty.residuals import Spreads
    >>> nothing = Spreads((0.0,) * 7, floor=0.01)
    >>> pair_noise(0.25, Residuals(nothing, nothing, (0.0, 0.5, 1.0), (0.25, 0.75, 1.0)))
    0.5
    """
    at, noise = residuals.pair_distances, residuals.pair_noises
    if not at:
        return 0.0
    after = bisect_right(at, distance)
    if after in (0, len(at)):
        return noise[min(after, len(at) - 1)]
    share = (distance - at[after - 1]) / (at[after] - at[after - 1])
    return noise[after - 1] + share * (noise[after] - noise[after - 1])


def tied(one: Estimate, other: Estimate, residuals: Residuals | None) -> bool:
    """Whether the order of two plans for one job is within the noise."""
    if residuals is None:
        return False
    apart = abs(log(one.step_time_s / other.step_time_s))
    return apart < pair_noise(pair_distance(one, other), residuals)


def ties_with_first(plans: Sequence[Plan]) -> tuple[str, ...]:
    """Ids of the plans whose place behind the first one is noise, in order. Plans on other clusters are not compared."""
    first, residuals = plans[0], load_residuals()
    return tuple(
        plan.id
        for plan in plans[1:]
        if plan.cluster == first.cluster and tied(first.estimate, plan.estimate, residuals)
    )
