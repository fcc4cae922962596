"""Jobs that no plan does within the chance of running out of memory that is accepted: the best at any risk, and a word on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planner.errors import Infeasible
from planner.plans.plan import SearchResult
from planner.specs.problem import Problem

__all__ = ["at_any_risk", "said"]


def at_any_risk(problems: Sequence[Problem], refusal: Infeasible) -> list[Problem]:
    """The problems without a limit of the chance, of which no plan was found with it.

    Raises:
        Infeasible: ``refusal``, where no problem had a limit.
    """
    if all(problem.max_oom_risk >= 1.0 for problem in problems):
        raise refusal
    return [replace(problem, max_oom_risk=1.0) for problem in problems]


def said(result: SearchResult, asked: Problem) -> SearchResult:
    """The result, saying that it is of a search at any risk where less was asked for."""
    told = (
        f"No plan keeps the chance of running out of memory at {asked.max_oom_risk:.3g} or less (--max-oom-risk): these "
        "are the best at any risk"
    )
    return replace(result, notes=(*result.notes, told))
