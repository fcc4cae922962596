"""``planner train``: the best plans for a training job."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.job import JobOptions, with_job
from planner.cli.values import whole_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from planner.plan import SearchResult
    from planner.solve.fleet import Fleet
    from planner.specs.problem import Problem

_MOST_PLANS = 1000
_DEGREES = ("plan", "stage", "layer")
_TIME_LIMIT = "10s"
_EXPLORATION = "60s"
_DEALING_S = 10.0


@with_job
def train(
    job: JobOptions,
    top: Annotated[
        str, typer.Option("--top", metavar="K", help="Plans to list [10].", show_default=False)
    ] = "10",
    deadline: Annotated[
        str | None,
        typer.Option(
            "--deadline",
            metavar="TIME",
            help="Fewest devices that finish --tokens in time, e.g. 30d; with --layerwise, another name of --time-limit.",
        ),
    ] = None,
    explore: Annotated[
        list[str] | None,
        typer.Option(
            "--explore",
            metavar="GLOB",
            help="Also try these choices, left aside as they hardly ever win, e.g. 'schedule=*' or all. Repeatable.",
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            metavar="LIST",
            help="Sequences of every length in a step, e.g. 4096:128,65536:4, in place of --global-batch and --seq-len: packed "
            "for the plans, and dealt to groups of unlike sizes beside them.",
        ),
    ] = None,
    pareto: Annotated[
        bool,
        typer.Option("--pareto", help="Also the best plan under each of several smaller memory budgets."),
    ] = False,
    layerwise: Annotated[
        bool,
        typer.Option(
            "--layerwise", help="Also plans whose layers differ in what they recompute, shard and offload."
        ),
    ] = False,
    degrees: Annotated[
        str | None,
        typer.Option(
            "--degrees",
            metavar="OF",
            help="Also plans with tensor, context, expert and data degrees of every stage, or of every layer [plan].",
            show_default=False,
        ),
    ] = None,
    stages: Annotated[
        str,
        typer.Option(
            "--stages",
            metavar="HOW",
            help="With --layerwise or unlike devices: stages of any size, or only even [uneven].",
            show_default=False,
        ),
    ] = "uneven",
    solver: Annotated[
        str,
        typer.Option(
            "--solver",
            metavar="NAME",
            help="With --layerwise, --degrees or unlike devices: auto, dp, ilp or brute [auto].",
            show_default=False,
        ),
    ] = "auto",
    time_limit: Annotated[
        str | None,
        typer.Option(
            "--time-limit",
            metavar="TIME",
            help="With --layerwise, --degrees or unlike devices [10s], or --explore [60s]: the best so far after this, with its "
            "gap; none waits for the proof.",
            show_default=False,
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="With --layerwise: no time limit, and strategies that are the best to the last digit; not beside --time-limit.",
        ),
    ] = False,
    out: Annotated[
        str | None, typer.Option("-o", "--out", metavar="FILE", help="Write the plans as JSON to a file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")] = False,
) -> None:
    """Find the best plans for a training job, with proof.

    With several --cluster, plans of all of them are ranked together by --objective. With --deadline, every
    number of nodes up to the one given is searched or excluded by a bound, until one finishes in time. With --layerwise, every
    layer may have a strategy of its own and stages any size; the plan is never slower than the best uniform one, and states
    what a better one could still gain; Ctrl-C ends the search with the best so far. With --degrees stage or layer, work may be
    cut otherwise in every stage or layer. On a cluster of several kinds of devices, stages may run each on one kind, with degrees
    and layers of their own. --explore searches the default space first, then what it opens slot by slot, then everything
    together, and says what it left when --time-limit was over.
    """
    from planner.cli.output import OutputFile, Stopped, json_text, print_json
    from planner.cli.progress import Progress
    from planner.errors import Interrupted
    from planner.report.totals import document
    from planner.solve.fleet import Fleet

    job, histogram = _packed(job, lengths)
    problems, wanted = _problems(job, top, deadline, time_limit, explore or (), layerwise)
    searcher = _searcher(
        problems,
        stages,
        solver,
        (deadline if layerwise else None) or time_limit,
        degrees,
        layerwise=layerwise,
        exact=exact,
    )
    stopped = False
    with OutputFile(out) if out is not None else nullcontext() as file:
        try:
            with Progress() as progress:
                fleet = _search(problems, wanted, progress, searcher)
        except Interrupted as stop:
            if not isinstance(stop.best, Fleet):
                raise Stopped(stop.note or "before any plan was priced") from None
            fleet, stopped = stop.best, True
        if pareto and not stopped:
            fleet = _with_front(fleet, problems)
        content = document(fleet, problems) | ({"interrupted": True} if stopped else {})
        if histogram is not None:
            content["sequences"] = _sequences(fleet, problems, histogram)
        if file is not None:
            file.write(json_text(content) + "\n")
    if as_json:
        print_json(content)
    else:
        from planner.report.ranking import show_ranking

        show_ranking(fleet, problems, out)
        if histogram is not None:
            from planner.report.optimum import show_dealt

            show_dealt(content["sequences"])
    if stopped:
        raise Stopped("these are the best plans so far", printed=True)


def _packed(job: JobOptions, lengths: str | None) -> tuple[JobOptions, dict[int, int] | None]:
    """The job of packed sequences that a histogram of lengths makes, and the histogram; the job itself without one."""
    if lengths is None:
        return job, None
    from dataclasses import replace

    from planner.cli.solve_job import read_histogram
    from planner.errors import Problem as Fault
    from planner.errors import SpecError
    from planner.solve.lengths import packed
    from planner.specs.workload import TrainWorkload

    beside = {
        "--global-batch": job.global_batch,
        "--seq-len": job.seq_len,
        "--document-len": job.document_len,
    }
    faults = [
        Fault(flag, "is given beside --lengths", "one of them")
        for flag, value in beside.items()
        if value is not None
    ]
    if faults:
        raise SpecError(faults)
    histogram = read_histogram(lengths)
    whole = packed(TrainWorkload(1, 1), histogram)
    batch, seq_len, document_len = whole.global_batch_size, whole.seq_len, whole.document_len
    job = replace(job, global_batch=str(batch), seq_len=str(seq_len), document_len=str(document_len))
    return job, histogram


def _sequences(fleet: Fleet, problems: list[Problem], histogram: dict[int, int]) -> dict[str, Any]:
    """The sequences of a step in groups of unlike sizes, on the best plan's cluster; or why there are none."""
    from planner.errors import PlannerError
    from planner.solve.lengths import deal

    best = fleet.result.best
    problem = next((p for p in problems if p.cluster.name == best.cluster), problems[0])
    try:
        dealt = deal(problem, best, histogram, _DEALING_S)
    except PlannerError as error:
        return {"refused": str(error)}
    groups = [
        {"degree": degree, "sequences": [int(n) for n in row], "time_s": seconds}
        for degree, row, seconds in zip(
            dealt.groups.degrees, dealt.groups.counts, dealt.groups.group_s, strict=True
        )
    ]
    equal = None if dealt.equal is None else {"degree": dealt.equal.degrees[0], "time_s": dealt.equal.time_s}
    return {
        "time_s": dealt.groups.time_s, "lengths": list(dealt.lengths), "groups": groups, "equal": equal,
        "certificate": dealt.groups.certificate.as_dict(),
    }  # fmt: skip


