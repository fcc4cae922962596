"""The command tree: one module per verb, loaded when its verb is called."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer

from planner import __version__

__all__ = ["command"]

_VERBS = (
    "train",
    "serve",
    "simulate",
    "estimate",
    "check",
    "explain",
    "trace",
    "goodput",
    "compare",
    "export",
    "techniques",
)
_GROUPS = ("solve", "hardware", "models", "calibrate")
_MORE_VERBS = ("validate", "schema")
_PLAIN: dict[str, Any] = {
    "invoke_without_command": True,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"max_content_width": 110},
}
_WRONG_INPUT = 2


def command(first: str = "") -> Callable[..., Any]:
    """The program as a callable that takes arguments; where ``first`` of them names a verb, with that verb alone."""
    everything = (*_VERBS, *_GROUPS, *_MORE_VERBS)
    app = typer.Typer(name="planner", help=_HELP, **_PLAIN)
    app.callback()(_program)
    for name in (first,) if first in everything else everything:
        module = import_module(f"planner.cli.{name}")
        if name not in _GROUPS:
            app.command(name)(getattr(module, name))
            continue
        group = typer.Typer(help=module.HELP, **_PLAIN)
        group.callback()(_group)
        for verb, run in module.VERBS.items():
            group.command(verb)(run)
        app.add_typer(group, name=name)
    program: Any = typer.main.get_command(app)
    return program.main  # type: ignore[no-any-return]


_HELP = """Plans how to train and serve a foundation model: which parallelism, on which machines, at what cost.

Start with: planner train --model llama3.1-70b --cluster h100-sxm:32x8 --global-batch 1024 --seq-len 8192
        or: planner serve --model qwen3-32b --cluster h200-sxm:4x8 --isl 4000 --osl 500 --ttft-ms 1000 --tpot-ms 20
"""


def _version(wanted: bool) -> None:
    if wanted:
        print(f"planner {__version__}")
        raise typer.Exit


def _program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    _group(context)


def _group(context: typer.Context) -> None:
    """Without a command there is nothing to do but to say which there are."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(_WRONG_INPUT)
