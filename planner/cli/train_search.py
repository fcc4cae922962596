"""Which search the options of ``planner train`` ask for, and how long it may take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from planner.cli.values import optional_quantity, raise_if_any
from planner.errors import Problem as Fault
from planner.errors import did_you_mean

if TYPE_CHECKING:
    from planner.cli.train_options import TrainOptions
    from planner.plans.plan import SearchResult
    from planner.solve.fleet import Fleet
    from planner.specs.problem import Problem

__all__ = ["chosen_search", "search_fleet"]

_DEGREES = ("plan", "stage", "layer")
_STAGES = ("uneven", "even")
_TIME_LIMIT = "10s"
_EXPLORATION = "60s"


def chosen_search(problems: Sequence[Problem], asked: TrainOptions) -> Callable[..., SearchResult] | None:
    """What searches a cluster layer by layer, over degrees and node groups that differ, or over choices that are left aside
    otherwise; None where nothing of it is wanted.

    Raises:
        SpecError: an option is none of those there are, or means nothing for this search.
    """
    explores = bool(problems[0].explore)
    raise_if_any(_unknown("--degrees", asked.degrees or "plan", _DEGREES))
    own = asked.degrees in ("stage", "layer")
    plain = not asked.layerwise and not own and not any(problem.cluster.mixed for problem in problems)
    if plain:
        raise_if_any(_meaningless(asked, explores))
        if not explores:
            return None
    else:
        raise_if_any(_conflicts(asked, problems if own else ()))
    from planner.solve.time_limit import TimeLimit
    from planner.solve.train import search_strictly
    from planner.solve.widening import search_widening

    limit = TimeLimit(_time_limit(asked, _EXPLORATION if plain else _TIME_LIMIT))
    clusters = [problem.cluster.name for problem in problems]  # which are searched one after the other
    alike: Callable[..., SearchResult] = search_widening if explores else search_strictly
    uneven = asked.stages == "uneven"
    if asked.layerwise:
        from planner.solve.layerwise.search import search_layerwise

        alike = partial(search_layerwise, uneven=uneven, exact=asked.exact, solver=asked.solver)

    def searched(problem: Problem, top: int, progress: Any) -> SearchResult:
        left_s = limit.share(len(clusters) - clusters.index(problem.cluster.name)).left_s
        if own or (problem.cluster.mixed and asked.degrees != "plan" and uneven):
            from planner.solve.mixed.search import applies, search_mixed

            if own or applies(problem):
                mixing, solver = asked.degrees == "layer", asked.solver
                return search_mixed(
                    problem, top, progress, base=alike, mixing=mixing, solver=solver, time_limit_s=left_s
                )
        return alike(problem, top, progress, time_limit_s=left_s)

    return searched


def search_fleet(
    problems: list[Problem], top: int, progress: Any, searcher: Callable[..., SearchResult] | None
) -> Fleet:
    """Plans of all clusters together; with a deadline, of the fewest devices that meet it.

    Where none keeps ``max_oom_risk``, the best at any risk.
    """
    from planner.errors import Infeasible
    from planner.solve.risk import at_any_risk, said

    try:
        return _strictly(problems, top, progress, searcher)
    except Infeasible as refusal:
        fleet = _strictly(at_any_risk(problems, refusal), top, progress, searcher)
        return fleet._replace(result=said(fleet.result, problems[0]))


def _strictly(
    problems: list[Problem], top: int, progress: Any, searcher: Callable[..., SearchResult] | None
) -> Fleet:
    if problems[0].deadline_s is None:
        from planner.solve.fleet import search_clusters

        return search_clusters(problems, top, progress, searcher)
    from planner.solve.deadline import fewest_devices

    return fewest_devices(problems, top, progress)


# -- what may be wrong with the options --------------------------------------------------------------------------------------


def _unknown(flag: str, value: str, known: Sequence[str]) -> list[Fault]:
    if value in known:
        return []
    return [Fault(flag, repr(value), f"one of {', '.join(known)}", did_you_mean(value, known))]


def _meaningless(asked: TrainOptions, timed: bool) -> list[Fault]:
    """Options of the wider searches where none is made; the one of an exploration may be ``timed``."""
    given = {
        "--stages": asked.stages != "uneven",
        "--solver": asked.solver != "auto",
        "--time-limit": asked.limit is not None and not timed,
        "--exact": asked.exact,
    }
    others = "--layerwise or --degrees beside it, or a cluster of several kinds of devices"
    where = {"--time-limit": f"--explore or {others}"}
    return [
        Fault(flag, "has no meaning here", where.get(flag, others))
        for flag, is_given in given.items()
        if is_given
    ]


def _conflicts(asked: TrainOptions, unlike: Sequence[Problem]) -> list[Fault]:
    """Options that there are not, or that go with none of the others; ``unlike``: problems whose degrees shall differ."""
    from planner.solve.layerwise.solvers import SOLVERS

    faults = _unknown("--stages", asked.stages, _STAGES) + _unknown("--solver", asked.solver, tuple(SOLVERS))
    if not _applies(unlike):
        found = f"{asked.degrees!r} goes with neither this --for nor this --fix"
        expected = (
            "no launcher or one whose layers differ in degrees (galvatron), and a pipeline of free layout under 1F1B: "
            "one stage per device"
        )
        faults.append(Fault("--degrees", found, expected))
    if asked.exact and asked.limit not in (None, "none"):
        found = f"is given beside a time limit of {asked.limit[:40]}"
        faults.append(Fault("--exact", found, "one of them: --exact waits for the proof"))
    return faults


def _applies(unlike: Sequence[Problem]) -> bool:
    """Whether degrees may differ in all of some problems."""
    if not unlike:
        return True
    from planner.solve.mixed.search import applies

    return all(applies(problem) for problem in unlike)


def _time_limit(asked: TrainOptions, default: str) -> float:
    """Seconds of all searches together; infinite where they wait for the proof."""
    from planner.units import parse_seconds

    faults: list[Fault] = []
    text = "none" if asked.exact else asked.limit or default
    given, expected = None if text == "none" else text, "a duration such as 30s, or none"
    limit_s = optional_quantity(faults, "--time-limit", given, parse_seconds, expected)
    if limit_s is not None and limit_s <= 0.0:
        faults.append(Fault("--time-limit", repr(text), "more than 0, or none"))
    raise_if_any(faults)
    return float("inf") if limit_s is None else limit_s
