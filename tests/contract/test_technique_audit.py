"""Every technique of training that counts has a published figure in tests/paper, and a test in which it is chosen.

The table is read off the tests themselves: figures by technique, cases of reach by choice, and the marker ``reaches``.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from planner.technique import Technique, catalogue, discover
from tests.paper.test_figures import FIGURES
from tests.unit.test_presets import PRESETS
from tests.unit.test_reach import CASES as CHOSEN
from tests.unit.test_reach_list import CASES as ASKED
from tests.unit.test_reach_list import REASONS
from tests.unit.test_schedule_reach import CASES as SCHEDULES

TESTS = Path(__file__).parents[1]
COUNTED = {key: t for key, t in discover("training").items() if t.kind != "baseline"}


def marked() -> dict[str, str]:
    """Techniques by the test that is marked with them."""
    found: dict[str, str] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.reaches":
                    names = [argument.value for argument in mark.args if isinstance(argument, ast.Constant)]
                    found |= {str(name): f"{path.relative_to(TESTS)}::{node.name}" for name in names}
    return found


def reached(technique: Technique) -> list[str]:
    """Tests in which a technique is chosen."""
    values = {f"{technique.slot}={choice}" for choice in technique.choices}
    by_choice = {
        "unit/test_reach.py": {case.choice for case in CHOSEN},
        "unit/test_reach_list.py": {case.choice for case in ASKED},
        "unit/test_schedule_reach.py": {f"schedule={case.schedule}" for case in SCHEDULES},
    }
    tests = [
        f"{file}[{choice}]" for file, choices in by_choice.items() for choice in sorted(choices & values)
    ]
    if technique.key in PRESETS:
        tests.append(f"unit/test_presets.py[{technique.key}]")
    return [*tests, *([MARKED[technique.key]] if technique.key in MARKED else [])]


MARKED = marked()
TABLE = {
    key: (
        [f"paper/test_figures.py[{f.what}]" for t, f in (p.values for p in FIGURES) if t is technique],
        reached(technique),
    )
    for key, technique in COUNTED.items()
}


@pytest.mark.parametrize("key", TABLE)
def test_a_technique_reproduces_a_published_figure_and_is_chosen(key: str) -> None:
    figures, chosen = TABLE[key]
    assert figures, "no published figure"
    assert bool(chosen) != (key in REASONS), "chosen nowhere, and no reason says why; or both"


def test_marks_name_techniques() -> None:
    assert set(MARKED) <= set(COUNTED)


def test_what_is_not_modelled_is_declared_with_its_reason() -> None:
    declared = {
        t.key: t.summary for t in catalogue().values() if t.job == "training" and t.status == "declared"
    }
    assert set(declared) == {"colossal_ai", "deepum", "gnnpipe"}
    assert all(reason.startswith(("covered by", "out of scope")) for reason in declared.values())
    assert len(COUNTED) >= 157
