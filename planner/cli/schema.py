"""``planner schema``: the JSON schema of a plan."""

from __future__ import annotations

from typing import Annotated

from planner.cli.options import flag


def schema(
    serving: Annotated[bool, flag("--serving", "Of the plans that serve writes.")] = False,
    as_json: Annotated[bool, flag("--json", "The schema is JSON already.")] = False,
) -> None:
    """Print the JSON schema of plans.

    It describes what train and estimate write; with --serving, what serve does.
    """
    from importlib.resources import files

    from planner.cli.output import print_json
    from planner.specs.reader import read_file

    folder = files("planner") / ("serving" if serving else "plans")
    print_json(read_file(str(folder / "plan_schema.json")))
