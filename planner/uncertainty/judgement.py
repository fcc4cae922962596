"""What every estimate says of itself: how far it may be off, how likely it runs out of memory, and what it rests on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from planner.attribution import Spend
from planner.specs.problem import Problem
from planner.uncertainty.constants import constant_shares, constants_spread, share_of_software
from planner.uncertainty.nearest import is_far
from planner.uncertainty.provenance import provenance
from planner.uncertainty.residuals import Residuals, Spread, load_residuals

__all__ = ["judgement", "time_spread"]


def time_spread(residuals: Residuals, problem: Problem, spends: Iterable[Spend]) -> Spread:
    """How a measured step may spread around its prediction, by how well its constants are known, and whether runs near it are.

    Args:
        residuals: of published runs.
        problem: the job, on the machines that the busiest device is one of.
        spends: of the step on the busiest device.
    """
    generation = problem.cluster.device.generation
    stack = problem.stack.on_generation(generation)
    known, shares = residuals.step_time, constant_shares(spends, stack)
    between = None if (stack.name, generation) in known.measured else known.between
    experts = any(block.moe for block in problem.model.blocks.values())
    return known.at(constants_spread(shares, stack, between), far=is_far(problem), experts=experts)


def judgement(
    problem: Problem, step_time_s: float, pools: Mapping[str, float], spends: Sequence[Spend], budget_bytes: float
) -> dict[str, Any]:  # fmt: skip
    """Fields of an estimate: ``interval``, ``oom_probability`` and ``provenance`` (see :class:`planner.plan.Estimate`).

    Args:
        problem: the job, on the machines that the busiest device is one of.
        step_time_s: what is predicted.
        pools: what the fullest device holds at its peak.
        spends: of the step on the busiest device.
        budget_bytes: of the fullest device. What is held in reserve on top of it is there to be run into: a process runs out
            of memory at the end of the device's.

    Raises:
        SpecError: the shipped residuals are wrong.
    """
    found: dict[str, Any] = {"provenance": provenance(problem.cluster, problem.stack, spends)}
    residuals = load_residuals()
    if residuals is None:
        return found
    peak, peak_bytes = residuals.peak.at(share_of_software(pools)), sum(pools.values())
    found["interval"] = {
        "step_time_s": list(time_spread(residuals, problem, spends).interval(step_time_s)),
        "peak": list(peak.interval(peak_bytes)),
    }
    found["oom_probability"] = peak.probability_above(peak_bytes, budget_bytes / (1.0 - problem.reserve))
    return found
