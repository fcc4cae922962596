"""Dataclasses of options: every field is an option of the command, and the command receives them as one value."""

from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from planner.cli.app import _VERBS
from planner.cli.options import Json, option, with_options


@dataclass(frozen=True)
class Pair:
    left: Annotated[str, option("--left", text="One side [a].", metavar="L")] = "a"
    right: Annotated[str | None, option("--right", text="The other.")] = None


@dataclass(frozen=True)
class Around:
    before: Annotated[str | None, option("--before", text="First.")] = None
    pair: Pair = field(default_factory=Pair)
    after: Annotated[str | None, option("--after", text="Last.")] = None


def invoked(*arguments: str, group: type = Pair) -> tuple[str, str]:
    """What a command of one group and one plain option was called with, and the help that it has."""
    called = []

    def command(pair: Pair, as_json: Json = False) -> None:
        """Say a pair."""
        called.append((pair, as_json))

    command.__annotations__["pair"] = group
    command = with_options(command)

    app = typer.Typer(rich_markup_mode=None)
    app.command()(command)
    run = CliRunner().invoke(app, arguments)
    return str(*called), run.output


def test_fields_of_a_dataclass_are_options_and_arrive_as_one_value():
    assert invoked("--right", "b", "--json")[0] == str((Pair("a", "b"), True))
    assert invoked()[0] == str((Pair(), False))


def test_a_field_that_is_a_dataclass_has_its_options_in_its_place():
    assert invoked("--right", "b", "--after", "c", group=Around)[0] == str(
        (Around(pair=Pair("a", "b"), after="c"), False)
    )
    text = invoked("--help", group=Around)[1]
    assert text.index("--before") < text.index("--left") < text.index("--right") < text.index("--after")


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


@pytest.mark.parametrize("verb", _VERBS)
def test_verb_begins_its_help_with_what_the_list_of_verbs_says(planner, verb):
    help_of_verb = " ".join(planner(verb, "--help").out.split())
    assert f"{verb} [OPTIONS]" in help_of_verb
    assert _VERBS[verb] in help_of_verb


_JOB = (
    "--model",
    "llama2-7b",
    "--cluster",
    "h100-sxm:2x8",
    "--global-batch",
    "128",
    "--seq-len",
    "4096",
    "--json",
)


@pytest.mark.parametrize(
    ("fixed", "hint"),
    [
        ("context=ulysses", "--fix context=a2a"),
        ("context=usp", "--fix context=a2a+p2p"),
        ("context=rsa", "--preset rsa_sp"),
        ("schedule=pipedream_2bw", "--fix schedule=2bw"),
        ("schedule=varuna", "no choice of a plan"),
    ],
)
def test_a_technique_by_its_name_is_told_by_its_choice(planner, fixed, hint):
    result = planner("train", *_JOB, "--fix", fixed)
    assert result.code == 2
    assert hint in result.faults[0]["try"]


@pytest.mark.parametrize("glob", ["synchronisation=diloco", "synchronisation=*", "pipedream"])
def test_exploring_what_needs_a_permission_asks_for_it(planner, glob):
    result = planner("train", *_JOB, "--explore", glob)
    assert result.code == 2
    assert result.faults[0]["where"] == f"--explore {glob}"
    assert "--allow staleness" in result.faults[0]["try"]


@pytest.mark.parametrize(
    ("fixed", "reason"),
    [
        (
            ("schedule=hanayo", "virtual_stages=3"),
            "schedule=hanayo does not run 3 virtual stages on a device",
        ),
        (("schedule=1f1b", "virtual_stages=2"), "schedule=1f1b does not run 2 virtual stages on a device"),
    ],
)
def test_virtual_stages_that_a_schedule_has_not_are_told_apart_from_layers(planner, fixed, reason):
    arguments = [word for choice in (*fixed, "pp=4") for word in ("--fix", choice)]
    result = planner("train", *_JOB, *arguments)
    assert result.code == 3
    assert reason in result.faults[0]["found"]
