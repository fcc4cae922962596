"""What every estimate says of itself: how far it may be off, how likely it runs out of memory, and what it rests on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from planner.plans.attribution import Spend
from planner.specs.problem import Problem
from planner.uncertainty.constants import constant_shares, constants_spread, share_of_software
from planner.uncertainty.nearest import is_far
from planner.uncertainty.provenance import provenance
from planner.uncertainty.residuals import Residuals, Spread, load_residuals, scale
from planner.uncertainty.terms import terms_spread, time_shares

__all__ = ["judgement", "time_spread"]


def time_spread(
    residuals: Residuals, problem: Problem, step_time_s: float, breakdown_s: Mapping[str, float], spends: Iterable[Spend]
) -> Spread:  # fmt: skip
    """How a measured step may spread around its prediction, by what it consists of, and what of it was measured.

    Args:
        residuals: of published runs.
        problem: the job, on the machines that the busiest device is one of.
        step_time_s, breakdown_s: what is predicted, and of what it consists.
        spends: of the step on the busiest device.
    """
    generation, known, spends = problem.cluster.device.generation, residuals.step_time, list(spends)
    stack = problem.stack.on_generation(generation)
    shares = time_shares(step_time_s, breakdown_s, spends, float(stack.dispatch_s))
    uncertain = terms_spread(shares, known.terms)
    measured = (stack.name, generation) in known.measured
    if not measured:
        unknown = constants_spread(constant_shares(spends, stack), stack, known.between)
        uncertain = float(scale(uncertain, unknown))
    experts = any(block.moe for block in problem.model.blocks.values())
    return known.at(uncertain, far=is_far(problem, measured=measured), experts=experts)


def judgement(
    problem: Problem, step_time_s: float, breakdown_s: Mapping[str, float], pools: Mapping[str, float], spends: Sequence[Spend],
    budget_bytes: float,
) -> dict[str, Any]:  # fmt: skip
    """Fields of an estimate: ``interval``, ``oom_probability`` and ``provenance`` (see :class:`planner.plans.plan.Estimate`).

    Args:
        problem: the job, on the machines that the busiest device is one of.
        step_time_s, breakdown_s: what is predicted, and of what it consists.
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
        "step_time_s": list(
            time_spread(residuals, problem, step_time_s, breakdown_s, spends).interval(step_time_s)
        ),
        "peak": list(peak.interval(peak_bytes)),
    }
    found["oom_probability"] = peak.probability_above(peak_bytes, budget_bytes / (1.0 - problem.reserve))
    return found
