"""Several clusters: what each comes to, and the plans of all of them ranked together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from planner.costs.economics import tokens_run_s
from planner.errors import Infeasible, Interrupted
from planner.errors import Problem as Fault
from planner.plans.plan import Plan, SearchReport, SearchResult
from planner.solve.train import search_strictly
from planner.specs.problem import Problem

__all__ = [
    "Attempt",
    "Fleet",
    "OnProgress",
    "merged",
    "nothing",
    "objective_value",
    "run_s",
    "search_clusters",
]

OnProgress = Callable[[int, int], None]


class Attempt(NamedTuple):
    """One cluster that was tried: its best plan's step and run time, or why there is none.

    Attributes:
        cluster, devices: which.
        step_time_s: of its best plan; None where there is none, or none was looked for.
        run_s: of the whole run under that plan; None without a plan or a number of tokens.
        outcome: in words.
        excluded_by: what shows that it is of no use: ``kernel time`` or ``step time`` (a bound of theirs), ``no plan`` (none is
            valid and fits), ``no mesh`` (nor, perhaps, such a cluster); empty where its best plan is known.
        run_at_least_s: what was proved of the run, where a bound excluded the cluster.
        smaller_too: how many smaller sizes the same proof excludes.
        usd_per_step, joules_per_step: of its best plan, over all devices; None without a plan or a price.
    """

    cluster: str
    devices: int
    step_time_s: float | None
    run_s: float | None
    outcome: str
    excluded_by: str = ""
    run_at_least_s: float | None = None
    smaller_too: int = 0
    usd_per_step: float | None = None
    joules_per_step: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The attempt as JSON fields."""
        return self._asdict()


class Fleet(NamedTuple):
    """Ranked plans of all clusters together, and what each cluster came to."""

    result: SearchResult
    attempts: tuple[Attempt, ...]

    def problem_of_best(self, problems: Sequence[Problem]) -> Problem:
        """The problem that the best plan solves; the first where its cluster is a smaller one than any problem's."""
        best = self.result.best
        return next((p for p in problems if p.cluster.name == best.cluster), problems[0])


def objective_value(plan: Plan, objective: str) -> float:
    """What a ranking minimises: seconds, dollars, joules or device hours of one optimizer step."""
    estimate = plan.estimate
    if objective == "usd":
        assert estimate.usd_per_step is not None
        return estimate.usd_per_step
    if objective == "energy":
        return estimate.joules_per_step
    return estimate.step_time_s * (plan.devices / 3600.0 if objective == "gpu_hours" else 1.0)


def search_clusters(
    problems: Sequence[Problem],
    top: int = 10,
    on_progress: OnProgress | None = None,
    searcher: Callable[[Problem, int, OnProgress | None], SearchResult] | None = None,
) -> Fleet:
    """Searches every cluster and ranks all plans by the objective; ``searcher`` finds the plans of one.

    Raises:
        SpecError: a fixed or forbidden choice is unknown.
        Infeasible: nothing fits on any cluster.
        Interrupted: the user pressed Ctrl-C; carries what was found so far.
    """
    found: list[SearchResult] = []
    attempts: list[Attempt] = []
    faults: list[Fault] = []
    objective = problems[0].objective
    for problem in problems:
        try:
            found.append((searcher or search_strictly)(problem, top, on_progress))
            attempts.append(planned(problem, found[-1].best, "searched"))
        except Infeasible as error:
            faults += error.problems
            attempts.append(nothing(problem, error))
        except Interrupted as stop:
            found += [stop.best] if isinstance(stop.best, SearchResult) else []
            if not found:
                raise
            raise Interrupted(Fleet(merged(found, objective, top), tuple(attempts))) from None
    if not found:
        raise Infeasible(faults)
    return Fleet(merged(found, objective, top), tuple(attempts))


def planned(problem: Problem, plan: Plan, outcome: str) -> Attempt:
    """A cluster and its best plan."""
    estimate = plan.estimate
    run = None if problem.workload.tokens is None else run_s(problem, estimate.step_time_s)
    return Attempt(
        plan.cluster, plan.devices, estimate.step_time_s, run, outcome,
        usd_per_step=estimate.usd_per_step, joules_per_step=estimate.joules_per_step,
    )  # fmt: skip


def nothing(problem: Problem, error: Infeasible) -> Attempt:
    """A cluster on which no plan is valid and fits."""
    return Attempt(
        problem.cluster.name, problem.cluster.devices, None, None, error.problems[0].found, "no plan"
    )


def run_s(problem: Problem, step_s: float) -> float:
    """Seconds of a run of ``workload.tokens`` (which must be given) in steps of ``step_s``."""
    assert problem.workload.tokens is not None
    return float(tokens_run_s(problem.workload.tokens, problem.workload.tokens_per_step, step_s))


def merged(results: Sequence[SearchResult], objective: str, top: int) -> SearchResult:
    """All plans ranked together, and the searches' accounts added up."""
    if len(results) == 1:
        return results[0]
    plans = [plan for result in results for plan in result.plans]
    plans.sort(key=lambda plan: objective_value(plan, objective))
    reports = [result.search for result in results]

    def added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
        total: Counter[str] = Counter()
        for count in counts:
            total.update(count)
        return dict(sorted(total.items()))

    report = SearchReport(
        candidates=sum(r.candidates for r in reports),
        scored=sum(r.scored for r in reports),
        repriced=sum(r.repriced for r in reports),
        excluded_by_bound=added(r.excluded_by_bound for r in reports),
        rejected=added(r.rejected for r in reports),
        wall_s=sum(r.wall_s for r in reports),
    )
    pareto = tuple(point for result in results for point in result.pareto)
    notes = tuple(dict.fromkeys(note for result in results for note in result.notes))
    return SearchResult(tuple(plans[:top]), report, pareto, notes)
