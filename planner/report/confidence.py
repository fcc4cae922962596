"""How far off a prediction may be, in words: intervals, ties, memory, and what was measured near the job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from planner.plans.plan import Estimate, Plan
from planner.specs.problem import MAX_OOM_RISK
from planner.uncertainty.nearest import nearby
from planner.uncertainty.residuals import load_residuals
from planner.uncertainty.ties import ties_with_first
from planner.units import format_chance

if TYPE_CHECKING:
    from planner.specs.problem import Problem

__all__ = ["TIE", "confidence", "interval_text", "out_of_memory_matters", "relative_interval"]

TIE = "~"
"""Stands before the distance of a plan whose place behind the first one is noise."""

_NOTABLE_CHANCE = 0.01
_EVEN = 0.02  # sides of an interval that differ by less are printed as one


def interval_text(estimate: Estimate, quantity: str = "step_time_s") -> str:
    """The interval of a quantity relative to its prediction; empty where the plan has none.

    >>> from dataclasses import replace
    >>> one = Estimate(10.0, 1.0, 0.5, 0.5, {"peak": 1.0}, {}, True, 1.0, 0.0, 1.0, interval={"step_time_s": (9.2, 10.9)})
    >>> interval_text(one), interval_text(replace(one, interval={"step_time_s": (9.5, 12.0)}))
    ('±9%', '-5/+20%')
    """
    ends = relative_interval(estimate, quantity)
    if ends is None:
        return ""
    low, high = ends
    if low < 0.0 < high and abs(low + high) < _EVEN:
        return f"±{max(-low, high):.0%}"
    return f"{100.0 * low:+.0f}/{100.0 * high:+.0f}%"


def relative_interval(estimate: Estimate, quantity: str = "step_time_s") -> tuple[float, float] | None:
    """Ends of the interval of a quantity, relative to its prediction; None where the plan has none."""
    if estimate.interval is None:
        return None
    predicted = estimate.step_time_s if quantity == "step_time_s" else estimate.memory_bytes[quantity]
    low, high = (end / predicted - 1.0 for end in estimate.interval[quantity])
    return low, high


def out_of_memory_matters(plans: Sequence[Plan]) -> bool:
    """Whether any plan may well run out of memory."""
    return any((plan.estimate.oom_probability or 0.0) >= _NOTABLE_CHANCE for plan in plans)


def confidence(plans: Sequence[Plan], problem: Problem) -> list[str]:
    """What is known of the error of these plans, as paragraphs: the first one's intervals, ties, and runs near the job."""
    residuals = load_residuals()
    first = plans[0]
    if residuals is None or first.estimate.interval is None:
        return []
    times, peaks = residuals.step_time, residuals.peak
    stack, generation = problem.stack.name, problem.cluster.device.generation
    known = (stack, generation) in times.measured
    basis = (
        "its constants are fitted to published runs there" if known else "of which there is no published run"
    )
    told = [
        f"step time: 80 % of measurements within {interval_text(first.estimate)} of the prediction, as of {_runs(times.rows)} of "
        f"{times.models} models, each predicted by constants that were not fitted to it; {stack} on {generation}: {basis}",
        f"peak memory: 80 % within {interval_text(first.estimate, 'peak')}, as of {_runs(peaks.rows)}; wider the more of it is "
        "buffers, fragmentation and the framework's own",
    ]
    chance = first.estimate.oom_probability or 0.0
    if chance > MAX_OOM_RISK:
        told.append(
            f"{'plan 1' if len(plans) > 1 else 'it'} may run out of memory ({format_chance(chance)}): --max-oom-risk "
            f"{MAX_OOM_RISK:.0%}, as searches have it by default, asks for plans that do not in nine of ten, where there are any"
        )
    ties = set(ties_with_first(plans))
    numbers = [str(number) for number, plan in enumerate(plans, 1) if plan.id in ties]
    if numbers:
        some = f"plan{'s' * (len(numbers) > 1)} {', '.join(numbers)}"
        told.append(
            f"{TIE} ties with plan 1: {some}; of published pairs as close, more than one of five came out the other way"
        )
    near = nearby(problem)
    if near is None:
        told.append("near this job: no published run")
    else:
        worst = near.runs[0]
        told.append(
            f"near this job: {_runs(len(near.runs))} ({near.alike}), each predicted by constants that were not fitted "
            f"to it: median error {near.median_error:.1%}, worst {near.worst_error:.1%} "
            f"({worst.model} on {worst.devices} × {worst.accelerator})"
        )
    return told


def _runs(count: int) -> str:
    return f"{count} published run{'s' * (count > 1)}"
