"""The best plans of a training problem's uniform space, and why there is none where nothing fits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from planner.errors import Infeasible, Interrupted, PlannerError
from planner.errors import Problem as Fault
from planner.pipeline.step_time import exact_step_s
from planner.plans.assemble import assemble, model_flop
from planner.plans.parts import Priced, price_alike
from planner.plans.plan import Optimality, Plan, SearchReport, SearchResult
from planner.schedule.order import Generator
from planner.solve.candidates import Scored, Shortfall
from planner.solve.named import estimate
from planner.solve.ranking import Ranking
from planner.solve.risk import at_any_risk, said
from planner.solve.space import Named, Space
from planner.solve.tables import BranchTables
from planner.solve.uniform import SearchCounts, UniformSearch
from planner.specs.formats import FORMATS
from planner.specs.problem import Problem
from planner.units import format_bytes

__all__ = ["search", "search_strictly", "search_until"]

_SOLVER = "branch and bound over the uniform space"


def search(
    problem: Problem,
    top: int = 10,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    limit_s: float = np.inf,
    time_limit_s: float = np.inf,
) -> SearchResult:
    """The best plans of the uniform space, ranked, with proof; where none keeps ``max_oom_risk``, the best at any risk.

    Args:
        problem: what to plan.
        top: how many plans to return.
        on_progress: called with (parts of the space done, parts in all).
        limit_s: plans whose step takes this long or longer are of no interest: bounds are held against it from the start. The
            result is without plans where bounds or prices exclude every candidate that might fit.
        time_limit_s: after which the first plans that there are count as the best, as heuristic ones.

    Raises:
        SpecError: a fixed or forbidden choice is unknown.
        Infeasible: nothing fits; says what binds, by how much, and what would fit.
        Interrupted: the user pressed Ctrl-C; carries the best plans so far, as heuristic ones.
    """
    strictly = partial(search_strictly, limit_s=limit_s, time_limit_s=time_limit_s)
    try:
        return strictly(problem, top, on_progress)
    except Infeasible as refusal:
        (bold,) = at_any_risk([problem], refusal)
        return said(strictly(bold, top, on_progress), problem)


def search_strictly(
    problem: Problem,
    top: int = 10,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    limit_s: float = np.inf,
    time_limit_s: float = np.inf,
) -> SearchResult:
    """:func:`search`, but infeasible where no plan keeps ``max_oom_risk``."""
    return search_until(problem, top, on_progress, limit_s, perf_counter() + time_limit_s)[0]


def search_until(
    problem: Problem, top: int, on_progress: Callable[[int, int], None] | None, limit_s: float, end_s: float,
    rows: Mapping[Named, NDArray[np.intp]] | None = None,
    known: Mapping[Named, tuple[NDArray[np.intp], BranchTables]] | None = None,
) -> tuple[SearchResult, bool]:  # fmt: skip
    """:func:`search` up to a reading of the clock, of all rows or of those that prefixes are searched on, with tables that are
    known (:class:`~planner.solve.uniform.UniformSearch`); and whether it came to the end.

    Under a limit it may end without plans.
    """
    start = perf_counter()

    def reprice(batch: list[Scored]) -> list[float]:
        return _reprice(batch, problem.workload.global_batch_size)

    uniform = UniformSearch(problem, top, reprice, on_progress, rows, known)
    uniform.ranking = _Limited(top, problem.workload.global_batch_size, reprice, limit_s, end_s)
    stopped = late = False
    try:
        priced = uniform.run()
    except (KeyboardInterrupt, _OutOfTimeError) as stop:
        late = isinstance(stop, _OutOfTimeError)
        priced, stopped = uniform.ranking.complete(), not late
    counts = uniform.counts
    ranked = [pair for pair in priced if pair[0] < limit_s]
    too_slow = bool(priced) or (limit_s < np.inf and counts.excluded_by_bound["step time"] > 0)
    if not ranked and stopped:
        raise Interrupted(None, _before_any(counts, uniform.nearest))
    if not (ranked or too_slow or late):
        raise _infeasible(problem, uniform.nearest, counts.rejected)
    excluded, rejected = (
        {k: n for k, n in sorted(c.items()) if n} for c in (counts.excluded_by_bound, counts.rejected)
    )
    plans = tuple(_assembled(problem, uniform, ranked, stopped or late))
    wall_s = perf_counter() - start
    repriced = uniform.ranking.repriced
    report = SearchReport(counts.candidates, counts.scored, repriced, excluded, rejected, wall_s)
    result = SearchResult(plans, report)
    if stopped:
        raise Interrupted(result)
    return result, not late


def _assembled(
    problem: Problem, uniform: UniformSearch, ranked: list[tuple[float, Scored]], stopped: bool
) -> Iterator[Plan]:
    """The ranked choices as plans, with what was proved of each."""
    useful_flop = model_flop(problem.model, problem.workload)
    unproved = Optimality("heuristic", None, None, f"{_SOLVER}, interrupted")
    priced = _priced(problem, uniform.space, [scored for _, scored in ranked])
    for (step_s, scored), known in zip(ranked, priced, strict=True):
        yield assemble(
            problem,
            scored.recipe,
            uniform.space.knobs(scored.recipe),
            scored.row,
            scored.layout,
            scored.recompute_layers,
            unproved if stopped else _proved(step_s, ranked[0][0]),
            useful_flop,
            step_s=step_s,
            priced=known,
        ).plan


def _priced(problem: Problem, space: Space, plans: Sequence[Scored]) -> list[Priced]:
    """Each choice in full; those of one recipe are priced together."""
    alike: dict[tuple[str, ...], list[Scored]] = defaultdict(list)
    for scored in plans:
        alike[tuple(choice.value for choice in scored.recipe.values())].append(scored)
    found: dict[int, Priced] = {}
    for members in alike.values():
        recipe = members[0].recipe
        each = price_alike(problem, recipe, space.knobs(recipe), [scored.row for scored in members])
        found |= zip(map(id, members), each, strict=True)
    return [found[id(scored)] for scored in plans]


class _OutOfTimeError(Exception):
    """The time is over, and there is a plan, or a limit that one was found under."""


class _Limited(Ranking):
    """A ranking whose bar is never above a limit, and that ends the search when the time is over."""

    def __init__(
        self, top: int, global_batch_size: int, reprice: Callable[[list[Scored]], list[float]], limit_s: float, end_s: float
    ) -> None:  # fmt: skip
        super().__init__(top, global_batch_size, reprice)
        self.limit_s, self.end_s = limit_s, end_s

    @property
    def bar(self) -> float:
        """What a candidate's bound has to beat: asked for between one part of the work and the next."""
        if (self.best or self.limit_s < np.inf) and perf_counter() > self.end_s:
            raise _OutOfTimeError
        return min(super().bar, self.limit_s)


