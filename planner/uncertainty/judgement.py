"""What every estimate says of itself: how far it may be off, how likely it runs out of memory, and what it rests on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from planner.attribution import Spend
from planner.specs.problem import Problem
from planner.uncertainty.provenance import provenance
from planner.uncertainty.residuals import PROCESS, load_residuals

__all__ = ["judgement"]


def judgement(problem: Problem, step_time_s: float, peak_bytes: float, spends: Iterable[Spend]) -> dict[str, Any]:  # fmt: skip
    """Fields of an estimate: ``interval``, ``oom_probability`` and ``provenance`` (see :class:`planner.plan.Estimate`).

    Args:
        problem: the job.
        step_time_s, peak_bytes: what is predicted.
        spends: of the step on the busiest device.

    Raises:
        SpecError: the shipped residuals are wrong.
    """
    found: dict[str, Any] = {"provenance": provenance(problem.cluster, problem.stack, spends)}
    residuals = load_residuals()
    if residuals is None:
        return found
    time = residuals.step_time.of(problem.stack.name, problem.cluster.device.generation)
    peak = residuals.peak.of(problem.stack.name, PROCESS)
    found["interval"] = {
        "step_time_s": list(time.interval(step_time_s)),
        "peak": list(peak.interval(peak_bytes)),
    }
    found["oom_probability"] = peak.probability_above(peak_bytes, problem.memory_budget_bytes)
    return found
