"""Analytical cost model and auto-parallel planner for training and serving foundation models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner import costs
    from planner.errors import ExportError, Infeasible, InvalidPlan, PlannerError, SolverError, SpecError
    from planner.plans.plan import Plan, SearchResult
    from planner.serving.plan import ServePlan, ServeResult
    from planner.serving.serve import serve
    from planner.solve.named import estimate, examine
    from planner.solve.train import search
    from planner.specs.hardware import load_cluster, load_device
    from planner.specs.models import load_model
    from planner.specs.problem import Problem
    from planner.specs.serve_problem import ServeProblem
    from planner.specs.stack import load_stack
    from planner.specs.traffic import Traffic
    from planner.specs.workload import TrainWorkload

__version__ = "0.1.0"

_HOMES = {
    "ExportError": "planner.errors",
    "Infeasible": "planner.errors",
    "InvalidPlan": "planner.errors",
    "Plan": "planner.plans.plan",
    "PlannerError": "planner.errors",
    "Problem": "planner.specs.problem",
    "SearchResult": "planner.plans.plan",
    "ServePlan": "planner.serving.plan",
    "ServeProblem": "planner.specs.serve_problem",
    "ServeResult": "planner.serving.plan",
    "SolverError": "planner.errors",
    "SpecError": "planner.errors",
    "Traffic": "planner.specs.traffic",
    "TrainWorkload": "planner.specs.workload",
    "costs": "planner",
    "estimate": "planner.solve.named",
    "examine": "planner.solve.named",
    "load_cluster": "planner.specs.hardware",
    "load_device": "planner.specs.hardware",
    "load_model": "planner.specs.models",
    "load_stack": "planner.specs.stack",
    "search": "planner.solve.train",
    "serve": "planner.serving.serve",
}

__all__ = [
    "ExportError",
    "Infeasible",
    "InvalidPlan",
    "Plan",
    "PlannerError",
    "Problem",
    "SearchResult",
    "ServePlan",
    "ServeProblem",
    "ServeResult",
    "SolverError",
    "SpecError",
    "Traffic",
    "TrainWorkload",
    "costs",
    "estimate",
    "examine",
    "load_cluster",
    "load_device",
    "load_model",
    "load_stack",
    "search",
    "serve",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that ``planner --help`` imports next to nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'planner' has no attribute {name!r}")
    from importlib import import_module

    home = _HOMES[name]
    value = import_module(f"{home}.{name}") if home == "planner" else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
