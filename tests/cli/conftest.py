"""Runs the command line inside the test's process, and keeps a small search for all tests that need plans in a file."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from planner.cli import main

SMALL = ("--model", "gpt2", "--cluster", "a100:1x4", "--global-batch", "16", "--seq-len", "1024")


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout as strict JSON: nothing before or after it, and no NaN or Infinity."""

        def refuse(constant):
            raise AssertionError(f"{constant} is no JSON")

        return json.loads(self.out, parse_constant=refuse)

    @property
    def faults(self) -> list[dict[str, str]]:
        return self.json["error"]["problems"]


@pytest.fixture
def planner(capsys, monkeypatch):
    """Runs a command; like a shell's, its arguments are text."""
    monkeypatch.delenv("PLANNER_TRACEBACK", raising=False)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: Any) -> Result:
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def plans(tmp_path_factory):
    """A file of three ranked plans."""
    path = tmp_path_factory.mktemp("plans") / "plans.json"
    assert main(["train", *SMALL, "--top", "3", "--json", "-o", str(path)]) == 0
    return path
