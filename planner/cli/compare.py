"""``planner compare``: two plans term by term."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli.options import Json
from planner.cli.plan_file import PLAN_HELP, read_plan

if TYPE_CHECKING:
    from planner.errors import Problem
    from planner.plans.plan import Plan


def compare(
    a: Annotated[str, typer.Argument(help=PLAN_HELP)],
    b: Annotated[str, typer.Argument(help=PLAN_HELP)],
    as_json: Json = False,
) -> None:
    """Compare two plans term by term.

    Choices, seconds and bytes, as their files say.
    """
    from planner.cli.output import print_json
    from planner.errors import SpecError

    if _serving(a, b, as_json):
        return
    found: list[Plan] = []
    faults: list[Problem] = []
    for reference in (a, b):
        try:
            found.append(read_plan(reference))
        except SpecError as error:
            faults += error.problems
    if faults:
        raise SpecError(faults)

    from planner.report.comparison import comparison

    content = comparison(*found)
    if as_json:
        print_json(content)
    else:
        from planner.report.comparison import show_comparison

        show_comparison(content)


def _serving(a: str, b: str, as_json: bool) -> bool:
    """Compares serving plans; whether both are."""
    from planner.cli.serve_plan import compare_serving, read_serving_plan
    from planner.errors import Problem, SpecError

    try:
        one, other = read_serving_plan(a), read_serving_plan(b)
    except SpecError:
        return False  # said by the reader of the other kind, for both files at once
    if (one is None) != (other is None):
        raise SpecError(Problem("PLAN", "one plan trains, the other serves", "two plans of one kind"))
    if one is None or other is None:
        return False
    compare_serving(one, other, as_json)
    return True
