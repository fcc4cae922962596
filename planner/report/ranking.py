"""The screens of ``planner train`` and ``planner estimate``: plans, what they rest on, and how the space was exhausted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from planner.errors import PlannerError
from planner.plans.plan import Plan, SearchReport
from planner.report.confidence import confidence
from planner.report.layers import layers, layerwise_proof, mixed_proof
from planner.report.plan_table import rows, show_plans
from planner.report.sizes import show_clusters, show_sizes
from planner.report.terminal import Screen, gib, percent, words
from planner.report.totals import energy_text, run_totals
from planner.specs.parameters import parameter_count
from planner.units import format_count, format_seconds

if TYPE_CHECKING:
    from planner.solve.fleet import Fleet
    from planner.specs.problem import Problem

__all__ = ["does_not_fit", "show_plan", "show_ranking"]

_DEGREES = ("tp", "pp", "cp", "ep", "etp", "dp")


def show_ranking(fleet: Fleet, problems: Sequence[Problem], saved: str | None) -> None:
    """Prints the result of a search; ``saved`` is the file that the plans were written to."""
    screen = Screen()
    result, problem = fleet.result, problems[0]
    best, report = result.best, result.search
    several = len(fleet.attempts) > 1 and problem.deadline_s is None
    where = f"{len(fleet.attempts)} clusters" if several else _machine(best, problem)
    screen.line(
        f"{_job(problem)} · {where} · {report.candidates:,} candidates · {report.wall_s:.1f} s", "bold"
    )
    workload = problem.workload
    if problem.deadline_s is not None and workload.tokens is not None:
        show_sizes(screen, fleet, problem.deadline_s, workload.tokens, workload.tokens_per_step)
    elif several:
        show_clusters(screen, fleet, workload.tokens_per_step)
    one_of = f"on {best.cluster}" if several and len({plan.cluster for plan in result.plans}) == 1 else ""
    show_plans(screen, result.plans, problem.objective, where=one_of)
    screen.section(*layers(result.plans), wrapped=False)
    screen.section(
        "Time against memory (the best plan under each budget)", [_point(p) for p in result.pareto]
    )
    screen.section(
        "The run (plan 1; no failures, no checkpoints)", _totals(best, _problem_of(best, problems))
    )
    screen.section("How far off", confidence(result.plans, _problem_of(best, problems)))
    screen.section("Rests on", best.assumptions)
    screen.section(
        "How sure", [*_proof(best, report), *layerwise_proof(result), *mixed_proof(result), *result.notes]
    )
    second = next((row.number for row in rows(result.plans, problem.objective)[1:]), None)
    commands, remarks = _next(saved, result.plans, second)
    screen.section("Next", commands, wrapped=False)
    screen.indented(remarks)


def _point(plan: Mapping[str, Any]) -> str:
    estimate, mesh, knobs = plan["estimate"], plan["mesh"], plan["knobs"]
    degrees = " ".join(f"{name} {mesh[name]}" for name in _DEGREES if mesh[name] > 1)
    choices = f"mb {knobs['micro_batch_size']} · zero {knobs['zero_stage']} · recompute {knobs['recompute']}"
    return f"{gib(estimate['memory_bytes']['peak'])} GiB: {estimate['step_time_s']:.3f} s/step · {degrees} · {choices}"


def show_plan(plan: Plan, problem: Problem, notes: Sequence[str] = (), best: Plan | None = None) -> None:
    """Prints one plan that the user named; with ``best``, what the best one would gain."""
    screen = Screen()
    if not plan.estimate.fits:
        screen.line(does_not_fit(plan), "bold red")
    screen.line(f"{_job(problem)} · {_machine(plan, problem)}", "bold")
    show_plans(screen, [plan], problem.objective)
    parts = sorted(plan.estimate.breakdown_s.items(), key=lambda part: -part[1])
    step_s = plan.estimate.step_time_s
    screen.section("Of the step", [" · ".join(f"{words(name)} {percent(s, step_s)}" for name, s in parts)])
    peak = plan.estimate.memory_bytes["peak"]
    held = sorted(plan.estimate.memory_bytes.items(), key=lambda pool: -pool[1])
    pools = [f"{words(name)} {gib(n_bytes)}" for name, n_bytes in held if name != "peak"]
    screen.section(f"Of the peak of {gib(peak)} GiB", [" · ".join(pools)])
    screen.section("The run (no failures, no checkpoints)", _totals(plan, problem))
    screen.section("Read from the configuration", notes)
    if best is not None:
        screen.section("The best plan for this job", [_gain(plan, best)])
        show_plans(screen, [best, plan], problem.objective, joined=False)
    screen.section("How far off", confidence([plan], problem))
    screen.section("Rests on", plan.assumptions)


def does_not_fit(plan: Plan) -> str:
    """What is too large, loudly."""
    estimate = plan.estimate
    peak, budget = estimate.memory_bytes["peak"], estimate.memory_budget_bytes
    if peak > budget:
        over = gib(peak - budget)
        return f"DOES NOT FIT: the peak of {gib(peak)} GiB is {over} GiB above the {gib(budget)} GiB that a plan may use"
    away = f"{gib(estimate.host_bytes)} GiB of host memory"
    away += f" and {gib(estimate.cxl_bytes)} GiB of CXL memory" if estimate.cxl_bytes else ""
    away += f" and {gib(estimate.nvme_bytes)} GiB of NVMe" if estimate.nvme_bytes else ""
    return f"DOES NOT FIT: it needs {away} per device, more than there is"


# -- details ---------------------------------------------------------------------------------------------------------


def _problem_of(plan: Plan, problems: Sequence[Problem]) -> Problem:
    """The problem whose cluster a plan is for; the first one where a deadline's search chose the size."""
    return next((problem for problem in problems if problem.cluster.name == plan.cluster), problems[0])


