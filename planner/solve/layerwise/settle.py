"""One deal: a tighter bound from its stages' budgets, then plans, priced by the schedule engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.ledger import Array
from planner.pipeline.assignment import Assignment, Runs
from planner.pipeline.composer import memory, phase_seconds
from planner.pipeline.layout import Layout, deal_layers, layouts
from planner.pipeline.step_time import exact_step_s
from planner.solve.branches import Branches
from planner.solve.layerwise.devices import Device, DeviceCosts, Goal, Solved
from planner.solve.layerwise.relaxation import path_factor
from planner.solve.layerwise.simpler import Taken, simplest, taken_by
from planner.solve.layerwise.space import Deal
from planner.solve.layerwise.stages import Line, cut, least_sum, line_cost, smallest_limit
from planner.solve.layerwise.strategies import Mesh
from planner.solve.layerwise.waits import least_hop_s, waiting_s
from planner.solve.layerwise.walks import Paths, Walks

__all__ = ["Candidate", "Settler", "in_order"]

_PRECISION = 2e-5  # of the dearest stage of open cuts, by which its bound is lower
_MOVES = 4  # heaviest stages from which a layer is moved, and lightest stages to which


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A plan with its step time by the schedule engine, and the seconds of its virtual stages (forward, backward)."""

    step_s: float
    stages_s: Array
    mesh: Mesh
    deal: Deal
    assignment: Assignment
    layout: Layout


