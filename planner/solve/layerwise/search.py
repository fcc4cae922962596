"""The best layer-wise plan: bounds first, then exact strategies per stage, then the schedule engine, until nothing can be better.

The uniform search comes first; its best plan is in the layer-wise space too, so that the answer is never worse. What is left of
the space is looked at in the order of its bounds; the answer is exact when no bound below its step time remains, and otherwise
states the gap to the smallest one that does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import groupby
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from planner.errors import Infeasible, Interrupted
from planner.plans.plan import SearchReport, SearchResult
from planner.solve.account import Account
from planner.solve.kernel_floor import kernel_floor_s
from planner.solve.layerwise.answer import joined, proved_plans
from planner.solve.layerwise.device_bounds import Known
from planner.solve.layerwise.devices import DeviceCosts
from planner.solve.layerwise.settle import Candidate, Settler
from planner.solve.layerwise.solvers import SOLVERS, Solver, automatic
from planner.solve.layerwise.space import Deal, LayerwiseSpace
from planner.solve.layerwise.strategies import Mesh
from planner.solve.layerwise.walks import Paths, first_bounds
from planner.solve.space import Named, named
from planner.solve.time_limit import OutOfTimeError, TimeLimit, ask
from planner.solve.train import search_until
from planner.solve.uniform import UniformSearch
from planner.specs.problem import Problem

__all__ = ["search_layerwise"]

_TOLERANCE = 1e-4  # of a device's time, within which its strategies need not be the best: the gap says what is lost by it
_ROUGH, _LIKELY, _BOUND, _PATH, _PLANS = range(5)  # looks at a deal, each dearer than the one before
_NEAR = 3e-3  # of a step, within which a layout's bound is near enough to the best plan
_AROUND = 1.1  # times the smallest bound, within which a first plan is looked for
_FIRST = 3  # deals that are looked at for a plan before the others are bounded
_ROUNDS = 8  # in which strategies of a deal's likely plans get tables
_PATIENCE = 40  # looks without a plan, after which the most promising deal of those is settled at once
_FAR = 0.02  # of a step: not where the best plan is nearer to the smallest bound
_SPACE = "layer-wise plans"
_UNIFORM = 0.25  # of what is left of a time limit, after which a uniform search makes way with its plans
_COMPANY = 1.01  # times the step of a plan whose layers are alike, within which others are listed beside it
_TIE = 1e-3  # of a step: no model of a machine tells such plans apart, and the simplest of them is taken
_LONGEST_S = 1e9  # no step takes longer, where no uniform plan fits


def search_layerwise(
    problem: Problem,
    top: int = 10,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    solver: str = "auto",
    uneven: bool = True,
    exact: bool = False,
    time_limit_s: float = np.inf,
) -> SearchResult:
    """The uniform search's plans, and before them the best layer-wise plan where it is faster.

    Args:
        problem: what to plan.
        top: plans to return.
        on_progress: as for :func:`planner.solve.train.search`.
        solver: of the strategies of a device: one of :data:`SOLVERS`.
        uneven: whether stages may be of any size, or only as the named layouts have them.
        exact: whether a device's strategies are the best there are, or to a ten-thousandth of its time.
        time_limit_s: of both searches together; the best plan so far then states its gap. A first uniform plan is looked for
            however long that takes.

    Raises:
        SpecError: a fixed or forbidden choice is unknown.
        Infeasible: nothing fits, layer-wise or not.
        SolverError: the time was over before a plan was found that fits, or before it was known that there is none.
        Interrupted: the user pressed Ctrl-C; carries the best plans so far.
    """
    uniform: SearchResult | None = None
    refusal: Infeasible | None = None
    finished = True
    limit = TimeLimit(time_limit_s)
    try:
        # One plan is enough to begin with: bounds of layers exclude most of what other uniform plans would be looked for in.
        uniform, finished = search_until(problem, top, on_progress, np.inf, perf_counter())
    except Infeasible as error:
        refusal = error
    run = _Search(problem, uniform, solver, uneven, exact)
    try:
        with limit.enforced():
            run.begin()
        if run.best is None and not finished:
            # Nothing near it is better: then it is no bar for bounds, and the best uniform plan is.
            end_s = perf_counter() + _UNIFORM * limit.left_s
            uniform, finished = search_until(problem, top, on_progress, np.inf, end_s)
            run = _Search(problem, uniform, solver, uneven, exact)
            with limit.enforced():
                run.begin()
        with limit.enforced():
            run.go()
        if uniform is not None and not finished and limit.left_s:
            below_s = min(uniform.best.estimate.step_time_s, run.alike_s() * _COMPANY)
            with suppress(Infeasible):  # where none of the rows that are left has a uniform plan
                known = run.rows(), run.space.made()
                rest, _ = search_until(problem, top, None, below_s, limit.end_s, *known)
                uniform = joined(uniform, rest)
        with limit.enforced():
            run.certify(_LONGEST_S if uniform is None else uniform.best.estimate.step_time_s)
    except OutOfTimeError:
        run.account.stopped = "time"
    except KeyboardInterrupt:
        run.account.stopped = "interrupted"
    account = run.finished()
    best = run.simplest(_LONGEST_S if uniform is None else uniform.best.estimate.step_time_s)
    plans = proved_plans(problem, best, account, uniform, top)
    if plans and (best is None or best is not run.best) and run.best is not None:
        first = plans[0].optimality
        told = f"{first.solver}; the simplest of those {f'within {run.tie:.1%} of' if run.tie else 'as fast as'} the fastest"
        plans = replace(plans[0], optimality=replace(first, solver=told)), *plans[1:]
    stopped = account.stopped == "interrupted"
    if not plans:
        if stopped:
            raise Interrupted(None, "before any plan was priced that fits")
        assert refusal is not None
        raise account.failure(refusal)
    report = SearchReport(0, 0, 0, {}, {}, 0.0) if uniform is None else uniform.search
    report = replace(report, wall_s=report.wall_s + account.wall_s)
    front = () if uniform is None else uniform.pareto
    result = SearchResult(plans, report, front, layerwise=asdict(account))
    if stopped:
        raise Interrupted(result)
    return result


class _Search:
    """Args: as for :func:`search_layerwise`; plans have to beat the best of the ``uniform`` ones, if there are any."""

    def __init__(
        self,
        problem: Problem,
        uniform: SearchResult | None,
        solver: str,
        uneven: bool,
        exact: bool,
    ) -> None:
        self.start_s = perf_counter()
        self.problem = problem
        self.best_s = _LONGEST_S if uniform is None else uniform.best.estimate.step_time_s
        self.known: Mapping[str, object] = {} if uniform is None else uniform.best.knobs
        self.solver: Solver = SOLVERS[solver]
        self.tolerance = _TOLERANCE if solver == "auto" and not exact else 0.0
        self.near = 0.0 if exact else _NEAR
        self.tie = _TIE if self.tolerance else 0.0
        self.taken_s = 0.0  # step time of the plan that is taken instead of the best one, when that is known
        if solver == "auto":
            self.solver = partial(automatic, tolerance=self.tolerance)
        self.uneven = uneven
        self.best: Candidate | None = None
        self._from: Settler | None = None
        self.account = Account(solver, _SPACE)
        self._left: list[_Open] = []
        self._opened = 0  # deals
        self._done: list[float] = []
        self._sharp: set[int] = set()  # prefixes whose tables have bounded their deals
        # Of every deal, what no plan whose layers are alike is faster than; with its prefix and row.
        self._alike_s: dict[int, tuple[float, int, int]] = {}
        self._paths: Paths = {}
        self._rough: dict[tuple[int, int, str], DeviceCosts] = {}
        self._bounded: dict[tuple[int, int], Mesh] = {}  # with which the deals of a row were looked at first
        self._known: dict[tuple[int, int], Known] = defaultdict(Known)

    def begin(self) -> None:
        """Opens the space, and looks for a plan near the uniform one."""
        self.uniform = UniformSearch(self.problem, 1, lambda batch: [])
        self.space = LayerwiseSpace(self.uniform, self.best_s, self.uneven)
        pp, bound_s = self.space.least(self.best_s)
        if self.known and bound_s < self.best_s:
            # Any plan that is nearly as good as the best one saves the bounds of many meshes.
            few_s = min(self.best_s, _AROUND * bound_s)
            for deal in self.space.likeliest(pp, few_s, self.known)[:_FIRST]:
                if self.best is None:
                    self._likely(deal)

    def go(self) -> None:
        """Looks closer at the deal with the smallest bound, until none is below the best plan."""
        looks = 0  # since strategies were chosen
        while True:
            ask()
            pp, bound_s = self.space.least(self.within_s)
            if min(bound_s, self._left[0].bound_s if self._left else np.inf) >= self.enough_s:
                return
            if not self._left or bound_s < self._left[0].bound_s:
                self._open(pp)
                continue
            first, settled = self._left[0], self.account.settled
            if looks >= _PATIENCE and first.bound_s < self.best_s * (1.0 - _FAR):
                first = min((deal for deal in self._left if deal.looks > _BOUND), default=first)
                looks = 0
            if first.looks < _BOUND:
                if not self._looked(first):
                    self._look(first, to_the_end=False)
                looks += 1
                continue
            if first.part not in self._sharp:
                self._sharpen(first.part)
                continue
            # The first deals are looked at to the end: a plan, not a bound, is what excludes others.
            self._look(first, to_the_end=not settled or not looks)
            looks = looks + 1 if self.account.settled == settled else 1

    @property
    def enough_s(self) -> float:
        """A bound above which no plan is told apart from the best one so far, or from the one that is taken instead."""
        return max(self.best_s, self.taken_s) * (1.0 - self.tie)

    @property
    def within_s(self) -> float:
        """What ties with the best plan so far is faster."""
        return self.best_s * (1.0 + self.tie)

    def rows(self) -> dict[Named, NDArray[np.intp]] | None:
        """Places of each prefix's rows in the uniform space whose plans may tie with the best one; None where it is not known."""
        if not self.space.whole():
            return None
        open_ = [at for bound_s, *at in self._alike_s.values() if bound_s < self.within_s]
        own: dict[int, set[int]] = defaultdict(set)
        for part, row in (*open_, *self.space.places(self.within_s)):
            own[part].add(row)
        places = {part: self.space.at[part][sorted(rows)] for part, rows in own.items()}
        return self.space.others | {named(self.space.parts[p].tables.recipe): at for p, at in places.items()}

    def alike_s(self) -> float:
        """Step time of a plan with the best one's degrees whose layers are alike; infinite where there is none."""
        if self.best is None or self._from is None:
            return np.inf
        return self._from.simpler(self.best, np.inf).step_s

    def simplest(self, alike_s: float) -> Candidate | None:
        """The simplest plan that is as fast as the best one, as far as a tie goes; None where a uniform plan (whose step time is
        given) is that simple."""
        if self.best is None or self._from is None:
            return self.best
        within_s = self.best_s * (1.0 + self.tie)
        if alike_s <= within_s:
            return None
        found = self._from.simpler(self.best, within_s)
        if (
            found.step_s < self.best_s
        ):  # strategies were chosen by bounds of a step, and this is the schedule's
            self.best, self.best_s = found, found.step_s
        return found

    def certify(self, alike_s: float) -> None:
        """Looks on until no plan can be told apart from the simplest one either, which the best uniform plan may be."""
        while self.tie and self.best is not None:
            found = self.simplest(alike_s)
            taken_s = alike_s if found is None else found.step_s
            if taken_s <= max(self.best_s, self.taken_s):
                return
            self.taken_s = taken_s
            self.go()

    def _open(self, pp: int) -> None:
        """Bounds a prefix by memory or, once all are that matter, opens the deals of a pipeline degree."""
        if self.space.pool(self.enough_s, self.within_s):
            return
        deals = self.space.deals_of(pp, self.within_s)
        new = [_Open(*deal.rank(), number, deal) for number, deal in enumerate(deals, self._opened)]
        self._opened += len(new)
        self._alike_s |= {open_.number: (open_.bound_s, open_.part, open_.row) for open_ in new}
        self._left += new
        heapify(self._left)
        if self._left and self.best is None and not self.known:
            self._look(self._left[0], to_the_end=True)

    def _looked(self, first: _Open) -> bool:
        """Takes the first look at all deals of a deal's mesh, and again when strategies have got tables; whether there was any to
        take."""
        if first.looks > _ROUGH:
            self.space.price(first.deal)
        row, mesh = (first.part, first.row), self.space.lower(first.deal)
        if first.looks > _ROUGH and self._bounded.get(row) is mesh:
            return False
        self._bounded[row] = mesh
        several = [open_ for open_ in self._left if (open_.part, open_.row) == row]
        bounds = self._roughly([open_.deal for open_ in several])
        for open_, bound_s in zip(several, bounds, strict=True):
            self._alike_s[open_.number] = max(bound_s, self._alike_s[open_.number][0]), *row
        self._renew(several, bounds, _LIKELY, "stages")
        return True

    def _sharpen(self, part: int) -> None:
        """Bounds all deals of a prefix anew, by the tables that the first of them needs anyway."""
        several = [open_ for open_ in self._left if open_.part == part]
        bounds = self.space.sharper(part, [open_.deal for open_ in several], self.best_s)
        self._renew(several, bounds, _BOUND, "memory")
        self._sharp.add(part)

    def _renew(self, several: Sequence[_Open], bounds: Sequence[float], looks: int, reason: str) -> None:
        """Notes new bounds of some deals after a look at them; what they exclude is counted under a reason."""
        new = {open_.number: bound_s for open_, bound_s in zip(several, bounds, strict=True)}
        left = [
            replace(open_, bound_s=max(open_.bound_s, new[open_.number]), looks=max(open_.looks, looks))
            if open_.number in new
            else open_
            for open_ in self._left
        ]
        self._left = [open_ for open_ in left if open_.bound_s < self.best_s]
        self.account.exclude(reason, len(left) - len(self._left))
        heapify(self._left)

    def _look(self, deal: _Open, *, to_the_end: bool) -> None:
        """Looks closer at a deal, once or until it has a plan, and keeps, settles or excludes it; its old bound counts until the
        new one does."""
        seen, settled = replace(deal, looks=max(deal.looks, _LIKELY)), self.account.settled
        bound_s, more = self._closer(seen)
        while to_the_end and more and bound_s < self.enough_s and self.account.settled == settled:
            seen = replace(seen, bound_s=bound_s, looks=seen.looks + 1)
            bound_s, more = self._closer(seen)
        if self._left[0] is deal:
            heappop(self._left)
        else:
            self._left.remove(deal)
            heapify(self._left)
        if more and bound_s < self.best_s:
            heappush(self._left, replace(seen, bound_s=bound_s, looks=seen.looks + 1))
        else:
            self._done.append(bound_s)
        if bound_s >= self.best_s:
            self.account.exclude("stages")

    def finished(self) -> Account:
        """The account of the search, when it has ended for whatever reason."""
        bounds = [deal.bound_s for deal in self._left] + self._done
        if not hasattr(self, "space"):
            bounds.append(kernel_floor_s(self.problem) / self.problem.cluster.devices)
        else:
            bounds.append(self.space.least(self.best_s)[1])
            self.account.parts = self.space.meshes
            for reason, count in self.space.excluded.items():
                self.account.exclude(reason, count)
        self.account.close(bounds, self.best_s, self.start_s)
        return self.account

    def _closer(self, open_: _Open) -> tuple[float, bool]:
        """What a deal is not faster than at a closer look, and whether there is more to see; keeps what is better on the way."""
        if open_.looks == _LIKELY:
            bound_s = max(self._likely(open_.deal), open_.bound_s)
            return bound_s, bound_s < self.enough_s
        if not open_.settlers:
            open_.settlers.extend(self._settlers(open_.deal))
        bound_s = min((self._with(settler, open_.looks) for settler in open_.settlers), default=np.inf)
        return max(bound_s, open_.bound_s), open_.looks < _PLANS

    def _roughly(self, deals: Sequence[Deal]) -> list[float]:
        """What deals of a mesh are not faster than before it has all tables, chunks of a device as one: alike for many."""
        mesh, found = self.space.lower(deals[0]), dict[Deal, float]()
        for order, several in groupby(sorted(deals, key=_order_as_one), _order_as_one):
            some, key = list(several), (deals[0].part, deals[0].row, order)
            if key not in self._rough or self._rough[key].mesh is not mesh:
                self._rough[key] = self._costs(deals[0], mesh, order, 1, filled=False)
            costs = self._rough[key]
            found |= first_bounds(costs, some, self.enough_s)
            for deal in some:
                if deal.layout is None:
                    found[deal] = self._settler(deal, mesh, costs).bound_s(self.enough_s)
        return [found[deal] for deal in deals]

    def _costs(self, deal: Deal, mesh: Mesh, order: str, chunks: int, *, filled: bool = True) -> DeviceCosts:
        """Of the deal's devices, with what is known of them from other deals."""
        known = self._known[deal.part, deal.row]
        return DeviceCosts(self.problem, mesh, order, chunks, self.solver, self.tolerance, known, filled)

    def _likely(self, deal: Deal) -> float:
        """What a deal is not faster than, once the strategies of its best plans have tables, and no others; looks for plans."""
        if self.problem.launcher is not None:
            return 0.0  # the mesh's strategies may not stand side by side
        self.space.price(deal)
        best_s = self.best_s
        (bound_s,) = self._roughly([deal])
        if bound_s >= self.enough_s:
            return bound_s
        settler = self._settler(deal, self.space.lower(deal))
        for _ in range(_ROUNDS):
            if settler.bound_s(self.enough_s) >= self.enough_s:
                break
            found = next(settler.candidates(np.inf), None)
            if found is None or not self.space.price(deal, settler.used(found)):
                break
            settler = self._settler(deal, self.space.lower(deal))
            self._take(settler.repriced(found), settler)
        self.account.settled += self.best_s < best_s
        return settler.bound_s(self.enough_s)

    def _take(self, found: Candidate, settler: Settler) -> None:
        """Keeps a plan, if it is the best so far."""
        if found.step_s < self.best_s:
            self.best, self.best_s, self._from = found, found.step_s, settler

    def _settler(self, deal: Deal, mesh: Mesh, costs: DeviceCosts | None = None) -> Settler:
        """What bounds a deal with some strategies and finds its plans."""
        chunks = 1 if deal.layout is None else deal.layout.virtual_stages
        costs, space = costs or self._costs(deal, mesh, deal.order, chunks), self.space
        return Settler(deal, mesh, costs, space.order, space.kinds, self.uniform.branches, self._paths)

    def _settlers(self, deal: Deal) -> Iterator[Settler]:
        """One, or one per mixture of strategies that a launcher runs."""
        mesh, launcher = self.space.mesh(deal), self.problem.launcher
        for some in [mesh] if launcher is None else mesh.runnable(launcher, self.uniform.branches):
            yield self._settler(deal, some)

    def _with(self, settler: Settler, look: int) -> float:
        """What no plan with a mesh's strategies is faster than; looks for a better plan, if that is the look to take."""
        bound_s = settler.bound_s(self.best_s)
        if look > _BOUND and bound_s < self.best_s:
            bound_s = max(bound_s, settler.path_s(self.best_s))
        if look < _PLANS or bound_s >= self.best_s:
            return bound_s
        self.account.settled += 1
        for found in settler.candidates(self.best_s):
            self._take(found, settler)
            if bound_s < self.best_s:
                bound_s = max(bound_s, settler.path_s(self.best_s, found))
            if settler.walks is not None and bound_s >= self.best_s * (1.0 - self.near):
                return bound_s
        return max(bound_s, settler.proved_s())


@dataclass(frozen=True, slots=True, order=True)
class _Open:
    """A deal that may hold a better plan, and how closely it was looked at."""

    bound_s: float
    part: int
    row: int
    number: int
    deal: Deal = field(compare=False)
    looks: int = field(default=0, compare=False)
    settlers: list[Settler] = field(default_factory=list, compare=False)


def _order_as_one(deal: Deal) -> str:
    """The order under which a device with all its chunks as one has no more in flight than under the deal's."""
    return deal.order if deal.layout is None or deal.layout.virtual_stages == 1 else "1f1b"
