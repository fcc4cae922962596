"""``planner validate``: predictions held against published measurements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli.options import Json, flag, option

if TYPE_CHECKING:
    from planner.validation.report import Report
    from planner.validation.spreads import Coverage


def validate(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE.csv…", help="Tables of measurements.", show_default=False)
    ],
    operators: Annotated[
        bool, flag("--operators", "Score kernels and collectives instead of training runs.")
    ] = False,
    by: Annotated[
        str,
        typer.Option("--by", metavar="GROUP", help="Group by family, accelerator, source or model."),
    ] = "source",
    bounds: Annotated[
        str | None,
        option(
            "--bounds",
            metavar="FILE",
            text="Recorded bounds instead of the shipped ones.",
        ),
    ] = None,
    residuals: Annotated[
        str | None,
        option(
            "--residuals",
            metavar="FOLDER",
            text="Write there what the shipped intervals are made of, and verify it on runs left out.",
        ),
    ] = None,
    refitted: Annotated[
        str | None,
        option(
            "--refitted",
            metavar="FILE.json",
            text="Errors with constants fitted without a run's model or source, for --residuals.",
        ),
    ] = None,
    as_json: Json = False,
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
    if refitted is not None and residuals is None:
        raise SpecError(Problem("--refitted", "without --residuals", "both"))
    if residuals is not None and not Path(residuals).is_dir():  # said before a minute's work, not after it
        raise SpecError(Problem("--residuals", f"no folder {residuals!r}", "a folder", "Make it first."))
    report = score(files, operators=operators, bounds=bounds)
    verified = {} if residuals is None else _written(residuals, report, refitted)
    if as_json:
        left_out = {metric: [c.as_dict() for c in found] for metric, found in verified.items()}
        print_json(report.as_dict(by) | ({"left_out": left_out} if verified else {}))
    else:
        from planner.validation.screen import show_left_out, show_report

        show_report(report, by)
        if verified:
            show_left_out(verified)
    if report.exceeded():
        raise typer.Exit(1)


def _written(folder: str, report: Report, refitted: str | None) -> dict[str, list[Coverage]]:
    from planner.validation.residual_files import read_left_out, write_residuals

    return write_residuals(folder, report, read_left_out(refitted))
