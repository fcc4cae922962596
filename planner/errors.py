"""The errors that a user can meet, as one tree.

::

    PlannerError
    ├─ SpecError      a file or an argument is wrong            exit 2
    ├─ InvalidPlan    a named plan breaks a composition rule    exit 2
    ├─ Infeasible     no plan satisfies the limits              exit 3
    ├─ SolverError    a solver failed or ran out of time        exit 4
    └─ ExportError    a launcher cannot express the plan        exit 5

Every error is a list of :class:`Problem`; each says where, what was found, what was expected and what to try.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

__all__ = [
    "ExportError",
    "Infeasible",
    "Interrupted",
    "InvalidPlan",
    "PlannerError",
    "Problem",
    "SolverError",
    "SpecError",
    "did_you_mean",
]


class Problem(NamedTuple):
    """One thing that is wrong: ``where`` (file, key path, flag), what was ``found``, what was ``expected``, what to ``try_``."""

    where: str
    found: str
    expected: str = ""
    try_: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.found}"
        if self.expected:
            text += f"; expected {self.expected}"
        if self.try_:
            text += f". {self.try_}"
        return text

    def as_dict(self) -> dict[str, str]:
        """The problem as JSON fields."""
        return {"where": self.where, "found": self.found, "expected": self.expected, "try": self.try_}


class PlannerError(Exception):
    """Base of every error that a user's input can cause; carries all problems at once."""

    kind = "error"
    exit_code = 70

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))

    def as_dict(self) -> dict[str, object]:
        """The error as the JSON object that ``--json`` prints."""
        return {"error": {"kind": self.kind, "problems": [p.as_dict() for p in self.problems]}}


class SpecError(PlannerError):
    """A file, a name or an argument is wrong."""

    kind = "spec"
    exit_code = 2


class InvalidPlan(PlannerError):
    """A plan that the user named breaks a composition rule."""

    kind = "invalid_plan"
    exit_code = 2


class Infeasible(PlannerError):
    """No plan satisfies the limits; the problems name what binds, by how much, and the nearest change that fits."""

    kind = "infeasible"
    exit_code = 3


class SolverError(PlannerError):
    """A solver failed or ran out of time."""

    kind = "solver"
    exit_code = 4


class ExportError(PlannerError):
    """A launcher cannot express a feature of the plan."""

    kind = "export"
    exit_code = 5


class Interrupted(KeyboardInterrupt):
    """The user stopped a search (no :class:`PlannerError`: nothing is wrong).

    ``best`` is the result so far, if any; ``note`` says in words what is known without one.
    """

    def __init__(self, best: object = None, note: str = "") -> None:
        self.best, self.note = best, note
        super().__init__("interrupted")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest known spellings, or the empty string.

    >>> did_you_mean("micro_batch", ["micro_batch_size", "pp"])
    'Did you mean micro_batch_size?'
    """
    from difflib import get_close_matches

    close = get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(close)}?" if close else ""
