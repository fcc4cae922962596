"""One device of a pipeline: its layers, its budgets, and the best strategies for them.

A device's time in a step is its micro-batches' work, then what nothing hides of gradients and weights. With traffic ``g``
beside ``b`` seconds of work, at least ``max(g − b, 0)`` of it is exposed
(:func:`planner.costs.overlap.uniform_bucket_exposure_s`, in many buckets), so that the time is the largest of four sums over
layers. Its bytes are sums too, but for the largest transient of a block at work: strategies are limited to those with no larger
a transient than each of those there are, in turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from planner.assignment import Runs
from planner.ledger import Array
from planner.pipeline import SLOWER, saturated
from planner.schedule.live import live_vectors
from planner.solve.layerwise.counts import SLACK, CountProblem, Counts, Group, bound, hull
from planner.solve.layerwise.solvers import Solver
from planner.solve.layerwise.stages import Line
from planner.solve.layerwise.strategies import Mesh
from planner.specs.problem import Problem

__all__ = ["Device", "DeviceCosts", "Solved"]

_LIMITS = 6  # on the transient that are looked at first
_BYTES = ("always_bytes", "saved_bytes", "step_bytes")


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
class Solved:
    """The best strategies of a device: runs per chunk and kind, and those of the ends that it holds."""

    seconds: float
    runs: tuple[tuple[Runs, ...], ...]
    embedding: int | None
    head: int | None


class DeviceCosts:
    """Costs and budgets of the devices of one mesh under one schedule."""

    def __init__(
        self, problem: Problem, mesh: Mesh, schedule: str, virtual_stages: int, solver: Solver
    ) -> None:
        self.mesh, self.schedule, self.virtual_stages, self.solver = mesh, schedule, virtual_stages, solver
        stack = problem.stack
        self.growth = 1.0 + stack.fragmentation.value
        idle = stack.framework_bytes.value + stack.communicator_bytes.value * mesh.communicators
        self.room = problem.memory_budget_bytes - idle
        self.transient = mesh["block_bytes"] + mesh["recomputed_bytes"]
        self.costs = _costs(mesh)
        self.slower = {
            tier: float(capacity)
            for tier, capacity in problem.cluster.slower_bytes.items()
            if mesh[f"{tier}_bytes"].any() or mesh[f"{tier}_saved_bytes"].any()
        }
        depth = saturated(schedule, mesh.pp, virtual_stages, mesh.micro_batches)
        self.depth = int(depth)
        self._solved: dict[tuple[object, ...], Solved | None] = {}
        self.fronts = _front(self.costs, mesh, self.transient)

    def flights(self, device: int) -> Array:
        """Micro-batches in flight of each chunk at each of the device's fullest moments, (moments, chunks)."""
        return _flights(self.schedule, self.mesh.pp, self.depth, self.virtual_stages, device)

    def bound_s(self, device: Device, ramp_s: float = 0.0) -> float:
        """No strategies make the device faster; infinite where none fit."""
        groups = self._groups(device, [self._fullest(device.number)])
        every = [self.fronts[group.kind] for group in groups]
        least = max(float(self.transient[some, g.kind].min()) for g, some in zip(groups, every, strict=True))
        return bound(self._problem(groups, every, least, ramp_s))

    def solve(self, device: Device, ramp_s: float = 0.0) -> Solved | None:
        """The best strategies that fit; None where none do."""
        key = (self.flights(device.number).tobytes(), device.layers, device.embedding, device.head, ramp_s)
        if key not in self._solved:
            self._solved[key] = self._solve(device, ramp_s)
        return self._solved[key]

    def line(self, device: int, order: Sequence[int], ends: Sequence[int], work_only: bool = False) -> Line:
        """A lower bound of a device's seconds by the layers it holds, for pipelines with one stage per device.

        The dual of the linear relaxation at every price that some trade of memory for time would fetch.

        Args:
            order: kind of every layer.
            ends: kinds of what the device holds besides: embedding, head.
            work_only: the micro-batches' work without what follows the last.
        """
        weight = float(self.flights(device).max())
        held = self.mesh["always_bytes"] + self.growth * weight * self.mesh["saved_bytes"]
        costs = self.costs[4:] if work_only else self.costs[:4]
        kinds = sorted({*order, *ends})
        least = max((min(float(self.transient[s, k]) for s in self.fronts[k]) for k in kinds), default=0.0)
        room = self.room - self.growth * least
        prices = self._prices(costs, held, kinds)
        offset, sums = [], []
        for cost in costs:
            for price in prices:
                priced = np.min(cost + price * held, axis=0)
                offset.append(sum(float(priced[k]) for k in ends) - price * room)
                sums.append(np.concatenate([[0.0], np.cumsum(priced[list(order)])]))
        return Line(np.array(offset), np.array(sums))

    # -- details ---------------------------------------------------------------------------------------------------

    def _prices(self, costs: Array, held: Array, kinds: Sequence[int]) -> list[float]:
        found = {0.0}
        for cost in costs:
            for kind in kinds:
                c, h = cost[:, kind], held[:, kind]
                chain = hull(c, h)
                found |= {float((c[b] - c[a]) / (h[a] - h[b])) for a, b in itertools.pairwise(chain)}
        return sorted(found)

    def _fullest(self, device: int) -> int:
        """The moment that stands for all until another proves to be fuller."""
        return int(np.argmax(self.flights(device).sum(axis=1)))

    def _groups(self, device: Device, moments: Sequence[int]) -> list[_Group]:
        """Layers of one kind in chunks that are in flight alike at some moments; what stands at the ends."""
        flights = self.flights(device.number)[list(moments)]
        alike: dict[tuple[bytes, int], _Group] = {}
        for chunk, layers in enumerate(device.layers):
            for kind, n in enumerate(layers):
                if n:
                    key = (flights[:, chunk].tobytes(), kind)
                    group = alike.get(key, _Group(kind, (), 0, flights[:, chunk]))
                    alike[key] = _Group(kind, (*group.chunks, chunk), group.size + n, group.flights)
        groups = list(alike.values())
        embedding, head = len(self.mesh.kinds) - 3, len(self.mesh.kinds) - 2
        if device.embedding:
            groups.append(_Group(embedding, (0,), 1, flights[:, 0]))
        if device.head:
            groups.append(_Group(head, (self.virtual_stages - 1,), 1, flights[:, -1]))
        return groups

    def _problem(
        self, groups: Sequence[_Group], small: Sequence[Sequence[int]], limit: float, ramp_s: float
    ) -> CountProblem:
        """The choice among some strategies of every group, with transients up to a limit."""
        mesh = self.mesh
        offset = np.array([0.0] * 4 + [ramp_s])
        costs = [self.costs[:, some, group.kind] for group, some in zip(groups, small, strict=True)]
        sums = _largest(offset, costs)
        made = []
        for group, some, cost in zip(groups, small, costs, strict=True):
            weights = group.flights[:, None]
            always, saved, step = (mesh[name][None, some, group.kind] for name in _BYTES)
            rows = [always + self.growth * weights * saved, always + step]
            for tier in self.slower:
                held, away = (mesh[name][None, some, group.kind] for name in _in_tier(tier))
                rows.append(held + weights * away)
            made.append(Group(group.size, cost[sums], np.concatenate(rows)))
        moments = len(groups[0].flights)
        budget = [self.room - self.growth * limit] * moments + [self.room]
        for capacity in self.slower.values():
            budget += [capacity] * moments
        return CountProblem(tuple(made), np.array(budget), offset[sums])

    def _solve(self, device: Device, ramp_s: float) -> Solved | None:
        """Solves at the fullest moment; adds whatever moment the answer does not fit in, until it fits in all."""
        best: Solved | None = None
        kinds = {group.kind for group in self._groups(device, [0])}
        if not kinds:
            return None  # no device is left without work
        limits = sorted({float(self.transient[s, k]) for k in kinds for s in self.fronts[k]}, reverse=True)
        # What a limit bounds from below falls and rises with it, or nearly so: look closely around the best of a few.
        bounds: dict[int, float] = {}

        def look(index: int) -> float:
            if index not in bounds:
                bounds[index] = self._limit_bound(device, limits[index], ramp_s)
            return bounds[index]

        step = max(1, len(limits) // _LIMITS)
        at = min(range(0, len(limits), step), key=look)
        while step > 1:
            step = (step + 1) // 2
            near = range(max(at - step, 0), min(at + step, len(limits) - 1) + 1, step)
            at = min((at, *near), key=look)
        for index in sorted(bounds, key=lambda index: (look(index), index)):
            if look(index) >= (np.inf if best is None else best.seconds):
                break
            found = self._within(device, limits[index], ramp_s)
            if found is not None and (best is None or found.seconds < best.seconds):
                best = found
        return best

    def _limit_bound(self, device: Device, limit: float, ramp_s: float) -> float:
        groups = self._groups(device, [self._fullest(device.number)])
        small = self._small(groups, limit)
        return bound(self._problem(groups, small, limit, ramp_s)) if all(small) else np.inf

    def _small(self, groups: Sequence[_Group], limit: float) -> list[list[int]]:
        """Strategies of every group whose transients keep a limit."""
        return [[s for s in self.fronts[g.kind] if self.transient[s, g.kind] <= limit] for g in groups]

    def _within(self, device: Device, limit: float, ramp_s: float) -> Solved | None:
        """The best strategies under a limit on the transient."""
        moments = [self._fullest(device.number)]
        while True:
            groups = self._groups(device, moments)
            small = self._small(groups, limit)
            if not all(small):
                return None
            found = self.solver(self._problem(groups, small, limit, ramp_s))
            if found is None:
                return None
            solved = self._named(device, groups, small, *found)
            fuller = self._overfull(device, solved, limit)
            if fuller is None:
                return solved
            moments.append(fuller)

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
        always, saved, _ = (mesh[name][s, kind] * n for name in _BYTES)
        held = (always.sum() + self.growth * (flights[:, chunk] @ saved)) / (self.room - self.growth * limit)
        for tier, capacity in self.slower.items():
            there, away = (mesh[name][s, kind] * n for name in _in_tier(tier))
            held = np.maximum(held, (there.sum() + flights[:, chunk] @ away) / max(capacity, 1.0))
        worst = int(np.argmax(held))
        return worst if held[worst] > 1.0 + SLACK * 10 else None

    def _named(
        self, device: Device, groups: Sequence[_Group], small: Sequence[Sequence[int]], seconds: float, counts: Counts
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
class _Group:
    """Layers of one kind in some chunks, and their micro-batches in flight at some moments."""

    kind: int
    chunks: tuple[int, ...]
    size: int
    flights: Array


def _costs(mesh: Mesh) -> Array:
    """Five sums, (5, strategies, kinds): a device's seconds with nothing, gradients, weights, both exposed; its work alone."""
    work = mesh.micro_batches * mesh.micro_batch_s
    beside = mesh["backward_s"] + mesh["weight_s"] + mesh["recompute_s"]
    gradients = mesh["gradients_step_s"] - beside
    weights = mesh["weights_step_s"] - mesh["forward_s"]
    serial = work + mesh["main_step_s"]
    return np.stack([serial, serial + gradients, serial + weights, serial + gradients + weights, work])


def _front(costs: Array, mesh: Mesh, transient: Array) -> list[list[int]]:
    """Per kind, strategies that no other equals or beats in all of time and memory."""
    names = (*_BYTES, *(name for tier in SLOWER for name in _in_tier(tier)))
    columns = np.concatenate([costs, np.stack([*(mesh[name] for name in names), transient])])
    fronts = []
    for kind in range(len(mesh.kinds) - 1):
        values = columns[:, :, kind].T
        kept: list[int] = []
        for s in np.lexsort(values.T[::-1]).tolist():
            if not kept or not np.any(np.all(values[kept] <= values[s], axis=1)):
                kept.append(s)
        fronts.append(sorted(kept))
    return fronts


def _in_tier(tier: str) -> tuple[str, str]:
    """Fields of what a slower tier holds: throughout, and per micro-batch in flight."""
    return f"{tier}_bytes", f"{tier}_saved_bytes"


def _largest(offset: Array, costs: Sequence[Array]) -> list[int]:
    """Sums that may be the largest: no other is as large for every strategy."""
    rows = np.concatenate([offset[:, None], *costs], axis=1)
    kept: list[int] = []
    for i in np.lexsort(rows.T[::-1])[::-1].tolist():
        if not any(np.all(rows[j] >= rows[i]) for j in kept):
            kept.append(i)
    return sorted(kept)


@lru_cache(maxsize=4096)
def _flights(schedule: str, pp: int, depth: int, virtual_stages: int, device: int) -> Array:
    return live_vectors(schedule, pp, depth, virtual_stages, device, np.eye(virtual_stages))