def _proved(step_s: float, best_s: float) -> Optimality:
    """The best plan is exact. Of the others it is known that no plan, listed or not, is faster than the best one."""
    gap = (step_s - best_s) / step_s
    return Optimality("gap" if gap else "exact", gap, best_s, _SOLVER)


def _reprice(batch: list[Scored], global_batch_size: int) -> list[float]:
    """Exact step times; candidates that share an order are priced together."""
    groups: dict[tuple[int, Generator, int], list[int]] = defaultdict(list)
    for index, scored in enumerate(batch):
        groups[id(scored.layout), scored.schedule, scored.micro_batches(global_batch_size)].append(index)
    times = np.empty(len(batch))
    for (_, schedule, micro_batches), members in groups.items():
        alike = [batch[i] for i in members]
        layers = [scored.recompute_layers for scored in alike]
        times[members] = exact_step_s(
            [s.table for s in alike], alike[0].layout, schedule, micro_batches, layers
        )
    return [float(t) for t in times]


def _before_any(counts: SearchCounts, nearest: Shortfall | None) -> str:
    """What is known of a search that was stopped before it had a plan."""
    seen = f"before any plan was priced, {counts.candidates:,} candidates into the space"
    if nearest is None:
        return seen
    short = format_bytes(nearest.needed_bytes - nearest.budget_bytes)
    return f"{seen}; of those that were scored none fits, and the closest misses {nearest.binding} by {short}"


