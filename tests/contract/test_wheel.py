"""What is built is what was written: a wheel installed on its own finds all of its data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from planner.specs.cluster_file import list_clusters
from planner.specs.device_file import list_devices
from planner.specs.models import list_models

ROOT = Path(__file__).resolve().parents[2]
LOAD_EVERYTHING = """
import json
from pathlib import Path
import planner
from planner.specs.cluster_file import list_clusters, load_cluster
from planner.specs.device_file import list_devices, load_device
from planner.specs.models import list_models, load_model
from planner.specs.stack import load_stack

found = {"devices": list_devices(), "clusters": list_clusters(), "models": list_models()}
for load, names in ((load_device, "devices"), (load_cluster, "clusters"), (load_model, "models")):
    for name in found[names]:
        load(name)
load_stack()
print(json.dumps({**found, "typed": (Path(planner.__file__).parent / "py.typed").is_file(), "home": planner.__file__}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_finds_every_profile_and_model(tmp_path):
    pytest.importorskip("hatchling")
    flags = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", ".", *flags, "--wheel-dir", tmp_path, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=tmp_path,
    )

    found = json.loads(run(python, "-I", "-c", LOAD_EVERYTHING, cwd=tmp_path))

    assert found["home"].startswith(str(tmp_path)), "the checkout was imported, not the wheel"
    assert found["typed"]
    assert found["devices"] == list_devices()
    assert found["clusters"] == list_clusters()
    assert found["models"] == list_models()
