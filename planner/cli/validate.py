"""``planner validate``: predictions held against published measurements."""

from __future__ import annotations

from typing import Annotated

import typer


def validate(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE.csv…", help="Tables of measurements.", show_default=False)
    ],
    operators: Annotated[
        bool, typer.Option("--operators", help="Score kernels and collectives instead of training runs.")
    ] = False,
    by: Annotated[
        str,
        typer.Option("--by", metavar="GROUP", help="Group by family, accelerator, source or model."),
    ] = "source",
    bounds: Annotated[
        str | None,
        typer.Option(
            "--bounds",
            metavar="FILE",
            help="Recorded bounds instead of the shipped ones.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")] = False,
) -> None:
    """Predict what published runs measured, and print how far off the predictions are.

    The header tells what a file holds; files of another kind are named and passed over. Exits 1 where a recorded bound is
    exceeded.
    """
    from planner.cli.output import print_json
    from planner.errors import Problem, SpecError, did_you_mean
    from planner.validation.report import GROUPS
    from planner.validation.report import validate as score

    if by not in GROUPS:
        raise SpecError(
            Problem("--by", repr(by[:40]), f"one of {', '.join(GROUPS)}", did_you_mean(by, GROUPS))
        )
    report = score(files, operators=operators, bounds=bounds)
    if as_json:
        print_json(report.as_dict(by))
    else:
        from planner.validation.screen import show_report

        show_report(report, by)
    if report.exceeded():
        raise typer.Exit(1)
