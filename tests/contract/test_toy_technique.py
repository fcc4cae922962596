"""A technique of somebody else's: one file with a record, found by its entry point, changes the ranking."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TOY = '''
"""Toy: a magic cable that halves what tensor-parallel collectives carry."""

from planner.ledger import Collective, times
from planner.technique import Technique


def apply(ledger, ctx):
    def halved(item):
        return item.but(size=times(item.size, "/2"), by="toy") if item.group.name == "tp" else None

    return ledger.edit(Collective, halved)


TECHNIQUE = Technique(
    key="toy",
    name="Magic cable",
    slot="cuda_graph",
    choices=("magic",),
    source="https://example.org/toy",
    summary="Half of every message",
    apply=apply,
    active=lambda ctx: ctx.mesh.tp > 1,
)
'''
COMMAND = ("train", "--model", "llama2-7b", "--cluster", "a100-sxm-80gb:1x8", "--global-batch", "8", "--seq-len", "4096",
           "--fix", "tp=8", "--top", "1", "--json")  # fmt: skip


def best(path: Path) -> dict:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(path)])}
    done = subprocess.run(
        [sys.executable, "-m", "planner", *COMMAND],
        capture_output=True,
        text=True,
        env=env,
        cwd=path,
        check=True,
    )
    return json.loads(done.stdout)["plans"][0]


def test_a_record_in_an_entry_point_is_searched_like_any_other(tmp_path):
    plain = best(tmp_path)
    assert plain["knobs"]["cuda_graph"] != "magic"
    (tmp_path / "toy_cable.py").write_text(TOY)
    info = tmp_path / "toy_cable-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-cable\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[planner.techniques]\ntoy = toy_cable:TECHNIQUE\n")
    chosen = best(tmp_path)
    assert chosen["knobs"]["cuda_graph"] == "magic"
    assert chosen["estimate"]["step_time_s"] < plain["estimate"]["step_time_s"]
