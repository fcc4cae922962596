"""Did an export change? Committed plans go in, committed files must come out; the diff is the review.

After an intended change: ``python tests/golden/test_exports.py`` writes the files anew.
"""

from pathlib import Path

import pytest

from planner.export import export
from planner.plans.plan import Plan

EXPORTS = Path(__file__).parent / "exports"
CASES = [
    ("dense-interleaved-fp8", "megatron"),
    ("experts-uneven", "megatron"),
    ("sharded-weights", "megatron"),
    ("sharded-weights", "torchrun"),
]


def exported(name: str, to: str) -> dict[str, str]:
    files = export(Plan.from_json(EXPORTS / name / "plan.json"), to)
    return {file: text for file, text in files.items() if file != "plan.json"}


@pytest.mark.parametrize(("name", "to"), CASES)
def test_exports_are_as_committed(name, to):
    for file, text in exported(name, to).items():
        assert text == (EXPORTS / name / to / file).read_text(encoding="utf-8"), f"{name}: {file}"


@pytest.mark.parametrize(("name", "to"), CASES)
def test_the_exported_plan_is_the_plan(name, to, tmp_path):
    plan = Plan.from_json(EXPORTS / name / "plan.json")
    (tmp_path / "plan.json").write_text(export(plan, to)["plan.json"], encoding="utf-8")
    assert Plan.from_json(tmp_path / "plan.json") == plan


def test_no_committed_export_is_stale():
    files = (path for path in EXPORTS.rglob("*") if path.is_file() and path.suffix != ".pyc")
    committed = {path.relative_to(EXPORTS).as_posix() for path in files}
    expected = {f"{name}/{to}/{file}" for name, to in CASES for file in exported(name, to)}
    assert committed == expected | {f"{name}/plan.json" for name, _ in CASES}


if __name__ == "__main__":
    for name, to in CASES:
        for file, text in exported(name, to).items():
            (EXPORTS / name / to).mkdir(exist_ok=True)
            (EXPORTS / name / to / file).write_text(text, encoding="utf-8")
