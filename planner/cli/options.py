"""Options as fields of dataclasses: what a command is asked, declared and checked in one place, and handed to it as one value.

A command names such a dataclass as the type of a parameter; :func:`with_options` turns its fields into options of the command
line, and where a field is such a dataclass itself, that one's fields in its place. Texts stay texts until the dataclass reads
them, so that everything that is wrong with them is said at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

__all__ = ["Json", "PlansFile", "flag", "given_options", "option", "with_options"]

T = TypeVar("T")


def option(*names: str, text: str, metavar: str = "TEXT") -> Any:
    """An option with a value; its help says its default itself, where it has one."""
    return typer.Option(*names, help=text, metavar=metavar, show_default=False)


def flag(name: str, text: str) -> Any:
    """An option that is given or not."""
    return typer.Option(name, help=text, show_default=False)


Json = Annotated[bool, flag("--json", "Print JSON on stdout, and nothing else.")]
PlansFile = Annotated[
    str | None, option("-o", "--out", text="Write the plans as JSON to a file.", metavar="FILE")
]


def with_options(command: Callable[..., T]) -> Callable[..., T]:
    """Gives a command the options of every parameter whose type is a dataclass; it receives each as one value."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    groups: dict[str, Any] = {p.name: p.annotation for p in own if is_dataclass(p.annotation)}
    keyword = inspect.Parameter.KEYWORD_ONLY
    plain = {p.name: (p.replace(kind=keyword),) for p in own if p.name not in groups}
    grouped = {name: _parameters(group) for name, group in groups.items()}
    parameters = [parameter for p in own for parameter in {**plain, **grouped}[p.name]]

    def run(**values: Any) -> T:
        for name, group in groups.items():
            values[name] = _made(group, values)
        return command(**values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def given_options(group: Any) -> list[str]:
    """Flags of a group's options that are not as they are when left out."""
    found = []
    for each in fields(group):
        value = getattr(group, each.name)
        if is_dataclass(value):
            found += given_options(value)
        elif value not in (each.default, None, []):
            found.append(f"--{each.name.replace('_', '-')}")
    return found


@cache
def _hints(group: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, in their order."""
    hints = get_type_hints(group, include_extras=True)
    return {field.name: hints[field.name] for field in fields(group)}


def _parameters(group: Any) -> Iterator[inspect.Parameter]:
    """The fields of a dataclass as parameters of a function, which is where typer looks for options."""
    defaults = {field.name: field.default for field in fields(group)}
    for name, hint in _hints(group).items():
        if is_dataclass(hint):
            yield from _parameters(hint)
        else:
            yield inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hint
            )


def _made(group: Any, values: dict[str, Any]) -> Any:
    """The dataclass with its fields out of the values of all options."""
    hints = _hints(group).items()
    return group(
        **{name: _made(hint, values) if is_dataclass(hint) else values.pop(name) for name, hint in hints}
    )
