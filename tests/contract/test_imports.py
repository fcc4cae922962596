"""Imports point one way, and what a technique may know is little."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From what knows nothing of the others to what knows them all. A module belongs to the longest name that fits, and may
# import from its own layer and from those before it.
LAYERS = (
    "errors",
    "units",
    "costs",
    "specs",
    "engine.kernels",
    "ledger",
    "mesh",
    "load",
    "schedule.order",
    "schedule.board",
    "technique",
    "operators",
    "operators.baseline",
    "serving.composition",
    "engine.kernel_prices",
    "engine.phases",
    "engine.shared_links",
    "engine",
    "schedule",
    "solve.combinatorial",
    "solve.passes",
    "solve.graph",
    "techniques",
    "serving.iteration",
    "pipeline.layout",
    "pipeline",
    "pipeline.step_time",
    "plans.attribution",
    "plans",
    "plans.form",
    "plans.plan",
    "uncertainty",
    "solve.space",
    "pipeline.place",
    "pipeline.transition",
    "pipeline.assignment",
    "plans.parts",
    "plans.device_memory",
    "plans.assemble",
    "plans.holdings",
    "solve",
    "serving",
    "export",
    "report",
    "validation",
    "calibration",
    "cli",
    "__main__",
)
DISCOVERY = ("technique", "techniques")  # walks the package when first asked for its records
WITHIN_REACH_OF_A_PASS = {"costs", "specs", "ledger", "mesh", "technique", "techniques"}
WITHIN_REACH_OF_AN_ORDER = {"schedule.order", "schedule.board"}  # what runs after what, and no price either


def modules():
    for path in sorted((ROOT / "planner").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name != "planner":
            yield name.removeprefix("planner."), ast.parse(path.read_text())


def layer(module: str) -> str:
    fitting = [name for name in LAYERS if module == name or module.startswith(f"{name}.")]
    assert fitting, f"planner.{module} has no place among the layers"
    return max(fitting, key=len)


def imports(tree: ast.AST, *, lazy: bool) -> set[str]:
    """Modules of planner that a module imports when it is loaded (with ``lazy``: or later); not those for types alone."""
    found: set[str] = set()
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "planner":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                inside = ROOT.joinpath(*name.split("."))
                found.add(name if inside.is_dir() or inside.with_suffix(".py").exists() else str(node.module))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("planner.")}
        stack.extend(ast.iter_child_nodes(node))
    return {name.removeprefix("planner.") for name in found if name != "planner"}


TREES = dict(modules())


@pytest.mark.parametrize("module", TREES)
def test_imports_point_one_way(module):
    own = layer(module)
    for name in imports(TREES[module], lazy=True):
        other = layer(name)
        assert (own, other) == DISCOVERY or LAYERS.index(other) <= LAYERS.index(own), (
            f"{module} imports {name}"
        )


def test_modules_form_no_cycle():
    graph = {module: imports(tree, lazy=False) & TREES.keys() for module, tree in TREES.items()}
    while free := [module for module, needs in graph.items() if not needs]:
        graph = {module: needs - set(free) for module, needs in graph.items() if module not in free}
    assert graph == {}


def test_passes_know_the_ledger_and_no_price():
    for module, tree in TREES.items():
        if layer(module) == "techniques":
            composes = module.startswith("techniques.training.schedule.")
            reach = WITHIN_REACH_OF_A_PASS | (WITHIN_REACH_OF_AN_ORDER if composes else set())
            assert {layer(name) for name in imports(tree, lazy=False)} <= reach, module


def test_specs_and_costs_do_not_know_each_other():
    for module, tree in TREES.items():
        if layer(module) in ("specs", "costs"):
            known = {layer(name) for name in imports(tree, lazy=True)}
            assert known <= {layer(module), "errors", "units"}, module


def test_no_layer_is_left_over():
    assert {layer(module) for module in TREES} == set(LAYERS)
