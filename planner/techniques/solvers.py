"""Solvers by name: a technique's record says which one answers its problem, and none is loaded before a problem is there."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["solver"]


def solver(name: str, part: str = "") -> Callable[..., Any]:
    """A solver of :mod:`planner.solve.combinatorial`, or a part of what it finds.

    Args:
        name: ``module.function``.
        part: attribute of the answer; empty for the answer itself.

    >>> solver("peers.longest_first")({65.0: 2, 312.0: 1}, (1.0, 1.0))
    130.0
    """
    module, function = name.split(".")

    def solve(*problem: Any) -> Any:
        answer = getattr(import_module(f"planner.solve.combinatorial.{module}"), function)(*problem)
        return getattr(answer, part) if part else answer

    return solve
