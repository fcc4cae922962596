"""Models: what is shipped, what a model is made of, and reading a Hugging Face config."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.options import Json, option

if TYPE_CHECKING:
    from planner.specs.model import Model
    from planner.specs.safetensors import Weights


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
    if folder.is_dir() and not (folder / "config.json").exists():
        _refuse_weights_alone(folder)
    model = _with_weights(load_model(folder), folder if folder.is_dir() else folder.parent)
    if out is not None:
        if not out.lower().endswith(".toml"):
            raise SpecError(Problem("-o", repr(out[:80]), "a file name that ends in .toml"))
        text = model_toml(model, model.source or config)
        with OutputFile(out) as file:
            file.write(text)
    _print(model, as_json)


def _refuse_weights_alone(folder: Path) -> None:
    """Says what lies in a folder of weights that describes no model.

    Raises:
        SpecError: there are weights.
    """
    from planner.errors import Problem, SpecError
    from planner.specs.safetensors import read_weights

    weights = read_weights(folder)
    if weights is not None:
        hint = (
            "Sizes of weights alone describe no model: download the config.json that was published with them."
        )
        raise SpecError(
            Problem(f"{folder}/config.json", f"no such file, beside {_size(weights)}", "a config.json", hint)
        )


def _size(weights: Weights) -> str:
    from planner.units import counted, format_bytes

    return (
        f"{counted(weights.tensors, 'tensor')} of {weights.n_bytes:,} bytes ({format_bytes(weights.n_bytes)})"
    )


def _with_weights(model: Model, folder: Path) -> Model:
    """The model with what the headers of the weights beside its config say."""
    from dataclasses import replace

    from planner.specs.parameters import parameter_count
    from planner.specs.safetensors import read_weights
    from planner.units import counted

    weights = read_weights(folder)
    if weights is None:
        return model
    ours, size = parameter_count(model), _size(weights)
    if weights.elements is None:
        each = f"{weights.n_bytes / ours:.4g} for each of the model's parameters"
        said = f"{size}, as their index says, {each}; their headers are not here, so that these are not counted again"
        return replace(model, extras={**model.extras, "weights": said})
    kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in weights.elements_by_dtype.items())
    apart = weights.elements - ours
    verdict = "as many as the model has" if not apart else f"{apart:+,} against the model's {ours:,}"
    said = f"{size} in {counted(weights.files, 'file')}: {kinds}; {verdict}"
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
