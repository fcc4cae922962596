"""A search of choices that are left aside by default, widest last: an answer at any time, with a proof or a gap.

The product of all choices is some thousands of times the default space. So the default space comes first, then each slot that
opens alone beside it, then the slots whose new choices won together; their best plan is the bar for the whole product, which
leaves little of it to price. Who cannot wait has the best plan so far, by how much a better one could be faster at most, and
what was not searched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from time import perf_counter

import numpy as np

from planner.errors import Infeasible, Interrupted, SpecError
from planner.plans.plan import Optimality, Plan, SearchReport, SearchResult
from planner.solve.kernel_floor import kernel_floor_s
from planner.solve.space import Space
from planner.solve.train import search_until
from planner.specs.problem import Problem

__all__ = ["search_widening"]

_EVERYTHING = "all choices together"
_AT_ONCE = 8  # times the recipes of the default space: up to there, narrower searches first only take time


def search_widening(
    problem: Problem,
    top: int = 10,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    time_limit_s: float = np.inf,
) -> SearchResult:
    """The best plans where ``problem.explore`` opens choices: exact, or with a gap where the time was over before.

    Args:
        problem: what to plan.
        top: how many plans to return: the best one, and the best of what was found on the way.
        on_progress: called with (parts of the space done, parts in all), of one search after the other.
        time_limit_s: after which the best plans so far are returned; the first plan of all is waited for.

    Raises:
        SpecError: a fixed or forbidden choice is unknown.
        Infeasible: nothing fits; says what binds, by how much, and what would fit.
        Interrupted: the user pressed Ctrl-C; carries the best plans so far.
    """
    widening = _Widening(problem, top)
    try:
        widening.run(on_progress, perf_counter() + time_limit_s)
    except KeyboardInterrupt as stop:
        if isinstance(stop, Interrupted) and isinstance(stop.best, SearchResult):
            widening.take(stop.best)
        if not widening.plans:
            raise
        raise Interrupted(widening.result()) from None
    return widening.result()


class _Widening:
    """One search after the other, each under the bar of those before it."""

    def __init__(self, problem: Problem, top: int) -> None:
        self.problem, self.top, self.start_s = problem, top, perf_counter()
        self.opened, self.times = _opened(problem)
        self.won: list[str] = []
        self.done: set[str] = set()
        self.plans: list[Plan] = []
        self.report: SearchReport | None = None

    def run(self, on_progress: Callable[[int, int], None] | None, end_s: float) -> None:
        """Searches every space in turn, until the widest is done or the time is over."""
        for name, explore in self._spaces():
            if self.plans and perf_counter() > end_s:
                return
            narrow = replace(self.problem, explore=explore)
            before_s, finished = self.best_s, True
            try:
                found, finished = search_until(narrow, self.top, on_progress, before_s, end_s)
                self.take(found)
            except (Infeasible, SpecError):
                if name == _EVERYTHING and not self.plans:
                    raise
            if finished:
                self.done.add(name)
            if self.best_s < before_s < np.inf:
                self.won.append(name)

    def _spaces(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Names of spaces, and what opens in each."""
        if len(self.opened) > 1 and self.times > _AT_ONCE:
            yield "the default space", ()
            yield from self.opened.items()
            if 1 < len(self.won) < len(self.opened):
                yield " and ".join(self.won), tuple(glob for slot in self.won for glob in self.opened[slot])
        yield _EVERYTHING, self.problem.explore

    @property
    def best_s(self) -> float:
        """Step time of the best plan so far."""
        return self.plans[0].estimate.step_time_s if self.plans else np.inf

    def take(self, found: SearchResult) -> None:
        """Remembers plans, each once, and the account of the search that saw most."""
        known = {plan.id for plan in self.plans}
        self.plans += [plan for plan in found.plans if plan.id not in known]
        self.plans.sort(key=lambda plan: plan.estimate.step_time_s)
        del self.plans[self.top :]
        if self.report is None or found.search.candidates >= self.report.candidates:
            self.report = found.search

    def result(self) -> SearchResult:
        """What was found, and what is known of it."""
        assert self.report is not None
        report = replace(self.report, wall_s=perf_counter() - self.start_s)
        bound_s, notes = self.best_s, []
        if _EVERYTHING not in self.done:
            left = [name for name in (*self.opened, _EVERYTHING) if name not in self.done]
            bound_s = min(bound_s, kernel_floor_s(self.problem) / self.problem.cluster.devices)
            notes.append(
                f"Not searched to the end: {', '.join(left)}; the bound is all kernels at their best"
            )
        return SearchResult(tuple(_known(plan, bound_s) for plan in self.plans), report, notes=tuple(notes))


def _opened(problem: Problem) -> tuple[dict[str, tuple[str, ...]], float]:
    """Choices that a problem opens beyond the default ones, by slot, slots with few of them first; how many times the recipes of
    the default space they make."""
    plain, wide = Space(replace(problem, explore=())), Space(problem)
    found = {
        slot: tuple(f"{slot}={choice.value}" for choice in choices if choice not in plain.choices[slot])
        for slot, choices in wide.choices.items()
    }
    few_first = sorted(found, key=lambda slot: len(found[slot]))
    wider = prod(len(wide.choices[slot]) / len(plain.choices[slot]) for slot in found)
    return {slot: found[slot] for slot in few_first if found[slot]}, wider


def _known(plan: Plan, bound_s: float) -> Plan:
    """The plan, with what is known of it where no plan is faster than the bound."""
    gap = 1.0 - bound_s / plan.estimate.step_time_s
    status = "gap" if gap > 0.0 else "exact"
    return replace(
        plan, optimality=Optimality(status, gap, bound_s, plan.optimality.solver.partition(",")[0])
    )
