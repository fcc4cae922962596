"""What a whole run takes: steps, days, device hours, dollars and energy, and the JSON document of a search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planner.costs.economics import device_hours, tokens_run_s
from planner.uncertainty.nearest import nearby
from planner.uncertainty.ties import ties_with_first

if TYPE_CHECKING:
    from planner.plan import Plan
    from planner.solve.fleet import Fleet
    from planner.specs.problem import Problem

__all__ = ["confidence_fields", "document", "run_totals"]


def run_totals(plan: Plan) -> dict[str, Any] | None:
    """Totals over the workload's ``tokens``; None where the length of the run is not given.

    ``steps`` is rounded up; ``usd`` is None without a price. Failures and checkpoints are not included.
    """
    tokens = plan.workload.get("tokens")
    if tokens is None:
        return None
    workload, estimate = plan.workload, plan.estimate
    tokens_per_step = workload["global_batch_size"] * workload["seq_len"]
    seconds = float(tokens_run_s(tokens, tokens_per_step, estimate.step_time_s))
    steps = tokens / tokens_per_step
    return {
        "plan": plan.id,
        "tokens": tokens,
        "steps": math.ceil(steps),
        "run_s": seconds,
        "device_hours": float(device_hours(seconds, plan.devices)),
        "joules": estimate.joules_per_step * steps,
        "usd": None if estimate.usd_per_step is None else estimate.usd_per_step * steps,
    }


def confidence_fields(plans: Sequence[Plan], problem: Problem) -> dict[str, Any]:
    """What a document of plans says beside them.

    ``ties``: ids of plans that are no worse than the first one as far as can be told. ``nearest``: published runs near the job
    and how far off their predictions are; None without any.
    """
    near = nearby(problem)
    return {"ties": list(ties_with_first(plans)), "nearest": None if near is None else near.as_dict()}


def document(fleet: Fleet, problems: Sequence[Problem]) -> dict[str, Any]:
    """The JSON object of ``planner train``: plans and search, run totals of the best plan, and what else was asked."""
    found = fleet.result.as_dict()
    totals = run_totals(fleet.result.best)
    if totals is not None:
        found["run"] = totals
    found |= confidence_fields(fleet.result.plans, problems[0])
    if len(fleet.attempts) > 1 or problems[0].deadline_s is not None:
        found["clusters"] = [attempt.as_dict() for attempt in fleet.attempts]
    if problems[0].deadline_s is not None:
        found["deadline_s"] = problems[0].deadline_s
    return found
