"""What every estimate says of itself: how far it may be off, how likely it runs out of memory, and what it rests on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from planner.attribution import Spend
from planner.specs.problem import Problem
from planner.uncertainty.provenance import provenance
from planner.uncertainty.residuals import PROCESS, load_residuals, regime

__all__ = ["judgement", "time_group"]


def time_group(problem: Problem, mesh: Mapping[str, int]) -> tuple[str, str, str]:
    """What the spread of a plan's step time is looked up by: stack, generation and regime."""
    experts = any(block.moe for block in problem.model.blocks.values())
    return problem.stack.name, problem.cluster.device.generation, regime(experts, mesh)


def judgement(
    problem: Problem, mesh: Mapping[str, int], step_time_s: float, peak_bytes: float, spends: Iterable[Spend],
    budget_bytes: float,
) -> dict[str, Any]:  # fmt: skip
    """Fields of an estimate: ``interval``, ``oom_probability`` and ``provenance`` (see :class:`planner.plan.Estimate`).

    Args:
        problem: the job, on the machines that the busiest device is one of.
        mesh: degrees of parallelism.
        step_time_s, peak_bytes: what is predicted.
        spends: of the step on the busiest device.
        budget_bytes: of the fullest device.

    Raises:
        SpecError: the shipped residuals are wrong.
    """
    found: dict[str, Any] = {"provenance": provenance(problem.cluster, problem.stack, spends)}
    residuals = load_residuals()
    if residuals is None:
        return found
    time = residuals.step_time.of(*time_group(problem, mesh))
    peak = residuals.peak.of(problem.stack.name, PROCESS)
    found["interval"] = {
        "step_time_s": list(time.interval(step_time_s)),
        "peak": list(peak.interval(peak_bytes)),
    }
    found["oom_probability"] = peak.probability_above(peak_bytes, budget_bytes)
    return found
