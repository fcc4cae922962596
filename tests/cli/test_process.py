"""Does the program behave as a process: start-up, pipes, terminals?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import SMALL

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments, code=None, **environment):
    command = [sys.executable, *(["-c", code] if code else ["-m", "planner"]), *arguments]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, timeout=120)


def test_module_is_the_program():
    from planner import __version__

    found = run("--version", PYTHONIOENCODING="ascii")
    assert (found.returncode, found.stdout, found.stderr) == (0, f"planner {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "never"),
    [
        (("--help",), {"numpy", "rich", "planner.solve", "planner.costs"}),
        (
            ("train", *SMALL, "--top", "1", "--json"),
            {"rich", "scipy", "pulp", "networkx", "planner.report.terminal"},
        ),
    ],
    ids=["help", "train --json"],
)
def test_start_up_imports_little(arguments, never):
    code = (
        "import sys; from planner.cli import main; code = main(sys.argv[1:]);"
        "print(' '.join(sys.modules), file=sys.stderr); sys.exit(code)"
    )
    found = run(*arguments, code=code)
    assert found.returncode == 0
    assert never.isdisjoint(found.stderr.split())


def test_reader_that_has_seen_enough_is_no_error():
    code = (
        "import os, sys; from planner.cli import main; read, write = os.pipe(); os.close(read); os.dup2(write, 1);"
        "sys.exit(main(sys.argv[1:]))"
    )
    found = run("techniques", "--json", code=code)
    assert found.returncode == 141
    assert found.stderr == ""


def test_plain_stream_of_another_encoding():
    found = run("train", *SMALL, "--top", "1", PYTHONIOENCODING="ascii", COLUMNS="80")
    assert (found.returncode, found.stderr) == (0, "")
    assert "weakest: assumed" in found.stdout
    assert found.stdout.isascii()


@pytest.mark.parametrize(("variables", "colour"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_terminal_gets_styles_unless_asked_not_to(variables, colour):
    """``script`` is not everywhere; FORCE_COLOR is rich's own way to say that stdout is a terminal."""
    found = run("models", "show", "gpt2", FORCE_COLOR="1", TERM="xterm-256color", **variables)
    assert found.returncode == 0
    assert ("\x1b[31" in found.stdout or "\x1b[1" in found.stdout) or not colour
    assert "\x1b[3" not in found.stdout.replace("\x1b[1m", "") or colour


def test_json_of_a_process_is_json(tmp_path):
    path = tmp_path / "plan.json"
    found = run("estimate", *SMALL, "--json", "-o", str(path))
    assert (found.returncode, found.stderr) == (0, "")
    assert json.loads(found.stdout) == json.loads(path.read_text())
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
