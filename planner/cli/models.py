"""Models: what is shipped, what a model is made of, and reading a Hugging Face config."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.options import Json, option

if TYPE_CHECKING:
    from planner.specs.model import Model


def list_shipped(as_json: Json = False) -> None:
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
    as_json: Json = False,
) -> None:
    """Show what a model is made of.

    Its layers and their sizes, and the exact number of parameters, active ones too.
    """
    from planner.specs.models import load_model

    _print(load_model(name), as_json)


def read(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", help="A Hugging Face config.json, its folder, or an index of safetensors in it."
        ),
    ],
    out: Annotated[
        str | None,
        option("-o", "--out", metavar="FILE.toml", text="Write the model to a file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a Hugging Face config.

    Prints the model that it describes, and writes it as a model file, to be changed at will. Where weights lie beside it
    (safetensors, or their index), their headers tell the exact number of parameters, which is held against the model's.
    """
    from planner.cli.output import OutputFile
    from planner.errors import Problem, SpecError
    from planner.specs.model_writer import model_toml
    from planner.specs.models import load_model

    path = Path(config)
    folder = path.parent if path.suffix == ".safetensors" or path.name.endswith(".index.json") else path
    model = _with_weights(load_model(folder), folder if folder.is_dir() else folder.parent)
    if out is not None:
        if not out.lower().endswith(".toml"):
            raise SpecError(Problem("-o", repr(out[:80]), "a file name that ends in .toml"))
        text = model_toml(model, model.source or config)
        with OutputFile(out) as file:
            file.write(text)
    _print(model, as_json)


def _with_weights(model: Model, folder: Path) -> Model:
    """The model with what the headers of the weights beside its config say."""
    from dataclasses import replace

    from planner.specs.parameters import parameter_count
    from planner.specs.safetensors import read_weights
    from planner.units import format_bytes

    weights = read_weights(folder)
    if weights is None:
        return model
    ours = parameter_count(model)
    size = f"{weights.tensors:,} tensors of {weights.n_bytes:,} bytes ({format_bytes(weights.n_bytes)})"
    if weights.elements is None:
        said = f"{size}, as their index says; their headers are not here, so the count of parameters is not checked"
        return replace(model, extras={**model.extras, "weights": said})
    kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in weights.elements_by_dtype.items())
    apart = weights.elements - ours
    verdict = "as many as the model has" if not apart else f"{apart:+,} against the model's {ours:,}"
    said = f"{size} in {weights.files} files: {kinds}; {verdict}"
    return replace(
        model,
        published_parameters=float(weights.elements),
        published_digits=len(str(weights.elements)),
        extras={**model.extras, "weights": said},
    )


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
