"""How a search of a large space ended: what excluded its parts, what is left of it, and what that proves of a plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from time import perf_counter

from planner.errors import Infeasible, Problem, SolverError
from planner.plans.plan import Optimality

__all__ = ["Account"]


@dataclass(slots=True)
class Account:
    """The account of a branch and bound over parts of a space.

    Attributes:
        solver: of what is chosen within a part.
        space: what is searched, in words.
        parts: what the space falls into: meshes layer by layer, shapes (orders and numbers of stages) over node groups.
        excluded: parts or their deals by what excluded them: ``work`` (all devices' work without any limit of memory),
            ``memory`` (the same with their budgets), ``stages`` (the dearest stage of every partition).
        settled: parts whose strategies were chosen and priced by the schedule engine.
        open: parts whose bound is below the best plan's step time at the end.
        bound_s: no plan of the space is faster.
        wall_s: of this search alone.
        stopped: why it ended before it was done: ``time``, ``interrupted``, or not at all.
    """

    solver: str
    space: str
    parts: int = 0
    excluded: dict[str, int] = field(default_factory=dict)
    settled: int = 0
    open: int = 0
    bound_s: float = 0.0
    wall_s: float = 0.0
    stopped: str = ""

    def exclude(self, reason: str, count: int = 1) -> None:
        """Counts what a bound excluded."""
        self.excluded[reason] = self.excluded.get(reason, 0) + count

    def add(self, other: Account) -> None:
        """Counts what the search of another part of the space counted."""
        self.parts += other.parts
        self.settled += other.settled
        self.stopped = other.stopped or self.stopped
        for reason, count in other.excluded.items():
            self.exclude(reason, count)

    def late(self, end_s: float) -> bool:
        """Whether the clock is past an end, which the account then says."""
        if perf_counter() > end_s:
            self.stopped = "time"
        return bool(self.stopped)

    def close(self, bounds_s: Iterable[float], best_s: float, start_s: float) -> None:
        """Says what is left, by the bounds of all parts that no bound has excluded."""
        below = [bound_s for bound_s in bounds_s if bound_s < best_s]
        self.open, self.bound_s = len(below), min(below, default=best_s)
        self.wall_s = perf_counter() - start_s

    def proved(self, step_s: float, others: Optimality | None = None) -> Optimality:
        """What is known of a plan; ``others`` is what is known of plans outside the space."""
        known = [self.bound_s] + ([] if others is None or others.bound_s is None else [others.bound_s])
        bound_s = min(step_s, *known)
        gap = (step_s - bound_s) / step_s
        return Optimality(
            "gap" if gap else "exact", gap, bound_s, f"branch and bound over {self.space} ({self.solver})"
        )

    def failure(self, refusal: Infeasible) -> Infeasible | SolverError:
        """What to say where nothing was found, and no plan of a smaller space fits: so much alone, if the time was over."""
        if not self.stopped:
            return refusal
        found = f"is over before a plan was found that fits, or before it is sure that none does; {refusal.problems[0].found}"
        return SolverError(
            Problem("--time-limit", found, "more time", "With --time-limit none the search goes to its end.")
        )
