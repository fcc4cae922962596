"""The package as its users meet it: public names, cheap imports, modules that read in one sitting."""

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import planner

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "planner").rglob("*.py"))
MOST_LINES = 450
VAGUE = {"utils", "util", "misc", "common", "helpers", "helper", "manager", "stuff"}
HEAVY = {"scipy", "networkx", "pulp", "rich", "typer", "jax", "pandas"}
SMALL_SEARCH = """
from planner import Problem, TrainWorkload, load_cluster, load_model, load_stack, search
job = TrainWorkload(global_batch_size=16, seq_len=1024)
search(Problem(load_model("gpt2"), load_cluster("a100-sxm-80gb:1x2"), job, load_stack()), top=1)
"""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def loaded_after(code: str) -> set[str]:
    """Modules of a fresh interpreter once it has run ``code``."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT, timeout=120
    )
    return set(json.loads(run.stdout.splitlines()[-1]))


# -- public names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["planner", "planner.costs"])
def test_every_public_name_is_there_once(package):
    module = importlib.import_module(package)
    assert len(module.__all__) == len(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_all_is_complete():
    assert set(planner._HOMES) == set(planner.__all__)
    source = ast.parse((ROOT / "planner" / "costs" / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(source) if isinstance(node, ast.ImportFrom)]
    typed = {name.name for node in imports if node.module.startswith("planner.") for name in node.names}
    assert typed == set(importlib.import_module("planner.costs").__all__)


def test_every_formula_of_the_cost_modules_is_public():
    costs = importlib.import_module("planner.costs")
    for path in (ROOT / "planner" / "costs").glob("*.py"):
        module = importlib.import_module(f"planner.costs.{path.stem}")
        if path.stem not in ("__init__", "arrays"):
            assert set(module.__all__) <= set(costs.__all__), path.name


def test_no_public_name_is_a_module_s():
    """Importing a sub-package sets an attribute of that name, and would replace the public object."""
    modules = {path.stem for path in (ROOT / "planner").iterdir()}
    assert set(planner.__all__) & modules == {"costs"}


def test_version_is_that_of_the_distribution_and_of_the_changelog():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == planner.__version__
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## [{planner.__version__}]" in changes


# -- imports cost what they must ---------------------------------------------------------------------------------


def test_import_alone_loads_no_dependency():
    assert not loaded_after("import planner") & (HEAVY | {"numpy"})


def test_costs_needs_numpy_alone():
    loaded = loaded_after("import planner.costs")
    foreign = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    own = {name for name in loaded if name.startswith("planner.") and not name.startswith("planner.costs")}
    assert not foreign & HEAVY
    assert not own


def test_search_loads_neither_solvers_nor_terminal_tools():
    assert not {name.partition(".")[0] for name in loaded_after(SMALL_SEARCH)} & HEAVY


def test_help_loads_no_solver():
    loaded = loaded_after("from planner.cli import main\nassert main(['--help']) == 0")
    assert not {name.partition(".")[0] for name in loaded} & {"scipy", "networkx", "pulp", "numpy"}


# -- modules -----------------------------------------------------------------------------------------------------


def test_modules_read_in_one_sitting():
    lines = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_no_module_has_a_vague_name():
    parts = {part for path in MODULES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert parts & VAGUE == set()
