"""``planner estimate``: what one plan, named with --fix or by a launcher's configuration, will cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.job import JobOptions
from planner.cli.launched import best_of_launcher, launched_problem
from planner.cli.launched_serving import estimate_served, serves
from planner.cli.options import Json, given_options, option, with_options
from planner.cli.plan_file import PLAN_HELP
from planner.cli.traffic_options import TrafficOptions

if TYPE_CHECKING:
    from planner.plans.plan import Plan
    from planner.specs.problem import Problem


@with_options
def estimate(
    job: JobOptions,
    *,
    plan_file: Annotated[
        str | None,
        typer.Argument(
            metavar="[PLAN]", help=f"A serving plan to price again: {PLAN_HELP}", show_default=False
        ),
    ] = None,
    source: Annotated[
        tuple[str, str] | None,
        option(
            "--from",
            metavar="LAUNCHER FILE",
            text="Price this configuration: megatron, deepspeed, accelerate, transformers, torchtitan, galvatron, vllm, sglang.",
        ),
    ] = None,
    script: Annotated[
        str | None,
        option(
            "--from-megatron",
            metavar="RUN.sh",
            text="As --from megatron RUN.sh.",
        ),
    ] = None,
    traffic: TrafficOptions,
    out: Annotated[
        str | None,
        option("-o", "--out", metavar="FILE", text="Write the plan as JSON to a file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Price the one plan that --fix names.

    Degrees that are left out are 1, and dp is what remains. A plan that does not fit in memory is priced all the same, and
    says so. With --from, the plan is a launcher's configuration, what was not understood in it is listed, and the best plan
    for the same job is searched too; --model and the like say what the file does not, --isl and what follows it what a
    launch of vllm or sglang has to answer.
    """
    from planner import estimate as price
    from planner.cli.output import json_text, plans_file, print_json
    from planner.plans.plan import SCHEMA_VERSION
    from planner.report.totals import confidence_fields, run_totals

    if plan_file is not None:
        given_too = [*given_options(job), *given_options(traffic)]
        given_too += [
            flag for flag, value in (("--from", source), ("--from-megatron", script), ("-o", out)) if value
        ]
        _again(plan_file, given_too, as_json)
        return
    given = ("megatron", script) if script is not None and source is None else source
    if given is not None and serves(given[0]):
        estimate_served(job, given, traffic, out, as_json)
        return
    traffic.refuse(None if given is None else given[0])
    problem, notes = _named(job, given)
    with plans_file(out) as file:
        plan = price(problem)
        best = best_of_launcher(problem, given[0]) if given is not None else None
        content: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "plans": [plan.as_dict()]}
        content |= confidence_fields([plan], problem)
        totals = run_totals(plan, problem)
        if totals is not None:
            content["run"] = totals
        if given is not None:
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


def _again(reference: str, given_too: list[str], as_json: bool) -> None:
    """Prices a serving plan from a file, which says all of its job."""
    from planner.cli.serve_plan import estimate_serving, read_serving_plan
    from planner.errors import Problem, SpecError

    if given_too:
        hint = "planner simulate takes other loads."
        raise SpecError(
            [
                Problem(flag, "is given beside a plan", "the plan alone, which says all of its job", hint)
                for flag in given_too
            ]
        )
    served = read_serving_plan(reference)
    if served is None:
        raise SpecError(
            Problem("PLAN", "is a plan that trains", "a serving plan", "explain prices training plans again.")
        )
    estimate_serving(served, as_json)


def _named(job: JobOptions, source: tuple[str, str] | None) -> tuple[Problem, list[str]]:
    """The problem with its one plan, and what the configuration's reader noted."""
    if source is None:
        return job.problem(), []
    problem, run = launched_problem(job, *source)
    return problem, [*run.notes, *run.wasteful]


def _speedup(plan: Plan, best: Plan) -> float:
    return plan.estimate.step_time_s / best.estimate.step_time_s