def _problems(
    job: JobOptions,
    top: str,
    deadline: str | None,
    time_limit: str | None,
    explore: Sequence[str],
    layerwise: bool,
) -> tuple[list[Problem], int]:
    """The problems and how many plans to keep; raises all that is wrong with the options at once."""
    from planner.errors import Problem as Fault
    from planner.errors import SpecError
    from planner.units import parse_seconds

    faults: list[Fault] = []
    wanted, deadline_s = 0, None
    try:
        wanted = whole_number("--top", top)
    except SpecError as error:
        faults += error.problems
    else:
        if not 1 <= wanted <= _MOST_PLANS:
            faults.append(Fault("--top", top, f"a whole number from 1 to {_MOST_PLANS}"))
    if deadline is not None and layerwise and job.tokens is not None:
        found, hint = "of a run (--tokens), with --layerwise", "Find the size first, then its plan."
        faults.append(Fault("--deadline", found, "one of them", hint))
    elif deadline is not None and layerwise and time_limit is not None:
        faults.append(
            Fault("--deadline", "is given beside --time-limit", "one of them: here it is another name")
        )
    elif deadline is not None and not layerwise:
        try:
            deadline_s = parse_seconds(deadline)
        except ValueError:
            faults.append(Fault("--deadline", repr(deadline[:40]), "a duration such as 30d or 12h"))
    return job.problems(faults, deadline_s, explore=explore), wanted


def _with_front(fleet: Fleet, problems: list[Problem]) -> Fleet:
    """The fleet with the Pareto front of the best plan's cluster."""
    from dataclasses import replace

    from planner.solve.front import pareto_front

    best = fleet.result.best
    problem = next((p for p in problems if p.cluster.name == best.cluster), problems[0])
    front = tuple(plan.as_dict() for plan in pareto_front(problem, best))
    return replace(fleet, result=replace(fleet.result, pareto=front))


