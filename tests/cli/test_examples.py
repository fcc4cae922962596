"""Every script in ``examples`` runs, and prints what it promises; every benchmark that is quoted says what is quoted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from planner import load_cluster

ROOT = Path(__file__).resolve().parents[2]
PROMISES = {
    "search_plans.py": r"(?m)^\d\.\d{3} s .* \(exact\)$[\s\S]*candidates, .* priced by the schedule engine\n +[\d,]+  \S",
    "compare_clusters.py": r"a100-sxm-80gb:16x8: [\d.]+ days, [\d,]+ USD[\s\S]*h100-sxm:8x8: [\d.]+ days, [\d,]+ USD",
    "custom_cluster.py": r"23\.00 GB/s .* s with [\s\S]*1\.44 GB/s .* s with ",
    "huggingface_config.py": r"16 layers of width 2048\n[\d.]+ s per step, [\d.]+% MFU\n +[\d.]+ GB  peak",
}


def output(path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    run = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert not run.stderr
    return run.stdout


def test_every_example_is_tried():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(PROMISES)


def test_every_example_is_said_to_show_something():
    page = (ROOT / "examples" / "README.md").read_text()
    assert [path.name for path in (ROOT / "examples").iterdir() if f"({path.name}" not in page] == [
        "README.md"
    ]


@pytest.mark.parametrize("name", PROMISES)
def test_example_prints_what_it_promises(name):
    assert re.search(PROMISES[name], output(ROOT / "examples" / name))


def test_slow_network_is_what_its_comment_says():
    """One 100 Gb/s NIC shared by eight devices: 12.5e9 / 8 bytes per second each, before efficiency."""
    tier = load_cluster(ROOT / "examples" / "slow_network.toml").tiers[-1]
    assert tier.bytes_per_s == pytest.approx(12.5e9 / 8)


def test_accuracy_page_shows_what_the_sanity_script_prints():
    """The table of predicted against measured times is not edited by hand: a changed prediction shows up here."""
    table = output(ROOT / "benchmarks" / "sanity_korthikanti.py").strip()
    assert table in (ROOT / "docs" / "accuracy.md").read_text()
    assert table in (ROOT / "README.md").read_text()
