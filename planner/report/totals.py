"""What a whole run takes: steps, days, device hours, dollars and energy, and the JSON document of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from planner.costs.economics import device_hours, tokens_run_s
from planner.costs.energy import emitted_kg
from planner.uncertainty.nearest import nearby
from planner.uncertainty.ties import ties_with_first
from planner.units import format_count

if TYPE_CHECKING:
    from planner.plans.plan import Plan
    from planner.solve.fleet import Fleet
    from planner.specs.problem import Problem

__all__ = ["confidence_fields", "document", "energy_text", "run_totals"]


def run_totals(plan: Plan, problem: Problem | None = None) -> dict[str, Any] | None:
    """Totals over the workload's ``tokens``; None where the length of the run is not given.

    ``steps`` is rounded up; ``joules`` are those of the devices, ``meter_joules`` those of the problem's data centre; ``usd`` is
    None without a price, ``kg_co2e`` without the electricity's. Failures and checkpoints are not included.
    """
    tokens = plan.workload.get("tokens")
    if tokens is None:
        return None
    workload, estimate = plan.workload, plan.estimate
    tokens_per_step = workload["global_batch_size"] * workload["seq_len"]
    seconds = float(tokens_run_s(tokens, tokens_per_step, estimate.step_time_s))
    steps = tokens / tokens_per_step
    joules = estimate.joules_per_step * steps
    metered = joules * (1.0 if problem is None else problem.pue)
    intensity = None if problem is None else problem.kg_per_kwh
    return {
        "plan": plan.id,
        "tokens": tokens,
        "steps": math.ceil(steps),
        "run_s": seconds,
        "device_hours": float(device_hours(seconds, plan.devices)),
        "joules": joules,
        "meter_joules": metered,
        "kg_co2e": None if intensity is None else float(emitted_kg(metered, intensity)),
        "usd": None if estimate.usd_per_step is None else estimate.usd_per_step * steps,
    }


def energy_text(run: Mapping[str, Any]) -> str:
    """A run's energy and what it emits, in words."""
    whose = "at the meter" if run["meter_joules"] > run["joules"] else "devices alone"
    kg = run["kg_co2e"]
    emitted = "" if kg is None else f", {kg / 1e3:,.1f} t CO2e" if kg >= 1e3 else f", {kg:,.3g} kg CO2e"
    return f"{format_count(run['meter_joules'] / 3.6e6)} kWh ({whose}){emitted}"


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
    best = fleet.result.best
    totals = run_totals(best, fleet.problem_of_best(problems))
    if totals is not None:
        found["run"] = totals
    found |= confidence_fields(fleet.result.plans, problems[0])
    if len(fleet.attempts) > 1 or problems[0].deadline_s is not None:
        found["clusters"] = [attempt.as_dict() for attempt in fleet.attempts]
    if problems[0].deadline_s is not None:
        found["deadline_s"] = problems[0].deadline_s
    return found
