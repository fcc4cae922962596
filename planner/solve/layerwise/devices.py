"""One device of a pipeline: its layers, its budgets, and the best strategies for them.

Strategies are limited to those with no larger a transient than each of those there are, in turn, and solved at the fullest
moment; whatever moment the answer does not fit in is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.costs.arrays import distinct
from planner.ledger import Array
from planner.pipeline.assignment import Runs
from planner.solve.layerwise.counts import SLACK, CountProblem, Counts, Group
from planner.solve.layerwise.device_bounds import BYTES, DeviceBounds, Known, exposed, in_tier, largest
from planner.solve.layerwise.duals import Cells, dual_s
from planner.solve.layerwise.planes import Planes, Ranges
from planner.solve.layerwise.solvers import Solver, proved
from planner.solve.layerwise.strategies import Mesh
from planner.specs.problem import Problem

__all__ = ["Device", "DeviceCosts", "DeviceGroup", "Goal", "Solved"]

_LIMITS = 3  # on the transient that are solved where a tolerance is given: the first is nearly always best
_PROVED = 6  # limits under which whole counts are proved


@dataclass(frozen=True, slots=True)
class Device:
    """What one device of a pipeline holds.

    Attributes:
        number: its place in the pipeline.
        layers: of each kind, per chunk.
        embedding, head: whether it holds them.
    """

    number: int
    layers: tuple[tuple[int, ...], ...]
    embedding: bool
    head: bool


@dataclass(frozen=True, slots=True)
class Goal:
    """What the strategies of a device are to minimise: some passes through its chunks, and what follows the last.

    Attributes:
        forwards, backwards: of every chunk.
        after: whether the update and what nothing hides of gradients and weights follows.
        ramp_s: what follows the passes beside that, if that is longer; None where nothing does.
        beside: another path, if that is longer: how often it passes every chunk, and what it takes elsewhere.
    """

    forwards: tuple[float, ...]
    backwards: tuple[float, ...]
    after: bool = True
    ramp_s: float | None = None
    beside: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Solved:
    """The best strategies of a device: runs per chunk and kind, and those of the ends that it holds."""

    seconds: float
    runs: tuple[tuple[Runs, ...], ...]
    embedding: int | None
    head: int | None


class DeviceCosts(DeviceBounds):
    """The best strategies of the devices of one mesh under one schedule."""

    def __init__(
        self, problem: Problem, mesh: Mesh, schedule: str, virtual_stages: int, solver: Solver, tolerance: float = 0.0,
        known: Known | None = None, filled: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(problem, mesh, schedule, virtual_stages, known, filled)
        self.solver, self.tolerance = solver, tolerance
        self._solved: dict[tuple[object, ...], Solved | None] = {}
        self._proved: dict[tuple[object, ...], float] = {}

    def in_step(self, ramp_s: float | None = 0.0) -> Goal:
        """A device's time in a step: all its micro-batches."""
        passes = (float(self.mesh.micro_batches),) * self.virtual_stages
        return Goal(passes, passes, True, ramp_s)

    def solve(self, device: Device, goal: Goal | float = 0.0) -> Solved | None:
        """The best strategies that fit; None where none do. A number stands for a device's time with that ramp."""
        goal = goal if isinstance(goal, Goal) else self.in_step(goal)
        key = self._key(device, goal)
        if key not in self._solved:
            self._solved[key] = self._solve(device, goal)
        return self._solved[key]

    def proved_s(self, device: Device, goal: Goal) -> float:
        """What no strategies undercut, whole layers each, as far as branch and bound gets; infinite where none fit."""
        key = self._key(device, goal)
        if key not in self._proved:
            self._proved[key] = self._prove(device, goal)
        return self._proved[key]

    # -- details ---------------------------------------------------------------------------------------------------

    def _key(self, device: Device, goal: Goal) -> tuple[object, ...]:
        """What the best strategies depend on."""
        return (self.flights(device.number).tobytes(), device.layers, device.embedding, device.head, goal)

    def _fullest(self, device: int) -> int:
        """The moment that stands for all until another proves to be fuller."""
        return int(np.argmax(self.flights(device).sum(axis=1)))

    def _groups(self, device: Device, moments: Sequence[int], goal: Goal) -> list[DeviceGroup]:
        """Layers of one kind in chunks that are in flight and passed alike at some moments; what stands at the ends."""
        flights = self.flights(device.number)[list(moments)]
        passes = list(zip(goal.forwards, goal.backwards, strict=True))
        alike: dict[tuple[bytes, tuple[float, float], int], list[int]] = {}
        for chunk, layers in enumerate(device.layers):
            in_flight = flights[:, chunk].tobytes()
            for kind, n in enumerate(layers):
                if n:
                    alike.setdefault((in_flight, passes[chunk], kind), []).append(chunk)
        groups = []
        for (*_, kind), chunks in alike.items():
            size = sum(device.layers[chunk][kind] for chunk in chunks)
            groups.append(DeviceGroup(kind, tuple(chunks), size, flights[:, chunks[0]], passes[chunks[0]]))
        embedding, head = len(self.mesh.kinds) - 3, len(self.mesh.kinds) - 2
        if device.embedding:
            groups.append(DeviceGroup(embedding, (0,), 1, flights[:, 0], passes[0]))
        if device.head:
            groups.append(DeviceGroup(head, (self.virtual_stages - 1,), 1, flights[:, -1], passes[-1]))
        return groups

    def _problem(
        self, groups: Sequence[DeviceGroup], small: Sequence[Sequence[int]], limit: float, goal: Goal,
        known: tuple[Array, Array] | None = None,
    ) -> CountProblem:  # fmt: skip
        """The choice among some strategies of every group, with transients up to a limit; ``known``: the groups' sums."""
        mesh = self.mesh
        offset, sums = self._sums(groups, goal) if known is None else known
        costs = [sums[:, some, place] for place, some in enumerate(small)]
        kept = largest(offset, costs)
        made = []
        for group, some, cost in zip(groups, small, costs, strict=True):
            weights = group.flights[:, None]
            always, saved, step = (mesh[name][None, some, group.kind] for name in BYTES)
            rows = [always + self.growth * weights * saved, always + step]
            for tier in self.slower:
                held, away = (mesh[name][None, some, group.kind] for name in in_tier(tier))
                rows.append(held + weights * away)
            made.append(Group(group.size, cost[kept], np.concatenate(rows)))
        moments = len(groups[0].flights)
        budget = [self.room - self.growth * limit] * moments + [self.room]
        for capacity in self.slower.values():
            budget += [capacity] * moments
        return CountProblem(tuple(made), np.array(budget), offset[kept])

    def _solve(self, device: Device, goal: Goal) -> Solved | None:
        """Solves under each limit on the transient that may hold the best, in the order of their bounds; some of them, where the
        best need not be found to the last digit."""
        groups = self._groups(device, [self._fullest(device.number)], goal)
        if not groups:
            return None  # no device is left without work
        best: Solved | None = None
        known = self._sums(groups, goal)
        limits, bounds = self._limit_bounds(groups, *known)
        most = len(limits) if self.tolerance == 0.0 else _LIMITS
        for index in np.argsort(bounds, kind="stable").tolist()[:most]:
            if bounds[index] >= (np.inf if best is None else best.seconds * (1.0 - self.tolerance)):
                break
            found = self._within(device, float(limits[index]), goal, groups, known)
            if found is not None and (best is None or found.seconds < best.seconds):
                best = found
        return best

    def _prove(self, device: Device, goal: Goal) -> float:
        """The relaxation's bound under each limit on the transient, and for the smallest of them that of whole counts."""
        groups = self._groups(device, [self._fullest(device.number)], goal)
        if not groups:
            return np.inf
        known = self._sums(groups, goal)
        limits, bounds = self._limit_bounds(groups, *known)
        rank = np.argsort(bounds, kind="stable").tolist()
        least = np.inf
        for place, index in enumerate(rank):
            if bounds[index] >= least or place == _PROVED:
                return min(least, float(bounds[index]))
            small = self._small(groups, float(limits[index]))
            if not all(small):
                continue
            problem = self._problem(groups, small, float(limits[index]), goal, known)
            least = min(least, proved(problem, least, self.tolerance))
        return least

    def _limit_bounds(self, groups: Sequence[DeviceGroup], offset: Array, sums: Array) -> tuple[Array, Array]:
        """Limits on the transient, and what the relaxation proves of each of some groups' sums."""
        kinds = np.array([group.kind for group in groups])
        limits = distinct(
            np.concatenate([self.transient[self.fronts[kind], kind] for kind in kinds.tolist()])
        )
        held = self._held(kinds, np.array([group.flights[0] for group in groups]), self.names)
        transient = self.transient[self.useful][:, kinds]
        sums = sums[:, self.useful]
        some = largest(offset, list(sums.transpose(2, 0, 1)))
        offset, sums = offset[some], sums[some]
        size = np.array([float(group.size) for group in groups])
        if self.slower:
            # What is added is a block of its own, without bytes.
            alone = np.broadcast_to(offset[:, None, None], (*sums.shape[:2], 1))
            beside = [(0, 0), (0, 0), (0, 1)]
            ranges = Ranges(
                np.concatenate([sums, alone], axis=2), np.pad(held, beside), np.pad(transient, beside[1:]), limits,
                self._rooms(limits),
            )  # fmt: skip
            number = np.array([*size, 1.0])
            return limits, Planes(ranges, number[None], steep=False).of_ranges(number)
        cost = np.where(
            transient <= limits[:, None, None], sums[:, None], np.inf
        )  # (sums, limits, strategies, groups)
        many = cost.shape[0] * cost.shape[1]
        cells = Cells(
            np.repeat(np.arange(many), len(groups)), np.tile(kinds, many), np.tile(size, many), *[size] * 3
        )
        found, _ = dual_s(
            cost.transpose(2, 0, 1, 3).reshape(len(self.useful), -1), np.tile(held[0], many), cells,
            np.tile(self.room - self.growth * limits, len(some)),
        )  # fmt: skip
        bounds: Array = (found.reshape(len(some), -1) + offset[:, None]).max(axis=0)
        return limits, bounds

    def _sums(self, groups: Sequence[DeviceGroup], goal: Goal) -> tuple[Array, Array]:
        """The sums whose largest counts: what is added to each, and (sums, strategies, groups) of one block."""
        kinds = np.array([group.kind for group in groups])
        forwards, backwards = np.array([group.passes for group in groups]).T
        forward_s = self.mesh["forward_s"][:, kinds]
        passed = forwards * forward_s + backwards * (self.mesh.micro_batch_s[:, kinds] - forward_s)
        sums, offset = [], []
        if goal.after:
            gradients, weights = self._buckets(groups)
            sums.append(passed + exposed(self.mesh, gradients, weights, kinds))
            offset += [0.0] * 4
        if goal.ramp_s is not None or not goal.after:
            sums.append(passed[None])
            offset.append(goal.ramp_s or 0.0)
        if goal.beside is not None:
            passes, elsewhere_s = goal.beside
            sums.append(passes * self.mesh.micro_batch_s[None, :, kinds])
            offset.append(elsewhere_s)
        return np.array(offset), np.concatenate(sums)

    def _buckets(self, groups: Sequence[DeviceGroup]) -> tuple[float, float]:
        """Share of one bucket in the traffic of gradients and of weights."""
        counts = np.zeros(len(self.mesh.kinds))
        for group in groups:
            counts[group.kind] += group.size
        gradients, weights = (1.0 / max(float(counts @ each), 1.0) for each in self.buckets)
        return gradients, weights

    def _small(self, groups: Sequence[DeviceGroup], limit: float) -> list[list[int]]:
        """Strategies of every group whose transients keep a limit."""
        return [[s for s in self.fronts[g.kind] if self.transient[s, g.kind] <= limit] for g in groups]

    def _within(
        self, device: Device, limit: float, goal: Goal, groups: Sequence[DeviceGroup], known: tuple[Array, Array] | None
    ) -> Solved | None:  # fmt: skip
        """The best strategies under a limit on the transient; with the groups at the fullest moment, and their sums."""
        moments = [self._fullest(device.number)]
        while True:
            small = self._small(groups, limit)
            if not all(small):
                return None
            found = self.solver(self._problem(groups, small, limit, goal, known))
            if found is None:
                return None
            solved = self._named(device, groups, small, *found)
            fuller = self._overfull(device, solved, limit)
            if fuller is None:
                return solved
            moments.append(fuller)
            groups, known = self._groups(device, moments, goal), None

    def _overfull(self, device: Device, solved: Solved, limit: float) -> int | None:
        """The moment at which the strategies exceed a budget by most, if they do at any."""
        mesh, flights = self.mesh, self.flights(device.number)
        embedding, head = len(mesh.kinds) - 3, len(mesh.kinds) - 2
        taken = [
            (chunk, kind, s, n)
            for chunk, by_kind in enumerate(solved.runs)
            for kind, runs in enumerate(by_kind)
            for s, n in runs
        ]
        taken += [] if solved.embedding is None else [(0, embedding, solved.embedding, 1)]
        taken += [] if solved.head is None else [(self.virtual_stages - 1, head, solved.head, 1)]
        chunk, kind, s, n = (np.array(column) for column in zip(*taken, strict=True))
        always, saved, _ = (mesh[name][s, kind] * n for name in BYTES)
        held = (always.sum() + self.growth * (flights[:, chunk] @ saved)) / (self.room - self.growth * limit)
        for tier, capacity in self.slower.items():
            there, away = (mesh[name][s, kind] * n for name in in_tier(tier))
            held = np.maximum(held, (there.sum() + flights[:, chunk] @ away) / max(capacity, 1.0))
        worst = int(np.argmax(held))
        return worst if held[worst] > 1.0 + SLACK * 10 else None

    def _named(
        self, device: Device, groups: Sequence[DeviceGroup], small: Sequence[Sequence[int]], seconds: float, counts: Counts
    ) -> Solved:  # fmt: skip
        """Counts per group as runs per chunk and kind; the strategies that save least come first."""
        saved = self.mesh["saved_bytes"]
        runs: list[list[Runs]] = [[() for _ in layers] for layers in device.layers]
        ends: dict[int, int] = {}
        for group, some, taken in zip(groups, small, counts, strict=True):
            kind = group.kind
            used = [(float(saved[s, kind]), s, n) for s, n in zip(some, taken, strict=True) if n]
            left = [[s, n] for _, s, n in sorted(used)]
            if kind >= len(device.layers[0]):
                ends[kind] = left[0][0]
                continue
            for chunk in group.chunks:
                room = device.layers[chunk][kind]
                mine: list[tuple[int, int]] = []
                while room:
                    n = min(room, left[0][1])
                    mine.append((left[0][0], n))
                    left[0][1] -= n
                    room -= n
                    if not left[0][1]:
                        left.pop(0)
                runs[chunk][kind] = tuple(mine)
        embedding, head = len(self.mesh.kinds) - 3, len(self.mesh.kinds) - 2
        return Solved(seconds, tuple(map(tuple, runs)), ends.get(embedding), ends.get(head))


@dataclass(frozen=True, slots=True, eq=False)
class DeviceGroup:
    """Layers of one kind in some chunks: their micro-batches in flight at some moments, and their forwards and backwards."""

    kind: int
    chunks: tuple[int, ...]
    size: int
    flights: Array
    passes: tuple[float, float]