def _infeasible(problem: Problem, nearest: Shortfall | None, rejected: Mapping[str, int]) -> Infeasible:
    """What binds, by how much, and the nearest change that would fit."""
    if nearest is None:
        ranked = sorted(((why, n) for why, n in rejected.items() if n), key=lambda reason: -reason[1])
        counted = [f"{reason} ({count:,})" for reason, count in ranked[:4]]
        broken = "; ".join(counted) if len(ranked) > 1 else ranked[0][0] if ranked else ""
        return Infeasible(
            Fault(
                "search",
                f"every candidate breaks a rule: {broken}"
                if ranked
                else "no candidate has all that is fixed: a choice lacks its detail, or its detail does not suit the degrees",
                "at least one valid plan",
                "Change the job (--global-batch, --precision, …), or loosen --fix and --forbid.",
            )
        )
    short = nearest.needed_bytes - nearest.budget_bytes
    mesh = ", ".join(f"{name}={nearest.row[name]:g}" for name in ("tp", "cp", "pp", "dp", "micro_batch_size"))
    chosen = ", ".join(
        f"{slot}={nearest.recipe[slot].value}" for slot in ("zero_stage", "recompute", "optimizer_offload")
    )
    factor = nearest.excess
    what = "gradients and framework alone need" if nearest.at_least else "it needs"
    change = "fewer reserved bytes or a shorter sequence would" if factor < 1.1 else "a shorter sequence may"
    return Infeasible(
        Fault(
            f"{problem.model.name} on {problem.cluster.name}",
            f"nothing fits: {nearest.binding} binds. Closest is {mesh}, {chosen}: {what} "
            f"{format_bytes(nearest.needed_bytes)}, {format_bytes(short)} more than the "
            f"{format_bytes(nearest.budget_bytes)} there are",
            "a plan within device and host memory",
            f"Nearest change: {factor:.2f}× the memory per device, or about {factor:.2f}× as many devices; {change} help too."
            + _what_would_fit(problem, nearest),
        )
    )


def _what_would_fit(problem: Problem, nearest: Shortfall) -> str:
    """Choices that the search leaves to the user, because they train something else, and with which the closest mesh fits."""
    degrees = {
        name: int(nearest.row[name])
        for name in ("tp", "cp", "pp", "ep", "etp", "micro_batch_size")
        if name in nearest.row
    }
    kept = {slot: nearest.recipe[slot].value for slot in ("schedule", "zero_stage", "sequence_parallel")}
    precision = FORMATS[nearest.recipe["precision"].value]
    narrow = {"gradient_dtype": precision.activation}
    offloaded = {"optimizer_offload": "cpu", "parameter_offload": "cpu"}
    hints: list[str] = []
    for name, flags, choices in (
        ("Gradients of 16 bits", "with full recompute", narrow),
        (
            "Gradients of 16 bits",
            "with full recompute, states and weights on the host",
            {**narrow, **offloaded},
        ),
        ("Adapters alone", "with full recompute", {"adaptation": "lora"}),
    ):
        slot, value = next(iter(choices.items()))
        if slot in problem.fixed or value == precision.gradient or any(name in hint for hint in hints):
            continue
        fixed = {
            **kept,
            **degrees,
            "precision": precision.name,
            "recompute": "full",
            **choices,
            **problem.fixed,
        }
        needed = _peak_where_it_fits(replace(problem, fixed=fixed))
        if needed is not None:
            hints.append(f" {name} (--fix {slot}={value}, {flags}) would need {format_bytes(needed)} there.")
    return "".join(hints)


def _peak_where_it_fits(problem: Problem) -> float | None:
    """Bytes that the one plan which is fixed needs of a device; nothing where it breaks a rule or is too large."""
    try:
        found = estimate(problem).estimate
    except PlannerError:
        return None
    return found.memory_bytes["peak"] if found.fits else None
