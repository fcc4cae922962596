"""Exported plans, judged by the launchers' own parsers; benchmarks/launchers.py tries hundreds in the same way.

Needs the extra ``launchers`` (and hetu-galvatron for its test); skipped where they are not installed.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLANS = 12


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("accelerate", "accelerate"),
        ("deepspeed", "deepspeed"),
        ("transformers", "transformers"),
        ("galvatron", "galvatron"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_launcher_takes_what_was_exported(name, package, monkeypatch):
    pytest.importorskip(package, reason=f"{package} is not installed (extra launchers)")
    monkeypatch.syspath_prepend(str(ROOT))
    kept = {key: module for key, module in sys.modules.items() if key.partition(".")[0] == "galvatron"}
    from benchmarks.launchers import draw_plans, export, notices_a_slip, read_back, validator
    from planner.export.readers import READERS

    judge = validator(name)
    try:
        for plan in draw_plans(name, PLANS):
            files = export(plan, name)
            assert judge.refusal(files, plan) == ""
            assert notices_a_slip(name, judge, files, plan)
            assert name not in READERS or read_back(name, files, plan) == ""
    finally:
        sys.modules.update(kept)
