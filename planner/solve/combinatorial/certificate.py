"""What is proved of an answer: its value, a bound that no answer beats, who found both, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

__all__ = ["Certificate", "Clock", "certify"]

_ROUNDING = (
    1e-9  # values and bounds are sums of many floats; closer than this, relative to the value, they are equal
)


@dataclass(frozen=True, slots=True)
class Certificate:
    """The proof beside an answer of a minimisation.

    Attributes:
        status: ``exact`` (nothing is better), or ``gap`` (nothing is better by more than ``gap``).
        value: the answer's objective, in the problem's unit.
        bound: a valid lower bound of every answer.
        gap: (value − bound) / value.
        solver: what found the answer and the bound.
        wall_s: how long it took.
        notes: what was reduced or excluded on the way, by name.
    """

    status: Literal["exact", "gap"]
    value: float
    bound: float
    gap: float
    solver: str
    wall_s: float
    notes: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The certificate as JSON fields."""
        return {
            "status": self.status, "value": self.value, "bound": self.bound, "gap": self.gap, "solver": self.solver,
            "wall_s": self.wall_s, "notes": dict(self.notes),
        }  # fmt: skip


class Clock:
    """Seconds since a solver began, and how many are left of its limit (None: no limit)."""

    def __init__(self, limit_s: float | None = None) -> None:
        self._start_s, self._limit_s = perf_counter(), limit_s

    @property
    def spent_s(self) -> float:
        """Seconds since the start."""
        return perf_counter() - self._start_s

    @property
    def left_s(self) -> float | None:
        """Seconds to the limit, never below zero; None without one."""
        return None if self._limit_s is None else max(self._limit_s - self.spent_s, 0.0)

    @property
    def over(self) -> bool:
        """Whether the limit has passed."""
        return self.left_s == 0.0


def certify(
    value: float, bound: float, solver: str, clock: Clock, notes: dict[str, int] | None = None
) -> Certificate:
    """The certificate of a value and a bound; they are equal where they differ by rounding alone.

    >>> certify(4.0, 3.0, "by hand", Clock()).gap
    0.25
    >>> certify(4.0, 4.0 - 1e-12, "by hand", Clock()).status
    'exact'
    """
    gap = (value - bound) / abs(value) if value else float(bound < 0.0)
    if gap <= _ROUNDING:
        return Certificate("exact", value, value, 0.0, solver, clock.spent_s, notes or {})
    return Certificate("gap", value, bound, gap, solver, clock.spent_s, notes or {})