def _searcher(
    problems: Sequence[Problem],
    stages: str,
    solver: str,
    time_limit: str | None,
    degrees: str | None,
    *,
    layerwise: bool,
    exact: bool,
) -> Callable[..., SearchResult] | None:
    """What searches a cluster layer by layer, or over degrees and node groups that differ; None where neither is wanted.

    Raises:
        SpecError: an option is none of those there are, or means nothing for this search.
    """
    from functools import partial

    from planner.cli.values import optional_quantity, raise_if_any
    from planner.errors import Problem as Fault
    from planner.errors import SpecError, did_you_mean

    faults: list[Fault] = []
    explores = bool(problems[0].explore)
    if degrees not in (None, *_DEGREES):
        raise SpecError(
            Fault(
                "--degrees", repr(degrees), f"one of {', '.join(_DEGREES)}", did_you_mean(degrees, _DEGREES)
            )
        )
    own = degrees in ("stage", "layer")
    plain = not layerwise and not own and not any(problem.cluster.mixed for problem in problems)
    if plain:
        given = {
            "--stages": stages != "uneven",
            "--solver": solver != "auto",
            "--time-limit": time_limit is not None and not (explores and problems[0].deadline_s is None),
            "--exact": exact,
        }
        others = "--layerwise or --degrees beside it, or a cluster of several kinds of devices"
        where = {"--time-limit": f"--explore or {others}"}
        raise_if_any(
            [
                Fault(flag, "has no meaning here", where.get(flag, others))
                for flag, is_given in given.items()
                if is_given
            ]
        )
        if not explores:
            return None
    from planner.solve.layerwise.search import search_layerwise
    from planner.solve.layerwise.solvers import SOLVERS
    from planner.solve.mixed.search import applies, search_mixed
    from planner.solve.time_limit import TimeLimit
    from planner.solve.train import search
    from planner.solve.widening import search_widening
    from planner.units import parse_seconds

    for flag, value, known in (
        ("--stages", stages, ("uneven", "even")),
        ("--solver", solver, tuple(SOLVERS)),
    ):
        if value not in known:
            faults.append(Fault(flag, repr(value), f"one of {', '.join(known)}", did_you_mean(value, known)))
    if own and not all(applies(problem) for problem in problems):
        expected = (
            "no launcher or one whose layers differ in degrees (galvatron), and a pipeline of free layout under 1F1B: "
            "one stage per device"
        )
        faults.append(
            Fault("--degrees", f"{degrees!r} goes with neither this --for nor this --fix", expected)
        )
    if exact and time_limit not in (None, "none"):
        found = f"is given beside a time limit of {time_limit[:40]}"
        faults.append(Fault("--exact", found, "one of them: --exact waits for the proof"))
    raise_if_any(faults)
    asked = "none" if exact else time_limit or (_EXPLORATION if plain else _TIME_LIMIT)
    limit_s = optional_quantity(
        faults,
        "--time-limit",
        None if asked == "none" else asked,
        parse_seconds,
        "a duration such as 30s, or none",
    )
    if limit_s is not None and limit_s <= 0.0:
        faults.append(Fault("--time-limit", repr(asked), "more than 0, or none"))
    raise_if_any(faults)
    limit = TimeLimit() if limit_s is None else TimeLimit(limit_s)
    left = [id(problem) for problem in problems]
    alike: Callable[..., SearchResult] = search_widening if explores else search
    if layerwise:
        alike = partial(search_layerwise, uneven=stages == "uneven", exact=exact, solver=solver)

    def searched(problem: Problem, top: int, progress: Any) -> SearchResult:
        own_s = limit.share(len(left) - left.index(id(problem))).left_s
        unlike = problem.cluster.mixed and degrees != "plan" and stages == "uneven" and applies(problem)
        if own or unlike:
            mixing = degrees == "layer"
            return search_mixed(
                problem, top, progress, base=alike, mixing=mixing, solver=solver, time_limit_s=own_s
            )
        return alike(problem, top, progress, time_limit_s=own_s)

    return searched


def _search(
    problems: list[Problem], top: int, progress: Any, searcher: Callable[..., SearchResult] | None
) -> Fleet:
    if problems[0].deadline_s is None:
        from planner.solve.fleet import search_clusters

        return search_clusters(problems, top, progress, searcher)
    from planner.solve.deadline import fewest_devices

    return fewest_devices(problems, top, progress)
