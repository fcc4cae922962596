"""Dataclasses of options: every field is an option of the command, and the command receives them as one value."""

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from planner.cli.options import Json, option, with_options


@dataclass(frozen=True)
class Pair:
    left: Annotated[str, option("--left", text="One side [a].", metavar="L")] = "a"
    right: Annotated[str | None, option("--right", text="The other.")] = None


def invoked(*arguments: str) -> tuple[str, str]:
    """What a command of one group and one plain option was called with, and the help that it has."""
    called = []

    @with_options
    def command(pair: Pair, as_json: Json = False) -> None:
        """Say a pair."""
        called.append((pair, as_json))

    app = typer.Typer(rich_markup_mode=None)
    app.command()(command)
    run = CliRunner().invoke(app, arguments)
    return str(*called), run.output


def test_fields_of_a_dataclass_are_options_and_arrive_as_one_value():
    assert invoked("--right", "b", "--json")[0] == str((Pair("a", "b"), True))
    assert invoked()[0] == str((Pair(), False))


def test_help_lists_the_fields_in_their_order_and_no_default_twice():
    text = invoked("--help")[1]
    assert text.index("--left L") < text.index("--right TEXT") < text.index("--json")
    assert "One side [a]." in text
    assert "default:" not in text


SERVE = ("--isl", "10", "--osl", "10", "--ttft-ms", "1000", "--tpot-ms", "100")


@pytest.mark.parametrize("command", ["train", "estimate", "serve"])
def test_plans_go_into_no_file_that_its_name_says_is_something_else(planner, tmp_path, command):
    job = ("--model", "llama3.1-8b", "--cluster", "h100-sxm:1x8")
    more = SERVE if command == "serve" else ("--global-batch", "8", "--seq-len", "512", "--fix", "tp=8")
    found = planner(command, *job, *more, "-o", str(tmp_path / "plans.toml"))
    assert found.code == 2
    assert "plans are written as JSON" in found.err
    assert not list(tmp_path.iterdir())
