"""``planner export``: a plan as files that a launcher runs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli.plan_file import PLAN_HELP, read_plan

if TYPE_CHECKING:
    from planner.serving.plan import ServePlan


def export(
    plan: Annotated[str, typer.Argument(help=PLAN_HELP)],
    to: Annotated[
        str, typer.Option("--to", metavar="LAUNCHER", help="megatron, torchrun, vllm, sglang or trtllm.")
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--out",
            metavar="DIR",
            help="Write the files to a folder instead of stdout.",
            show_default=False,
        ),
    ] = None,
    script: Annotated[
        str | None,
        typer.Option("--script", metavar="FILE", help="The training script to launch.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")] = False,
) -> None:
    """Write a plan as a launcher's own arguments and scripts.

    What the launcher cannot express is an error, never left out; train --for LAUNCHER finds plans that it can.
    """
    from planner.cli.serve_plan import read_serving_plan
    from planner.errors import ExportError
    from planner.export import export as write
    from planner.export.launchers import LAUNCHERS

    served = read_serving_plan(plan)
    if served is not None:
        _export_serving(served, to, out, as_json)
        return
    chosen = read_plan(plan)
    options = {} if script is None else {"script": script}
    try:
        files = write(chosen, to, **options)
    except ExportError as error:
        hint = f"train --for {to} finds plans that it can run." if to in LAUNCHERS else ""
        raise ExportError([*error.problems[:-1], replace(error.problems[-1], try_=hint)]) from None
    _show(chosen.id, to, files, out, as_json)


def _export_serving(plan: ServePlan, to: str, out: str | None, as_json: bool) -> None:
    from planner.export.serving import export_serving

    _show(plan.id, to, export_serving(plan, to), out, as_json)


def _show(plan_id: str, to: str, files: dict[str, str], out: str | None, as_json: bool) -> None:
    """Prints or writes the files."""
    from planner.cli.output import print_json

    written = [] if out is None else _written(Path(out).expanduser(), files)
    if as_json:
        print_json({"plan": plan_id, "to": to, "files": dict(files), "written": written})
    elif out is not None:
        for path in written:
            print(path)
    else:
        for name, text in files.items():
            print(f"# {name}\n{text}" if len(files) > 1 else text, end="" if text.endswith("\n") else "\n")


def _written(folder: Path, files: dict[str, str]) -> list[str]:
    """Writes the files, each whole or not at all; that all can be written is tried before the first is."""
    from planner.cli.output import OutputFile
    from planner.errors import Problem, SpecError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise SpecError(
            Problem(f"-o {folder}", f"is no folder ({error})", "a folder that can be made")
        ) from None
    with ExitStack() as stack:
        opened = {name: stack.enter_context(OutputFile(str(folder / name))) for name in files}
        for name, file in opened.items():
            file.write(files[name])
    return [str(folder / name) for name in files]
