"""Plans in files: ``plans.json:2``, ``plans.json:ID``, or a file that holds one plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from planner.errors import Problem, SpecError

if TYPE_CHECKING:
    from planner.plans.plan import Plan

__all__ = ["PLAN_HELP", "read_plan", "split_reference"]

PLAN_HELP = "FILE, FILE:NUMBER (from 1) or FILE:ID."


def read_plan(reference: str) -> Plan:
    """The plan that a reference names.

    Raises:
        SpecError: no such file or plan.
    """
    from planner.plans.plan import Plan

    return Plan.from_json(*split_reference(reference))


def split_reference(reference: str) -> tuple[str, str]:
    """The file and the number or id that a reference names.

    Raises:
        SpecError: it is none.
    """
    path, colon, which = reference.rpartition(":")
    if not colon or _exists(reference):
        path, which = reference, "1"
    if not path or not which:
        raise SpecError(Problem("PLAN", repr(reference), "FILE, FILE:NUMBER or FILE:ID"))
    return path, which


def _exists(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False
