"""``planner trace``: one step of a plan as a timeline."""

from __future__ import annotations

from typing import Annotated

import typer

from planner.cli.job import JobOptions
from planner.cli.options import Json, option, with_options
from planner.cli.plan_file import PLAN_HELP

_WRITERS = (".json", ".svg")


@with_options
def trace(
    job: JobOptions,
    plan: Annotated[
        str | None, typer.Argument(help=f"{PLAN_HELP} Or name the plan with --fix.", show_default=False)
    ] = None,
    out: Annotated[
        str | None,
        option(
            "-o",
            "--out",
            metavar="FILE",
            text="Chrome trace events (.json, for ui.perfetto.dev) or a picture (.svg) [JSON on stdout].",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write when every pipeline rank of a plan computes, sends and holds what.

    As Chrome trace events, or as a picture. The times are the schedule engine's: the last slice ends with the step.
    """
    from planner import examine
    from planner.cli.explain import subject
    from planner.cli.output import OutputFile, json_text, print_json
    from planner.errors import Problem, SpecError
    from planner.report.chrome_trace import chrome_trace
    from planner.report.step_trace import step_trace
    from planner.report.timeline_svg import timeline_svg

    if out is not None and not out.endswith(_WRITERS):
        raise SpecError(Problem(f"-o {out!r}", "has an unknown ending", "a file that ends in .json or .svg"))
    _, problem = subject(job, plan)
    if out is None:
        print_json(chrome_trace(step_trace(examine(problem))))
        return
    with OutputFile(out) as file:
        found = step_trace(examine(problem))
        file.write(timeline_svg(found) if out.endswith(".svg") else json_text(chrome_trace(found)) + "\n")
    if as_json:
        print_json({"written": [str(file.path)]})
    else:
        print(out)