def _gain(plan: Plan, best: Plan) -> str:
    ratio = plan.estimate.step_time_s / best.estimate.step_time_s
    if not plan.estimate.fits and best.estimate.fits:
        return f"{best.estimate.step_time_s:.3f} s per step, and it fits. Plan 2 is yours, which does not."
    if ratio <= 1.0 + 1e-9:
        return "This plan is as fast as the best that was found."
    seconds = f"{best.estimate.step_time_s:.3f} s instead of {plan.estimate.step_time_s:.3f} s per step"
    return f"{seconds}: {ratio:.2f}× as fast. Plan 2 is yours."


def _job(problem: Problem) -> str:
    model = problem.model
    return (
        f"{model.name}: {format_count(parameter_count(model))} parameters · "
        f"{format_count(problem.workload.tokens_per_step)} tokens/step"
    )


def _machine(plan: Plan, problem: Problem) -> str:
    groups = problem.cluster.groups
    if len(groups) == 1:
        return f"{plan.devices:,} × {groups[0].device.name}"
    return " + ".join(f"{group.devices:,} × {group.device.name}" for group in groups)


def _totals(plan: Plan, problem: Problem) -> list[str]:
    """Run totals as text; empty where the length of the run is not given."""
    run = run_totals(plan, problem)
    if run is None:
        return []
    found = [
        f"{format_count(run['tokens'])} tokens in {run['steps']:,} steps: {format_seconds(run['run_s'])}, "
        f"{format_count(run['device_hours'])} device hours, {energy_text(run)}"
    ]
    if run["usd"] is not None:
        found.append(
            f"${format_count(run['usd'])} at ${run['usd'] / run['device_hours']:.2f} per device and hour"
        )
    return found


def _proof(best: Plan, report: SearchReport) -> list[str]:
    """Whether the winner is exact, and why everything else fell."""
    optimality = best.optimality
    if optimality.status == "exact":
        verdict = "Plan 1 is exact under this model: a bound or a rule excluded whatever was not scored"
    elif optimality.gap is not None:
        verdict = f"Plan 1 is within {100 * optimality.gap:.1f} % of the best possible under this model"
    else:
        verdict = "Plan 1 is the best that was found; nothing is proved"
    found = [f"{verdict} ({optimality.solver})."]
    if not report.candidates:
        return found
    found += [
        f"{report.scored:,} of {report.candidates:,} candidates scored, "
        f"{report.repriced:,} of them priced by the schedule engine.",
    ]
    for heading, counts in (("excluded by a bound", report.excluded_by_bound), ("rejected", report.rejected)):
        total = sum(counts.values())
        if total:
            found.append(f"{total:,} {heading}: {_reasons(counts, total)}")
    return found


def _reasons(counts: Mapping[str, int], total: int, most: int = 5) -> str:
    ranked = sorted(((n, reason) for reason, n in counts.items() if n), key=lambda pair: (-pair[0], pair[1]))
    told = [f"{reason} {percent(n, total)}" for n, reason in ranked[:most]]
    left = len(ranked) - most
    return "; ".join(told) + (f"; {left} more reason{'s' if left > 1 else ''}" if left > 0 else "")


def _next(saved: str | None, plans: Sequence[Plan], second: int | None) -> tuple[list[str], list[str]]:
    """Commands to go on with, and what to know of them; ``second`` is the number of the next plan that is a choice of its own."""
    if saved is None:
        return ["repeat with -o plans.json, then: planner explain plans.json:1"], []
    from planner.export import EXPORTERS
    from planner.export.launchers import LAUNCHERS

    told, remarks = [f"planner explain {saved}:1"], []
    if second is not None:
        told.append(f"planner compare {saved}:1 {saved}:{second}")
    runnable = {to: next((n for n, plan in enumerate(plans, 1) if _runs(plan, to)), None) for to in EXPORTERS}
    by_plan: dict[int, list[str]] = {}
    for to, number in runnable.items():
        if number is not None:
            by_plan.setdefault(number, []).append(to)
    for number, names in sorted(by_plan.items()):
        first = "megatron" if "megatron" in names else names[0]
        others = [name for name in names if name != first]
        told.append(f"planner export {saved}:{number} --to {first}")
        remarks += [f"plan {number} runs under {', '.join(others)} too"] if others else []
    none = [to for to, number in runnable.items() if number is None and to in LAUNCHERS]
    if none:
        remarks.append(
            f"--for LAUNCHER finds plans that it can run; none of these runs under {', '.join(none)}"
        )
    return told, remarks


def _runs(plan: Plan, to: str) -> bool:
    """Whether a launcher can express the plan."""
    from planner.export import export

    try:
        export(plan, to)
    except PlannerError:
        return False
    return True
