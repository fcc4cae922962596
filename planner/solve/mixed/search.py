"""The best plan of a mixed cluster whose stages run each on one kind of node, with a bound on what is left to gain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from heapq import heapify, heappop, heappush, nsmallest
from time import perf_counter

import numpy as np

from planner.errors import Infeasible, Interrupted
from planner.plans.assemble import assemble, model_flop
from planner.plans.plan import Plan, SearchReport, SearchResult
from planner.solve.account import Account
from planner.solve.kernel_floor import kernel_floor_s
from planner.solve.layerwise.solvers import SOLVERS, Solver, automatic
from planner.solve.mixed.bounds import Bounds
from planner.solve.mixed.families import FREE, Ends, families
from planner.solve.mixed.ground import SCHEDULE, Ground
from planner.solve.mixed.settle import Found, Settler
from planner.solve.mixed.shapes import Shape, shapes
from planner.solve.mixed.stretch import TOGETHER
from planner.solve.space import Space, order_of
from planner.solve.time_limit import FOREVER, OutOfTimeError, TimeLimit
from planner.solve.train import search_strictly
from planner.specs.problem import Problem

__all__ = ["MixedSearch", "applies", "search_mixed"]

_TOLERANCE = 1e-3  # of a stage's time, within which its strategies need not be the best: the gap says what is lost by it
_PATIENCE = 300  # looks without a plan, after which the most promising shape is settled at once
_AHEAD = 1500  # shapes whose members are priced together
_MORE = 4  # times as many members as are asked for are priced: what that takes hardly depends on how many they are
_LONGEST_S = 1e9  # no step takes longer, where no uniform plan fits
_ORDERLY = 0.9  # of the time, after which what is priced by then is kept and nothing is begun


def search_mixed(
    problem: Problem,
    top: int = 10,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    base: Callable[..., SearchResult] = search_strictly,
    solver: str = "auto",
    mixing: bool = False,
    time_limit_s: float = np.inf,
) -> SearchResult:
    """The plans of a search that treats all devices alike, and before them the best one that does not, where it is faster.

    On a cluster of one kind of devices that is a plan whose stages or layers have degrees of their own.

    Args:
        problem: what to plan.
        top: plans to return.
        on_progress: as for :func:`planner.solve.train.search`.
        base: the search that treats all devices alike; takes a ``time_limit_s``.
        solver: of the strategies of a stage: one of :data:`~planner.solve.layerwise.solvers.SOLVERS`.
        mixing: whether layers of one stage may be cut in different ways, and not stages alone.
        time_limit_s: of both searches together, of which the first one ends after half; the best plan so far then states its
            gap.

    Raises:
        SpecError: a fixed or forbidden choice is unknown.
        Infeasible: nothing fits, neither way.
        SolverError: the time was over before a plan was found that fits, or before it was known that there is none.
        Interrupted: the user pressed Ctrl-C; carries the best plans so far.
    """
    alike: SearchResult | None = None
    refusal: Infeasible | None = None
    limit = TimeLimit(time_limit_s)
    try:
        alike = base(problem, top, on_progress, time_limit_s=limit.share(2).left_s)
    except Infeasible as error:
        refusal = error
    below_s = _LONGEST_S if alike is None else alike.best.estimate.step_time_s
    best, account = _searched(problem, below_s, solver, limit, mixing=mixing)
    plans = _plans(problem, best, account, alike, top)
    stopped = account.stopped == "interrupted"
    if not plans:
        if stopped:
            raise Interrupted(None, "before any plan was priced that fits")
        assert refusal is not None
        raise account.failure(refusal)
    result = SearchResult(plans, SearchReport(0, 0, 0, {}, {}, 0.0)) if alike is None else alike
    report = replace(result.search, wall_s=result.search.wall_s + account.wall_s)
    result = replace(result, plans=plans, search=report, mixed=asdict(account))
    if stopped:
        raise Interrupted(result)
    return result


def applies(problem: Problem) -> bool:
    """Whether stages may differ in where they run and how their work is cut: nothing that is fixed forbids it.

    Most launchers take one mesh for all stages, and those that do not start one kind of devices; named layouts and virtual stages
    are of pipelines of equal devices.
    """
    fixed = problem.fixed
    plain = "pipeline_layout" not in fixed and str(fixed.get("virtual_stages", "1")) == "1"
    named = str(fixed.get("schedule", SCHEDULE)).lower() == SCHEDULE
    long = not problem.cluster.mixed or str(fixed.get("pp", "2")) != "1"
    launcher = problem.launcher
    runs = launcher is None or (bool(launcher.per_place) and not problem.cluster.mixed)
    return runs and plain and named and long


class MixedSearch:
    """Settles shapes in the order of their bounds until none is below the best plan.

    Args:
        problem: the whole problem.
        below_s: plans that are not faster are of no interest.
        solver: of the strategies of a stage.
        limit: when to stop.
        mixing: whether layers of one stage may be cut in different ways.
        ends: what embedding and head share.
    """

    def __init__(
        self,
        problem: Problem,
        below_s: float,
        solver: str,
        limit: TimeLimit = FOREVER,
        *,
        mixing: bool = False,
        ends: Ends = FREE,
    ) -> None:
        self.mixing = mixing
        self.start_s = perf_counter()
        self.end_s = self.start_s + _ORDERLY * limit.left_s
        self.problem, self.best_s, self._ends = problem, below_s, ends
        chosen: Solver = SOLVERS[solver]
        self.solver = partial(automatic, tolerance=_TOLERANCE) if solver == "auto" else chosen
        self.best: Found | None = None
        self.account = Account(solver, _space(problem, mixing=mixing))
        self._started = False
        self._heap: list[tuple[float, int, Shape, Bounds | None]] = []
        self._open: list[float] = []
        self._looks = 0

    def go(self) -> None:
        """Runs until the end, or until the time is over."""
        self.ground = Ground(self.problem, self.solver, mixing=self.mixing, ends=self._ends)
        layers = np.array([float(self.ground.order.count(kind)) for kind in self.ground.kinds[:-3]])
        fixed = self.problem.fixed.get("pp")
        lengths = None if fixed is None else (int(str(fixed)),)
        every = sorted(shapes(self.ground.groups, layers, lengths), key=Shape.rank)
        self.account.parts = len(every)
        self._heap = [(shape.bound_s, number, shape, None) for number, shape in enumerate(every)]
        heapify(self._heap)
        self._started = True
        while self._heap and self._heap[0][0] < self.best_s:
            if self.account.late(self.end_s):
                return
            self._look()
        self.account.exclude("work", sum(bounds is None for *_, bounds in self._heap))

    def _look(self) -> None:
        """Bounds the most promising shape more tightly, or settles it.

        As long as there is no plan, one is taken from it now and then, for others to be held against.
        """
        _, number, shape, known = self._heap[0]
        bounds = known or Bounds(shape, self.ground)
        self._looks += 1
        at_once = self.best is None and self._looks % _PATIENCE == 0
        settles = bounds.final
        while not bounds.final:
            self._price_ahead(bounds)
            bounds.tighten()
            if not at_once or bounds.level >= TOGETHER:
                break
        if (settles or at_once) and len(bounds.shares) and bounds.shape_s < self.best_s:
            settler = Settler(bounds, lambda: self.account.late(self.end_s))
            for found in settler.plans(self.best_s) if settles else filter(None, [settler.any(self.best_s)]):
                self.best, self.best_s = found, found.step_s
        heappop(self._heap)
        if settles:
            self.account.settled += 1
            self._open.append(bounds.shape_s)
        elif bounds.shape_s < self.best_s:
            heappush(self._heap, (bounds.shape_s, number, shape, bounds))
        else:
            self.account.exclude("stages", 1)

    def _price_ahead(self, bounds: Bounds) -> None:
        """Prices the members that a shape asks for, together with those that the next shapes will ask for."""
        asked = bounds.asked()
        if not asked:
            return
        alike = (
            shape
            for _, _, shape, known in nsmallest(_AHEAD, self._heap)
            if (known.level if known else -1) <= bounds.level
        )
        several = [bounds.shape, *alike]
        for group, members in enumerate(self.ground.groups):
            wanted = dict.fromkeys((self.ground.class_of(shape, group), shape.pp) for shape in several)
            members.price(
                (member, pp) for of, pp in wanted for member in members.classes[of][: _MORE * asked]
            )

    def open_s(self) -> list[float]:
        """Bounds of all parts that no bound has excluded, when the search has ended for whatever reason."""
        if not self._started:
            alike = not self.problem.cluster.mixed
            return [kernel_floor_s(self.problem) / self.problem.cluster.devices if alike else 0.0]
        return [bound_s for bound_s, *_ in self._heap] + self._open

    def finished(self) -> Account:
        """The account of the search, when it has ended."""
        self.account.close(self.open_s(), self.best_s, self.start_s)
        return self.account


# -- details ---------------------------------------------------------------------------------------------------------


def _searched(
    problem: Problem, below_s: float, solver: str, limit: TimeLimit, *, mixing: bool
) -> tuple[Found | None, Account]:
    """The best plan of all families, each searched below the ones before, and the account of all together."""
    start_s = perf_counter()
    several = list(families(problem))
    best: Found | None = None
    total, open_s = Account(solver, _space(problem, mixing=mixing)), [0.0] if not several else []
    for number, family in enumerate(several):
        share = limit.share(len(several) - number)
        run = MixedSearch(family.problem, below_s, solver, share, mixing=mixing, ends=family.ends)
        try:
            with share.enforced():
                run.go()
        except OutOfTimeError:
            run.account.stopped = "time"
        except KeyboardInterrupt:
            run.account.stopped = "interrupted"
        if run.best is not None:
            best, below_s = run.best, run.best_s
        open_s += run.open_s()
        total.add(run.account)
        if run.account.stopped == "interrupted":
            open_s += [0.0] * (number + 1 < len(several))
            break
    total.close(open_s, below_s, start_s)
    return best, total


def _space(problem: Problem, *, mixing: bool) -> str:
    """What is searched, in words."""
    on = " over all node groups" if len(problem.cluster.groups) > 1 else ""
    return f"1F1B pipelines{on}, degrees of every {'layer' if mixing else 'stage'}"


def _plans(
    problem: Problem, best: Found | None, account: Account, alike: SearchResult | None, top: int
) -> tuple[Plan, ...]:
    """The plan over node groups, if there is one, before those that treat devices alike; each with what is proved of it."""
    others = () if alike is None else alike.plans
    if best is None:
        settled = not others or account.bound_s >= others[0].estimate.step_time_s
        return others if settled else _held(others, account)
    return _held((_assembled(problem, best), *others)[:top], account)


def _held(plans: Sequence[Plan], account: Account) -> tuple[Plan, ...]:
    """The plans with the gap that the search over node groups leaves: no plan is faster, whichever way it treats them."""
    return tuple(
        replace(plan, optimality=account.proved(plan.estimate.step_time_s, plan.optimality)) for plan in plans
    )


def _assembled(problem: Problem, best: Found) -> Plan:
    """The plan priced anew, from ledgers of its own."""
    first = best.assignment.stage_places()[0][0]
    space = Space(first.problem)
    schedule = next(choice for choice in space.choices["schedule"] if order_of(choice).name == SCHEDULE)
    recipe = {**first.recipe, **best.assignment.strategies[0], "schedule": schedule}
    flop = model_flop(problem.model, problem.workload)
    plan = assemble(
        problem, recipe, space.knobs(recipe), first.row, best.layout, None, None, flop, best.assignment
    ).plan
    assert abs(plan.estimate.step_time_s - best.step_s) <= 1e-9 * best.step_s, "one engine prices everything"
    return plan
