"""Every module, public object and technique says what it is for, and in which units."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from planner import costs

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path for path in (ROOT / "planner").rglob("*.py") if path.read_text().strip())
TECHNIQUES = sorted(
    path
    for path in (ROOT / "planner" / "techniques").rglob("*.py")
    if re.search(r"^TECHNIQUES?\b", path.read_text(), re.MULTILINE)
)
HEADINGS = ("What it does", "Saves", "Costs", "Assumes", "Source")
# A name that ends in one of these says its unit; a docstring without such a name has to say it in words.
SUFFIXES = (
    "_s",
    "_bytes",
    "_flop",
    "_bits",
    "_elements",
    "_tokens",
    "_w",
    "_j",
    "_kg",
    "_usd",
    "_hours",
    "_parameters",
    "usd_per_token",
)
UNITS = {
    "fraction",
    "ratio",
    "factor",
    "times",
    "relative",
    "%",
    "number",
    "elements",
    "bytes",
    "bits",
    "flop",
    "second",
    "seconds",
}
COUNTED = {"parameters", "experts", "tokens", "ranks", "activations", "micro-batches"}
WORDS = "|".join(UNITS | COUNTED)


def short(path: Path) -> str:
    return str(path.relative_to(ROOT / "planner"))


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_module_says_what_it_is_for(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text, "no docstring"
    first = text.splitlines()[0]
    assert first.endswith((".", ":", "``")), f"the first line is no sentence: {first!r}"


@pytest.mark.parametrize("path", TECHNIQUES, ids=short)
def test_technique_has_the_five_headings_in_order(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    found = [line.partition(":")[0] for line in text.splitlines() if line.partition(":")[0] in HEADINGS]
    assert found == list(HEADINGS)
    for heading in HEADINGS:
        body = text.partition(f"\n{heading}:")[2].strip()
        assert body, f"{heading} is empty"


FUNCTIONS = [name for name in costs.__all__ if inspect.isfunction(getattr(costs, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_formula_names_its_unit(name):
    text = inspect.getdoc(getattr(costs, name)) or ""
    assert name.endswith(SUFFIXES) or re.search(WORDS, text, re.IGNORECASE), (
        "neither name nor docstring says the unit"
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_formula_has_an_example_that_runs(name):
    assert ">>> " in (inspect.getdoc(getattr(costs, name)) or "")


NO_PAPER_NEEDED = {
    "__init__",
    "arrays",
    "economics",
    "pipeline_bounds",
}  # types, definitions, proved where they stand


@pytest.mark.parametrize("path", sorted((ROOT / "planner" / "costs").glob("*.py")), ids=short)
def test_formulas_name_their_source(path):
    if path.stem not in NO_PAPER_NEEDED:
        assert re.search(r"arXiv:\d{4}\.\d{5}|section \d|https?://|Sources?: ", path.read_text())
