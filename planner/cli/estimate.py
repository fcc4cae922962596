"""``planner estimate``: what one plan, named with --fix or by a launch script, will cost."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.explain import single
from planner.cli.job import JobOptions, with_job
from planner.cli.plan_file import PLAN_HELP

if TYPE_CHECKING:
    from planner.plan import Plan
    from planner.specs.problem import Problem


@with_job
def estimate(
    job: JobOptions,
    plan_file: Annotated[
        str | None,
        typer.Argument(
            metavar="[PLAN]", help=f"A serving plan to price again: {PLAN_HELP}", show_default=False
        ),
    ] = None,
    script: Annotated[
        str | None,
        typer.Option(
            "--from-megatron",
            metavar="RUN.sh",
            help="Price this Megatron-LM launch; needs only --cluster.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "-o", "--out", metavar="FILE", help="Write the plan as JSON to a file.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")] = False,
) -> None:
    """Price the one plan that --fix names.

    Degrees that are left out are 1, and dp is what remains. A plan that does not fit in memory is priced all the same, and
    says so. With --from-megatron, the plan is the script's, and the best plan for the same job is searched too.
    """
    from planner import estimate as price
    from planner.cli.output import OutputFile, json_text, print_json
    from planner.plan import SCHEMA_VERSION
    from planner.report.totals import confidence_fields, run_totals

    if plan_file is not None:
        _again(plan_file, as_json)
        return
    problem, notes = _named(job, script)
    with OutputFile(out) if out is not None else nullcontext() as file:
        plan = price(problem)
        best = _best(problem) if script is not None else None
        content: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "plans": [plan.as_dict()]}
        content |= confidence_fields([plan], problem)
        totals = run_totals(plan)
        if totals is not None:
            content["run"] = totals
        if script is not None:
            content["notes"] = notes
        if best is not None:
            content["best"] = {"plan": best.as_dict(), "speedup": _speedup(plan, best)}
        if file is not None:
            file.write(json_text(content) + "\n")
    if as_json:
        print_json(content)
    else:
        from planner.report.ranking import show_plan

        show_plan(plan, problem, notes, best)


def _again(reference: str, as_json: bool) -> None:
    """Prices a serving plan from a file."""
    from planner.cli.serve_plan import estimate_serving, read_serving_plan
    from planner.errors import Problem, SpecError

    served = read_serving_plan(reference)
    if served is None:
        raise SpecError(
            Problem("PLAN", "is a plan that trains", "a serving plan", "explain prices training plans again.")
        )
    estimate_serving(served, as_json)


def _named(job: JobOptions, script: str | None) -> tuple[Problem, list[str]]:
    """The problem with its one plan, and what the script's reader noted."""
    if script is None:
        return single(job.problems()), []
    from planner.errors import Problem as Fault
    from planner.errors import SpecError
    from planner.export.megatron_import import read_megatron

    run = read_megatron(script)
    problem = single(job.problems(base=run))
    if run.devices not in (None, problem.cluster.devices):
        found = f"{problem.cluster.devices:,} devices"
        raise SpecError(Fault("--cluster", found, f"{run.devices:,}, as {script} starts"))
    return problem, list(run.notes)


def _best(problem: Problem) -> Plan | None:
    """The best plan for the same job that the same launcher can run; None where none fits."""
    from planner import search
    from planner.cli.progress import Progress
    from planner.errors import Infeasible
    from planner.export.launchers import launcher

    kept = {
        name: value
        for name, value in problem.fixed.items()
        if name in ("precision", "optimizer", "gradient_dtype")
    }
    try:
        with Progress() as progress:
            return search(replace(problem, fixed=kept, launcher=launcher("megatron")), 1, progress).best
    except Infeasible:
        return None


def _speedup(plan: Plan, best: Plan) -> float:
    return plan.estimate.step_time_s / best.estimate.step_time_s
