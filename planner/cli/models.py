"""Models: what is shipped, what a model is made of, and reading a Hugging Face config."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from planner.specs.model import Model

HELP = "List, show and import models."
_Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]


def list_shipped(as_json: _Json = False) -> None:
    """List the shipped models."""
    from planner.cli.output import print_json
    from planner.specs.models import list_models, load_model

    if as_json:
        print_json({"models": list_models()})
        return
    from planner.report.catalogue import show_models

    show_models([load_model(name) for name in list_models()])


def show(
    name: Annotated[str, typer.Argument(help="A shipped model, a hub id, a .toml file, or a config.json.")],
    as_json: _Json = False,
) -> None:
    """Show what a model is made of.

    Its layers and their sizes, and the exact number of parameters, active ones too.
    """
    from planner.specs.models import load_model

    _print(load_model(name), as_json)


def read(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A Hugging Face config.json, or its folder.")
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "-o", "--out", metavar="FILE.toml", help="Write the model to a file.", show_default=False
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Read a Hugging Face config.

    Prints the model that it describes, and writes it as a model file, to be changed at will.
    """
    from planner.cli.output import OutputFile
    from planner.errors import Problem, SpecError
    from planner.specs.model_writer import model_toml
    from planner.specs.models import load_model

    model = load_model(Path(config))
    if out is not None:
        if not out.lower().endswith(".toml"):
            raise SpecError(Problem("-o", repr(out[:80]), "a file name that ends in .toml"))
        text = model_toml(model, model.source or config)
        with OutputFile(out) as file:
            file.write(text)
    _print(model, as_json)


VERBS = {"list": list_shipped, "show": show, "import": read}


def _print(model: Model, as_json: bool) -> None:
    from planner.cli.output import print_json

    if as_json:
        print_json({"model": _fields(model)})
        return
    from planner.report.catalogue import show_model

    show_model(model)


def _fields(model: Model) -> dict[str, Any]:
    from planner.specs.parameters import active_parameter_count, parameter_count

    return {
        **asdict(model),
        "parameters": parameter_count(model),
        "active_parameters": active_parameter_count(model),
    }