class Settler:
    """Bounds and plans of one deal.

    Args:
        deal, mesh: the deal and its mesh with some of its strategies.
        costs: of the mesh's devices under the deal's schedule; or, for bounds alone, with all chunks of a device as one, of which
            no fewer are in flight under any schedule than under 1F1B.
        order, kinds: the model's layers and block kinds.
        choices: what strategies are called.
        paths: critical ones through schedules; grows.
    """

    def __init__(
        self, deal: Deal, mesh: Mesh, costs: DeviceCosts, order: tuple[str, ...], kinds: tuple[str, ...], choices: Branches,
        paths: Paths | None = None,
    ) -> None:  # fmt: skip
        self.deal, self.mesh, self.costs, self.order, self.kinds = deal, mesh, costs, order, kinds
        self.choices = choices
        self.pp = mesh.pp
        self.stack = [kinds.index(kind) for kind in order]
        self.hop_s = least_hop_s(costs)
        layout, known = deal.layout, {} if paths is None else paths
        self.walks = None
        if layout is not None and mesh.pp > 1 and layout.virtual_stages == costs.virtual_stages:
            self.walks = Walks(costs, mesh, layout, deal.order, self.hop_s, known)
        self._limit: tuple[float, float] | None = None
        self._bound_s: float | None = None  # limits only fall, so that it holds for all later ones

    def bound_s(self, below_s: float) -> float:
        """No plan of the deal is faster (with the mesh's strategies); infinite where none is below a limit."""
        if self._bound_s is None:
            layout = self.deal.layout
            self._bound_s = (
                self._bound_of_cuts(below_s) if layout is None else self._bound_of(layout, below_s)
            )
        return self._bound_s

    def candidates(self, below_s: float) -> Iterator[Candidate]:
        """Plans that fit: of open cuts several partitions and their neighbours, each faster than a limit and the ones before;
        of a layout the strategies with which every device is done soonest, and those that are best along critical paths."""
        layout = self.deal.layout
        if layout is not None:
            yield from self._of_layout(layout)
            return
        tried: set[tuple[int, ...]] = set()
        best: Candidate | None = None
        for sizes in self._partitions():
            found = self._tried(sizes, tried)
            if found is not None and found.step_s < min(below_s, best.step_s if best else np.inf):
                best = found
                yield found
        while best is not None:
            better = min(
                (x for sizes in self._neighbours(best) if (x := self._tried(sizes, tried)) is not None),
                key=lambda x: x.step_s,
                default=None,
            )
            if better is None or better.step_s >= best.step_s:
                return
            best = better
            yield best

    def _of_layout(self, layout: Layout) -> Iterator[Candidate]:
        """Plans of a layout; each time one is taken, its own critical path joins those that the next one is best along."""
        found, best_s = self._priced(layout), np.inf
        while found is not None and found.step_s < best_s:
            best_s = found.step_s
            yield found
            goals = self.walks.goals() if self.walks else []
            found = self._together(layout, goals) if goals else None
        if found is not None:
            yield found

    def path_s(self, below_s: float, candidate: Candidate | None = None) -> float:
        """No plan of the deal's layout is faster than paths through its schedule let it: those that are critical in other deals,
        or under a candidate's seconds, or under the fastest ones. 0 where cuts are open."""
        if self.walks is None:
            return 0.0
        return self.walks.critical(below_s, None if candidate is None else candidate.stages_s)

    def proved_s(self) -> float:
        """The same with whole counts of layers for the best of these paths."""
        layout = self.deal.layout
        if self.walks is None or layout is None:
            return 0.0
        return self.walks.proved(lambda number: self._device(layout, number))

    # -- bounds --------------------------------------------------------------------------------------------------------

    def _bound_of(self, layout: Layout, below_s: float) -> float:
        """Every device works, and waits before and after it. Interleaved, paths that are known without the order bound too."""
        bound_s = float(waiting_s(self.costs, [layout], below_s)[0])
        if self.walks is None or bound_s >= below_s:
            return bound_s
        return max(bound_s, self.walks.without_order(below_s))

    def _bound_of_cuts(self, below_s: float) -> float:
        """Of every partition into stages: what its dearest stage costs, and paths through all of them.

        With ``X`` the most that a stage works on a micro-batch and ``S`` what all do, the path of 1F1B that begins with the first
        micro-batch down the pipeline, stays on the dearest stage and ends with the last one back up takes at least
        ``2S + (m − p − 1)·X``; GPipe's, which does all forwards of the dearest stage and then all its backwards on the way,
        ``S + (m − 1)·X``. Besides see :func:`~planner.solve.layerwise.relaxation.path_factor`.
        """
        m, p = self.mesh.micro_batches, self.pp
        whole = self._lines(work_only=False)
        found = smallest_limit(line_cost(whole), p, len(self.stack), 0.0, 2.0 * below_s, _PRECISION)
        if found is None:
            return np.inf
        self._limit = found
        least_s = found[0]
        if p == 1 or least_s >= below_s:
            return least_s
        alone = self._lines(work_only=True)
        within = [line.ends(below_s) for line in whole]
        through_s = least_sum(alone, within) / m
        hops_s = 2.0 * (p - 1) * self.hop_s
        factor = float(path_factor(self.deal.order, p, np.array([float(m)]))[0])
        bound_s = max(least_s, through_s * factor + hops_s)
        work = smallest_limit(line_cost(alone), p, len(self.stack), 0.0, 2.0 * below_s, _PRECISION)
        dearest_s = 0.0 if work is None else work[0] / m
        if self.deal.order != "1f1b":
            return max(bound_s, through_s + (m - 1.0) * dearest_s + hops_s)
        # Every p-th micro-batch waits for a round trip, the last one for as many stages as are left (costs.pipeline_bounds).
        laps = int(np.ceil((m - 1.0) / p))
        rest = m - 1 - (laps - 1) * p
        if m > 1:
            again = np.where(np.arange(p) >= p - rest, 1.0, 0.0)
            rounds_s = least_sum(alone, within, (laps + again) / m)
            bound_s = max(bound_s, rounds_s + laps * hops_s + 2.0 * (rest - 1) * self.hop_s)
        if m > p:
            bound_s = max(bound_s, 2.0 * through_s + (m - p - 1.0) * dearest_s + hops_s)
        return bound_s

    def _lines(self, *, work_only: bool) -> list[Line]:
        ends = [len(self.kinds) - 3, len(self.kinds) - 2]
        lines: list[Line] = []
        same: dict[tuple[bytes, bool, bool], Line] = {}
        for stage in range(self.pp):
            first, last = stage == 0, stage == self.pp - 1
            key = (self.costs.flights(stage).tobytes(), first, last)
            if key not in same:
                held = [end for end, here in zip(ends, (first, last), strict=True) if here]
                same[key] = self.costs.line(stage, self.stack, held, work_only)
            lines.append(same[key])
        return lines

    # -- plans ---------------------------------------------------------------------------------------------------------

    def _partitions(self) -> Iterator[tuple[int, ...]]:
        """Partitions worth a price: packed from the left, from the right, between the two, and the named ones."""
        p, layers = self.pp, len(self.stack)
        if self._limit is not None:
            lines = self._lines(work_only=False)
            left = cut(line_cost(lines), p, layers, self._limit[1])
            yield tuple(left)
            right = self._from_the_right(lines, self._limit[1])
            yield tuple(right)
            ends = (np.cumsum(left) + np.cumsum(right)) // 2
            yield tuple(np.diff([0, *ends]).tolist())
        for layout in layouts(self.order, self.kinds, p, 1):
            yield tuple(layout.counts[:, :-3].sum(axis=1).astype(int).tolist())

    def _from_the_right(self, lines: Sequence[Line], limit: float) -> list[int]:
        """Layers per stage if every stage from the last one takes as many as a limit allows."""
        sizes, end = [0] * self.pp, len(self.stack)
        for stage in range(self.pp - 1, -1, -1):
            start = end
            while start > 0 and (stage == 0 or lines[stage].cost(start - 1, end) <= limit):
                start -= 1
            sizes[stage], end = end - start, start
        return sizes

    def _neighbours(self, best: Candidate) -> Iterator[tuple[int, ...]]:
        """Partitions with one layer moved from a heavy stage to a light one."""
        counts = best.layout.counts
        table = self.mesh.table(self._columns(best.assignment))
        work = counts @ (table["forward_s"] + table["backward_s"] + table["weight_s"] + table["recompute_s"])
        rank = np.argsort(work[:, 0], kind="stable").tolist()
        sizes = counts[:, :-3].sum(axis=1).astype(int).tolist()
        for heavy in rank[::-1][:_MOVES]:
            for light in rank[:_MOVES]:
                if heavy != light and sizes[heavy] > 0:
                    moved = list(sizes)
                    moved[heavy] -= 1
                    moved[light] += 1
                    yield tuple(moved)

    def _tried(self, sizes: tuple[int, ...], tried: set[tuple[int, ...]]) -> Candidate | None:
        if sizes in tried:
            return None
        tried.add(sizes)
        return self._priced(deal_layers(self.order, self.kinds, self.pp, 1, sizes))

    def _priced(self, layout: Layout) -> Candidate | None:
        """The strategies of every device of a layout with which it is done soonest, priced together; None where a device has
        none."""
        backward = layout.chunks[0] @ (self.mesh.micro_batch_s - self.mesh["forward_s"]).min(axis=0)
        behind = np.concatenate([[0.0], np.cumsum(backward[:-1])]).tolist()
        return self._together(layout, [self.costs.in_step(ramp_s) for ramp_s in behind])

    def _together(self, layout: Layout, goals: Sequence[Goal]) -> Candidate | None:
        """The best strategies of every device for its goal, priced together; None where a device has none."""
        solved: list[Solved] = []
        for number in range(self.pp):  # the first ones hold most, and fail first
            found = self.costs.solve(self._device(layout, number), goals[number])
            if found is None:
                return None
            solved.append(found)
        stages = [
            in_order(solved[stage % self.pp].runs[stage // self.pp], kinds)
            for stage, kinds in enumerate(self._kinds_of(layout))
        ]
        embedding, head = solved[0].embedding, solved[-1].head
        assert embedding is not None
        assert head is not None
        return self._assigned((tuple(stages), embedding, head), layout)

    def simpler(self, best: Candidate, within_s: float) -> Candidate:
        """The simplest candidate that fits and takes no longer than that, with the layers of every stage as they are."""
        stack = self.costs.problem.stack
        batches = np.array([float(self.mesh.micro_batches)])
        room = float(self.costs.room + self.costs.idle)

        def price(taken: Taken) -> tuple[float, Candidate] | None:
            found = self._assigned(taken, best.layout)
            table = self.mesh.table(self._columns(found.assignment))
            peak, _, away = memory(
                table, found.layout, self.deal.order, batches, stack, self.mesh.communicators
            )
            tiers = self.costs.problem.cluster.slower_bytes
            fits = peak[0] <= room and all(away[tier][0] <= tiers[tier] for tier in away)
            return (found.step_s, found) if fits else None

        return simplest(self._taken(best.assignment), best, price, within_s)

    def repriced(self, found: Candidate) -> Candidate:
        """A candidate with other prices of its strategies: this mesh's."""
        return self._assigned(self._taken(found.assignment), found.layout)

    def used(self, found: Candidate) -> list[int]:
        """The numbers of a candidate's strategies in the mesh."""
        return self._numbers(found.assignment)

    def _taken(self, assignment: Assignment) -> Taken:
        """What an assignment takes, by the mesh's numbers."""
        numbers = self._numbers(assignment)
        stages, *ends = taken_by(assignment)
        own = tuple(tuple((numbers[s], n) for s, n in runs) for runs in stages)
        return own, numbers[ends[0]], numbers[ends[1]]

    def _assigned(self, taken: Taken, layout: Layout) -> Candidate:
        """The candidate of some strategies by their number in the mesh, priced by the schedule engine."""
        assignment = self.mesh.assignment(*taken, self.choices)
        wide = assignment.layout(self.order, self.pp)
        table = self.mesh.table(self._columns(assignment))
        step_s = float(exact_step_s([table], wide, self.deal.order, self.mesh.micro_batches, [None])[0])
        forward, backward, again = (x[:, 0] for x in phase_seconds(table))
        stages_s = np.stack([wide.counts @ forward, wide.counts @ (backward + again)])
        return Candidate(step_s, stages_s, self.mesh, self.deal, assignment, wide)

    def _columns(self, assignment: Assignment) -> list[tuple[str, int]]:
        """The assignment's columns, strategies by their number in the mesh."""
        own = self._numbers(assignment)
        return [(kind, own[s]) for kind, s in assignment.columns(self.order)]

    def _numbers(self, assignment: Assignment) -> list[int]:
        """The numbers in the mesh of an assignment's strategies."""
        return [self._number[tuple((slot, c.value) for slot, c in s.items())] for s in assignment.strategies]

    @cached_property
    def _number(self) -> dict[tuple[tuple[str, str], ...], int]:
        """The mesh's number of every strategy."""
        return {
            tuple((slot, c.value) for slot, c in self.choices.recipe(*branch).items()): index
            for index, branch in enumerate(self.mesh.branches)
        }

    def _device(self, layout: Layout, device: int) -> Device:
        layers = layout.chunks[:, device, :-3].astype(int)
        return Device(device, tuple(map(tuple, layers.tolist())), device == 0, device == self.pp - 1)

    def _kinds_of(self, layout: Layout) -> list[list[int]]:
        """Kinds of the layers of every virtual stage, in order."""
        ends = np.cumsum(layout.counts[:, :-3].sum(axis=1).astype(int)).tolist()
        return [self.stack[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def in_order(runs: Sequence[Runs], kinds: Sequence[int]) -> Runs:
    """Runs per kind as runs along the layers of a stage."""
    left = [[s for s, n in mine for _ in range(n)] for mine in runs]
    taken: list[list[int]] = []
    for kind in kinds:
        s = left[kind].pop(0)
        if taken and taken[-1][0] == s:
            taken[-1][1] += 1
        else:
            taken.append([s, 1])
    return tuple((s, n) for s, n in taken)
