"""The page on accuracy says what the shipped table of published runs says; it is not edited by hand."""

import importlib.util
import re
from pathlib import Path

import pytest

from planner.uncertainty.published import load_published_runs

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
REGENERATE = "python benchmarks/accuracy.py TRAINING.csv… --refitted FIT.json --operators OPERATORS.csv… -o docs/accuracy.md"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("accuracy", ROOT / "benchmarks" / "accuracy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fitted():
    """The shipped runs that constants are fitted to: not the held-out ones."""
    return [run for run in load_published_runs() if not run.row_id.startswith("held_out")]


def test_page_shows_what_the_shipped_runs_say(script, fitted):
    assert "\n".join(script.step_time_table(fitted)) in PAGE, REGENERATE
    assert "\n".join(script.interval_table(load_published_runs())) in PAGE, REGENERATE


def test_page_counts_the_shipped_runs(script, fitted):
    assert script.counts(fitted) in PAGE, REGENERATE


def test_page_lists_every_fitted_constant(script):
    table = list(script.constants_table())
    assert "\n".join(table) in PAGE, REGENERATE
    counted = re.search(
        r"(\d+) constants of the\s+software stacks are fitted to them.*?(\d+) more", PAGE, re.DOTALL
    )
    distinct = {tuple(line.split(" | ")[1:3]) for line in table[2:]}  # what two stacks share counts once
    assert len(distinct) == int(counted[1]) + int(counted[2])
    for cells in (line.split(" | ") for line in table[2:]):
        if " to " in cells[3]:  # in logarithms, the value lies in the middle
            low, high = map(float, cells[3].split(" to "))
            assert (low * high) ** 0.5 == pytest.approx(float(cells[2]), rel=0.02)


def test_every_part_of_the_page_is_there():
    assert not re.findall(r"^\{\w+\}$", PAGE, re.MULTILINE)


def test_every_bad_row_has_an_explanation():
    """Known or not: it is said."""
    rows = [
        line.split(" | ")
        for line in PAGE.partition("## The worst rows")[2].splitlines()
        if line.startswith("| ")
    ]
    told = [cells for cells in rows if not cells[0].startswith(("| row", "| ---", "| use"))]
    assert len(told) >= 20
    assert all(cells[-1].strip(" |") for cells in told)
