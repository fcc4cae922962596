"""``planner estimate``: what one plan, named with --fix or by a launcher's configuration, will cost."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.explain import single
from planner.cli.job import JobOptions, with_job
from planner.cli.launched import best_of_launcher, launched_problem
from planner.cli.plan_file import PLAN_HELP
from planner.cli.served import estimate_served, refuse_traffic, serves, traffic_option

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
    source: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--from",
            metavar="LAUNCHER FILE",
            help="Price this configuration: megatron, deepspeed, accelerate, torchtitan, galvatron, vllm or sglang.",
            show_default=False,
        ),
    ] = None,
    script: Annotated[
        str | None,
        typer.Option(
            "--from-megatron",
            metavar="RUN.sh",
            help="As --from megatron RUN.sh.",
            show_default=False,
        ),
    ] = None,
    isl: Annotated[str | None, traffic_option("isl")] = None,
    osl: Annotated[str | None, traffic_option("osl")] = None,
    rate: Annotated[str | None, traffic_option("rate")] = None,
    concurrency: Annotated[str | None, traffic_option("concurrency")] = None,
    ttft_ms: Annotated[str | None, traffic_option("ttft_ms")] = None,
    tpot_ms: Annotated[str | None, traffic_option("tpot_ms")] = None,
    acceptance: Annotated[str | None, traffic_option("acceptance")] = None,
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
    says so. With --from, the plan is a launcher's configuration, what was not understood in it is listed, and the best plan
    for the same job is searched too; --model and the like say what the file does not.
    """
    from planner import estimate as price
    from planner.cli.output import OutputFile, json_text, print_json
    from planner.plan import SCHEMA_VERSION
    from planner.report.totals import confidence_fields, run_totals

    if plan_file is not None:
        _again(plan_file, as_json)
        return
    given = ("megatron", script) if script is not None and source is None else source
    traffic = {
        "isl": isl,
        "osl": osl,
        "rate": rate,
        "concurrency": concurrency,
        "ttft_ms": ttft_ms,
        "tpot_ms": tpot_ms,
        "acceptance": acceptance,
    }
    if given is not None and serves(given[0]):
        estimate_served(job, given, traffic, out, as_json)
        return
    refuse_traffic(None if given is None else given[0], traffic)
    problem, notes = _named(job, given)
    with OutputFile(out) if out is not None else nullcontext() as file:
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


def _named(job: JobOptions, source: tuple[str, str] | None) -> tuple[Problem, list[str]]:
    """The problem with its one plan, and what the configuration's reader noted."""
    if source is None:
        return single(job.problems()), []
    problem, run = launched_problem(job, *source)
    return problem, [*run.notes, *run.wasteful]


def _speedup(plan: Plan, best: Plan) -> float:
    return plan.estimate.step_time_s / best.estimate.step_time_s
