"""``planner export``: a plan as files that a launcher runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.options import Json, option
from planner.cli.plan_file import PLAN_HELP, read_plan

if TYPE_CHECKING:
    from planner.errors import ExportError
    from planner.plans.plan import Plan
    from planner.serving.plan import ServePlan

_TO = (
    "accelerate, deepspeed, galvatron, megatron, megatron-bridge, torchrun, torchtitan or transformers; serving plans: vllm, "
    "sglang, trtllm, dynamo or llm-d."
)


def export(
    plan: Annotated[str, typer.Argument(help=PLAN_HELP)],
    to: Annotated[str, typer.Option("--to", metavar="LAUNCHER", help=_TO)],
    out: Annotated[
        str | None,
        option(
            "-o",
            "--out",
            metavar="DIR",
            text="Write a runnable folder instead of printing the launcher's files.",
        ),
    ] = None,
    around: Annotated[
        list[str] | None,
        option(
            "--with",
            metavar="SYSTEM",
            text="Batch system to start it under: slurm or kubernetes (k8s). Repeatable.",
        ),
    ] = None,
    version: Annotated[
        str | None,
        option(
            "--launcher-version",
            metavar="V",
            text="Version of the launcher to write for.",
        ),
    ] = None,
    image: Annotated[
        str | None,
        option("--image", metavar="NAME", text="Container image, for kubernetes."),
    ] = None,
    script: Annotated[
        str | None,
        option("--script", metavar="FILE", text="The training script to launch."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a plan as a launcher's own configuration and scripts.

    What the launcher cannot express is an error, never left out, and the closest plan that it can run is named. A folder
    (-o) is written whole or not at all: configuration, launch script, the plan, a script that holds the run against the
    prediction, and what to check first.
    """
    from planner.cli.serve_plan import read_serving_plan
    from planner.errors import ExportError, Problem, SpecError
    from planner.export import export_folder

    served = read_serving_plan(plan)
    if served is not None:
        if script is not None:
            raise SpecError(Problem("--script", "beside a serving plan", "a plan that trains"))
        files = _serving_files(served, plan, to, version, around or [], image)
        _show(served.id, to, files, out, as_json)
        return
    chosen = read_plan(plan)
    options: dict[str, Any] = {"script": script, "version": version, "around": around or [], "image": image}
    try:
        files = export_folder(chosen, to, **options)
    except ExportError as error:
        raise _with_closest(error, chosen, to) from None
    _show(chosen.id, to, files, out, as_json)


def _serving_files(
    plan: ServePlan, reference: str, to: str, version: str | None, around: list[str], image: str | None
) -> dict[str, str]:
    """The folder's files; where the launcher cannot run the plan, the error names the next one of the same file that it can."""

    from planner.cli.serve_plan import next_serving_plan
    from planner.errors import ExportError as Refusal
    from planner.export.serving import export_serving

    try:
        return export_serving(plan, to, version, around, image)
    except Refusal as error:
        number = next_serving_plan(reference, plan, to)
        hint = (
            f"Closest: plan {number} of the same file."
            if number
            else "No other plan of the same file can be run there: serve --fix and --forbid make others."
        )
        raise Refusal([*error.problems[:-1], error.problems[-1]._replace(try_=hint)]) from None


def _show(plan_id: str, to: str, files: dict[str, str], out: str | None, as_json: bool) -> None:
    """Prints or writes the files."""
    from planner.cli.folder import write_folder
    from planner.cli.output import print_json

    written = [] if out is None else write_folder(out, files)
    if as_json:
        print_json({"plan": plan_id, "to": to, "files": files, "written": written})
    elif out is not None:
        for path in written:
            print(path)
    else:
        own = {name: text for name, text in files.items() if name not in ("README.md", "measure.py")}
        for name, text in own.items():
            print(f"# {name}\n{text}", end="" if text.endswith("\n") else "\n")


def _with_closest(error: ExportError, plan: Plan, to: str) -> ExportError:
    """The error, with the closest plan that the launcher can run."""

    from planner.errors import ExportError as Refusal
    from planner.errors import PlannerError
    from planner.export import find_exporter
    from planner.export.closest import closest_plan

    name = find_exporter(to).launcher
    if not name:
        return error
    try:
        found = closest_plan(plan, name)
    except PlannerError:
        found = None
    if found is None:
        hint = f"No plan of this job can be run there: train --for {name} says why."
    else:
        changes = ", ".join(f"{knob} {was} → {now}" for knob, (was, now) in found.changes.items())
        times = (
            f"{found.plan.estimate.step_time_s:.4g} s per step instead of {plan.estimate.step_time_s:.4g} s"
        )
        told = changes or "the same choices for all layers"
        hint = f"Closest plan that it can run: {told}; {times}. train --for {name} searches them all."
    return Refusal([*error.problems[:-1], error.problems[-1]._replace(try_=hint)])
