"""The command tree: one module per verb, loaded when its verb is called."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from planner import __version__

__all__ = ["command"]

_VERBS = {
    "train": "Find the best plans for a training job, with proof.",
    "serve": "Find the deployments that answer most within their promises, or take fewest devices for a rate.",
    "simulate": "Simulate a serving plan under a trace of requests, a rate, or a number of clients.",
    "estimate": "Price the one plan that --fix names.",
    "check": "Say what is wrong or wasteful in a launcher's configuration.",
    "explain": "Show where every second and byte of a plan goes.",
    "trace": "Write when every pipeline rank of a plan computes, sends and holds what.",
    "goodput": "Show what failures and checkpoints leave of a plan's time.",
    "compare": "Compare two plans term by term.",
    "export": "Write a plan as a launcher's own configuration and scripts.",
    "techniques": "List the techniques, and the choices of --fix that they serve.",
    "validate": "Predict what published runs measured, and print how far off the predictions are.",
    "schema": "Print the JSON schema of plans.",
    "solve": "Shardings, recomputation, tiers, sequence groups, experts, ranks, RLHF and curricula: the best choice, with proof.",
    "hardware": "List, show, check and import devices and clusters.",
    "models": "List, show and import models.",
    "calibrate": "Fit a device, a fabric or a software stack to your own measurements, and take such measurements.",
}
"""What ``planner --help`` says of each; a verb's own help begins with the same line."""
_PLAIN: dict[str, Any] = {
    "invoke_without_command": True,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"max_content_width": 110},
}
_WRONG_INPUT = 2


def command() -> Callable[..., Any]:
    """The program as a callable that takes arguments."""
    app = typer.Typer(name="planner", help=_HELP, cls=_Verbs, **_PLAIN)
    app.callback()(_program)
    for name, does in _VERBS.items():
        app.command(name, help=does)(_listed)
    program: Any = typer.main.get_command(app)
    return program.main  # type: ignore[no-any-return]


class _Verbs(TyperGroup):
    """Verbs that are only listed, until one is called: loading them all takes longer than most of them run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed and name and _loaded(name), rest


def _listed() -> None:
    """Stands where a verb is known by its name alone."""


def _loaded(name: str) -> Any:
    """The verb, or the group of verbs, with all its options."""
    module = import_module(f"planner.cli.{name}")
    group = getattr(module, "VERBS", None)
    app = typer.Typer(help=_VERBS[name], **_PLAIN)
    app.callback()(_group)
    for verb, run in (group or {name: getattr(module, name)}).items():
        app.command(verb)(run)
    program: Any = typer.main.get_command(app)
    program.name = name
    return program if group else program.commands[name]


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
