"""``planner schema``: the JSON schema of a plan."""

from __future__ import annotations

from typing import Annotated

import typer


def schema(
    as_json: Annotated[bool, typer.Option("--json", help="The schema is JSON already.")] = False,
) -> None:
    """Print the JSON schema of plans.

    It describes what train and estimate write.
    """
    from importlib.resources import files

    from planner.cli.output import print_json
    from planner.specs.load import read_file

    print_json(read_file(str(files("planner") / "plan_schema.json")))
