"""``planner train``: the best plans for a training job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from planner.cli.job import JobOptions
from planner.cli.options import Json, PlansFile, with_options
from planner.cli.train_options import TrainOptions

if TYPE_CHECKING:
    from planner.plans.plan import SearchResult
    from planner.solve.fleet import Fleet
    from planner.specs.problem import Problem


@with_options
def train(job: JobOptions, asked: TrainOptions, out: PlansFile = None, as_json: Json = False) -> None:
    """Find the best plans for a training job, with proof.

    With several --cluster, plans of all of them are ranked together by --objective. With --deadline, every
    number of nodes up to the one given is searched or excluded by a bound, until one finishes in time. With --layerwise, every
    layer may have a strategy of its own and stages any size; the plan is never slower than the best uniform one, and states
    what a better one could still gain; Ctrl-C ends the search with the best so far. With --degrees stage or layer, work may be
    cut otherwise in every stage or layer. On a cluster of several kinds of devices, stages may run each on one kind, with degrees
    and layers of their own. --explore searches the default space first, then what it opens slot by slot, then everything
    together, and says what it left when --time-limit was over.
    """
    from planner.cli.output import Stopped, json_text, plans_file, print_json
    from planner.cli.train_lengths import dealt_sequences, packed_job
    from planner.cli.train_search import chosen_search
    from planner.report.totals import document

    job, histogram = packed_job(job, asked.lengths)
    problems, top = asked.problems(job)
    searcher = chosen_search(problems, asked)
    with plans_file(out) as file:
        fleet, stopped = _searched(problems, top, searcher)
        if asked.pareto and not stopped:
            fleet = _with_front(fleet, problems)
        dealt = None if histogram is None else dealt_sequences(fleet, problems, histogram)
        if as_json or file is not None:
            content = document(fleet, problems) | ({"interrupted": True} if stopped else {})
            content |= {} if dealt is None else {"sequences": dealt}
        if file is not None:
            file.write(json_text(content) + "\n")
    if as_json:
        print_json(content)
    else:
        from planner.report.ranking import show_ranking

        show_ranking(fleet, problems, out)
        if dealt is not None:
            from planner.report.optimum import show_dealt

            show_dealt(dealt)
    if stopped:
        raise Stopped("these are the best plans so far", printed=True)


def _searched(
    problems: list[Problem], top: int, searcher: Callable[..., SearchResult] | None
) -> tuple[Fleet, bool]:
    """The plans, and whether the user stopped the search before its end.

    Raises:
        Stopped: before there was a plan.
    """
    from planner.cli.output import Stopped
    from planner.cli.progress import Progress
    from planner.cli.train_search import search_fleet
    from planner.errors import Interrupted
    from planner.solve.fleet import Fleet

    try:
        with Progress() as progress:
            return search_fleet(problems, top, progress, searcher), False
    except Interrupted as stop:
        if not isinstance(stop.best, Fleet):
            raise Stopped(stop.note or "before any plan was priced") from None
        return stop.best, True


def _with_front(fleet: Fleet, problems: list[Problem]) -> Fleet:
    """The fleet with the Pareto front of the best plan's cluster."""
    from planner.solve.front import pareto_front

    found = pareto_front(fleet.problem_of_best(problems), fleet.result.best)
    front = tuple(plan.as_dict() for plan in found)
    return fleet._replace(result=replace(fleet.result, pareto=front))
