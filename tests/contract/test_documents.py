"""Documents keep their promises: links lead somewhere, code runs, commands work, the test command is CI's."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from planner.technique import SLOTS, Technique, discover, off

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/decisions/*.md"), *ROOT.glob("*/*.md"))
    if path.is_file()
)  # fmt: skip
MARKERS = re.compile(r"\b(TODO|FIXME|XXX|TBD|OUTPUT|TABLE)\b|lorem ipsum|coming soon", re.IGNORECASE)
TEST_COMMAND = "python3 -m venv .venv && .venv/bin/pip install '.[test]' && .venv/bin/pytest"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(page: Path) -> list[str]:
    """What follows the program's name in every call of planner in the page's shell blocks."""
    parts = [
        part.split("#")[0].strip().partition(" ")
        for block in blocks(page, "sh")
        for line in block.replace("\\\n", " ").splitlines()
        for part in line.split("&&")
    ]
    return [arguments for program, _, arguments in parts if program.rpartition("/")[2] == "planner"]


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=environment, timeout=120
    )


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_pages_are_finished(page):
    if page.name != "CONTRIBUTING.md":
        assert not [m.group() for m in MARKERS.finditer(page.read_text()) if m.group().isupper()]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=title)
def test_python_blocks_run(page):
    done = run("-c", "\n".join(blocks(page, "python")), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=title)
def test_commands_work(page, tmp_path):
    """In the order in which they stand, in one folder: a command may read what the one before it wrote."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for arguments in commands(page):
        done = run("-m", "planner", *shlex.split(arguments), cwd=tmp_path)
        assert done.returncode == 0, f"planner {arguments}\n{done.stderr}"
        assert done.stdout or "-o " in arguments, f"planner {arguments} says nothing"


def test_ci_ends_with_the_test_command_of_the_read_me():
    script = (ROOT / ".ci" / "run").read_text()
    assert f"```sh\n{TEST_COMMAND}\n```" in (ROOT / "README.md").read_text()
    assert "pip install --quiet '.[test]'" in script
    assert script.rstrip().endswith("\npytest")


def test_read_me_names_every_part_of_the_package():
    tree = (ROOT / "README.md").read_text()
    for path in (ROOT / "planner").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"{path.name}/" in tree, path.name
        if path.suffix == ".py" and not path.name.startswith("__"):
            assert path.name in tree


def shown(technique: Technique, choice: str) -> str:
    """A choice with what it takes to be tried: a permission, --explore all (brackets), or being fixed (square brackets)."""
    if technique.asked:
        return f"[`{choice}`]"
    text = f"`{choice}`" if technique.searched else f"(`{choice}`)"
    return f"{text} *{' '.join(technique.needs)}*" if technique.needs else text


def knob_table() -> str:
    """The guide's table of slots and choices, from the techniques themselves."""
    rows = ["| knob | choices |", "|---|---|"]
    for slot in SLOTS:
        fillers = [
            t
            for t in discover().values()
            if t.slot == slot and t.job == "training" and t.status == "modelled"
        ]
        fillers.sort(key=lambda technique: not technique.default)
        choices = [] if any(t.default for t in fillers) else [f"`{off(slot)}`"]
        choices += [shown(t, choice) for t in fillers for choice in t.choices]
        rows.append(f"| `{slot}` | {' '.join(choices)} |")
    return "\n".join(rows)


def test_guide_lists_every_knob():
    """If this fails, put the table that it prints into the guide."""
    assert knob_table() in (ROOT / "docs" / "guide.md").read_text(), f"\n{knob_table()}"


@pytest.mark.slow
def test_read_me_shows_the_plan_that_its_command_finds(tmp_path):
    """Counts and seconds of the search may differ; the job and the best plan may not."""
    page = ROOT / "README.md"
    (arguments,) = commands(page)
    (shown,) = (block for block in blocks(page, "text") if block.startswith("llama"))
    printed = run("-m", "planner", *shlex.split(arguments), cwd=tmp_path).stdout

    def essence(text: str) -> tuple[str, list[str]]:
        best = next(line for line in text.splitlines() if line.split()[:1] == ["1"])
        return text.split("candidates")[0].rpartition("·")[0], best.split()

    assert essence(shown) == essence(printed), f"\n{printed}"
