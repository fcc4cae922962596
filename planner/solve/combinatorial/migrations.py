"""Moves of tensors on a clock: what leaves the device, where to, and how early it comes back; kernels wait only for what is late.

The problem is that of :mod:`~planner.solve.combinatorial.tiering`, between its two ways to count moves: none stops the kernels,
and none is free of the clock. Every tier has one link out and one back, first come first served. A tensor leaves when the
kernel that used it ends, and its room is free when it is gone; it comes back as soon as every kernel until its next use leaves
room for it, those that are needed first before others. A step is what steps without end take each.

Rests are chosen as G10 does: the one that relieves overfull kernels of most bytes times seconds, again and again, in the tier
where kernels wait least. The integer program's placement is tried as well, and the better of the two is improved rest by rest.

Source: H. Zhang et al. 2023 (G10, MICRO 2023, arXiv:2310.09443), by its authors' code (github.com/platformxlab/G10,
``src/analysis.cc``: ``scheduling_prefetch``). Theirs looks for free bandwidth on a table of kernels; this plays the moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.solve.combinatorial.certificate import Clock, certify
from planner.solve.combinatorial.tiering import (
    Floats,
    Gap,
    Placement,
    Rest,
    TieringProblem,
    held_bytes,
    link_s,
    place,
    rests_of,
    too_large,
)

__all__ = ["SCHEDULED", "migrate", "migrate_all"]

SCHEDULED = "scheduled"

Tiers: TypeAlias = NDArray[np.int_]  # of every rest

_STEPS = 3  # the last of them is taken for one of many
_ROUNDING = 1e-9


def migrate(
    problem: TieringProblem, *, backend: str = "scipy", time_limit_s: float | None = None
) -> Placement:
    """Rests and moves with a short step, and the bound that neither kernels nor the busiest link can beat.

    Raises:
        Infeasible: the tensors of one kernel do not fit in the first tier, or all tensors not in all tiers.
        SolverError: the integer program fails.
    """
    clock = Clock(time_limit_s)
    case = _Case.of(problem)
    half_s = None if clock.left_s is None else clock.left_s / 2.0
    loads = place(replace(problem, moves="overlapped"), backend=backend, time_limit_s=half_s)
    found = [case.tiers_of(loads.rests)]
    greedy = _relieved(case, clock)
    if greedy is not None:
        found.append(greedy)
    best = min(found, key=case.time_s)
    best = _improved(case, best, loads.certificate.bound, clock)
    return _answer(case, best, loads.certificate.bound, "largest relief, improved rest by rest", clock)


def migrate_all(problem: TieringProblem) -> Placement:
    """Everything goes out after every use, to the first tier with room, and comes back as early as it can.

    Raises:
        Infeasible: the outer tiers have no room.
    """
    clock = Clock()
    case = _Case.of(problem)
    tiers = np.zeros(len(case.gaps), dtype=int)
    for number in range(len(tiers)):
        fitting = [t for t in range(1, len(problem.tiers)) if case.fits(_with(tiers, number, t), t)]
        if not fitting:
            raise too_large(problem)
        tiers[number] = fitting[0]
    return _answer(case, tiers, 0.0, "move all", clock)


# -- details -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    """A problem's rests, seconds of every move, and the kernels that make tensors, which need room of their own."""

    problem: TieringProblem
    gaps: Sequence[Gap]
    sizes: Floats
    seconds: Floats
    out_s: Floats
    back_s: Floats
    births: frozenset[int]
    known_s: dict[bytes, float] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: TieringProblem) -> _Case:
        gaps = rests_of(problem)
        sizes = np.array([problem.tensors[gap.tensor].size_bytes for gap in gaps])
        out_s, back_s = link_s(problem, gaps)
        first: dict[int, int] = {}
        for number, kernel in enumerate(problem.kernels):
            for tensor in kernel.uses:
                first.setdefault(tensor, number)
        births = frozenset(k for tensor, k in first.items() if not problem.tensors[tensor].persists)
        seconds = np.array([kernel.time_s for kernel in problem.kernels])
        return cls(problem, gaps, sizes, seconds, out_s, back_s, births)

    def held(self, tiers: Tiers) -> Floats:
        """Bytes per tier and kernel."""
        return held_bytes(self.problem, self.gaps, tiers)

    def fits(self, tiers: Tiers, *which: int) -> bool:
        """Whether tiers (all, unless some are named) hold what rests in them, moves taken to be instant."""
        held = self.held(tiers).max(axis=1, initial=0.0)
        room = [tier.capacity_bytes * (1.0 + _ROUNDING) for tier in self.problem.tiers]
        return all(held[t] <= room[t] for t in which or range(len(room)))

    def tiers_of(self, rests: Sequence[Rest]) -> Tiers:
        """The tier of every rest, by number."""
        names = [tier.name for tier in self.problem.tiers]
        kernels, tensors = self.problem.kernels, self.problem.tensors
        known = {(r.tensor, r.after, r.before): names.index(r.tier) for r in rests}
        keys = [(tensors[g.tensor].name, kernels[g.after].name, kernels[g.before].name) for g in self.gaps]
        return np.array([known.get(key, 0) for key in keys], dtype=int)

    def time_s(self, tiers: Tiers) -> float:
        """Seconds of a step; infinite where a tier overflows."""
        key = tiers.tobytes()
        if key not in self.known_s:
            self.known_s[key] = _step_s(self, tiers) if self.fits(tiers) else np.inf
        return self.known_s[key]


def _with(tiers: Tiers, number: int, tier: int) -> Tiers:
    changed = tiers.copy()
    changed[number] = tier
    return changed


def _relieved(case: _Case, clock: Clock) -> Tiers | None:
    """Rests that go out until every kernel fits, largest relief first; None where no tier has room for one that must."""
    capacity = case.problem.tiers[0].capacity_bytes * (1.0 + _ROUNDING)
    tiers = np.zeros(len(case.gaps), dtype=int)
    # Kernels that take no time weigh as much as the shortest that does: they overflow all the same.
    seconds = np.maximum(case.seconds, case.seconds[case.seconds > 0].min(initial=1.0))
    while True:
        over = case.held(tiers)[0] > capacity
        if not over.any():
            return tiers
        relief = np.array(
            [0.0 if tiers[i] else case.sizes[i] * (seconds * over)[list(gap.inside)].sum() for i, gap in enumerate(case.gaps)]
        )  # fmt: skip
        number = int(np.argmax(relief))
        choices = [
            changed
            for tier in range(len(case.problem.tiers) - 1, 0, -1)
            if case.fits(changed := _with(tiers, number, tier), tier)
        ]
        if not relief[number] or not choices:
            return None
        # Furthest first among equals: nearer memory is for what would wait.
        tiers = choices[0] if clock.over else min(choices, key=lambda changed: _step_s(case, changed))


def _improved(case: _Case, tiers: Tiers, bound: float, clock: Clock) -> Tiers:
    """Changes one rest, or two at once where one goes out instead of another, as long as that shortens the step."""
    best_s = case.time_s(tiers)
    better = True
    while better and not clock.over and best_s > bound * (1.0 + _ROUNDING):
        better = False
        for changed in _neighbours(case, tiers):
            if clock.over:
                break
            if case.time_s(changed) < best_s * (1.0 - _ROUNDING):
                tiers, best_s, better = changed, case.time_s(changed), True
                break
    return tiers


def _neighbours(case: _Case, tiers: Tiers) -> list[Tiers]:
    """Placements that differ in one rest's tier, then those that exchange a rest outside for one that it overlaps."""
    outer = range(len(case.problem.tiers))
    single = [_with(tiers, i, t) for i in range(len(tiers)) for t in outer if t != tiers[i]]
    inside = [set(gap.inside) for gap in case.gaps]
    exchanged = [
        _with(_with(tiers, i, 0), j, int(tiers[i]))
        for i in np.flatnonzero(tiers).tolist()
        for j in np.flatnonzero(tiers == 0).tolist()
        if inside[i] & inside[j]
    ]
    return single + exchanged


def _step_s(case: _Case, tiers: Tiers) -> float:
    """Seconds of the last of some steps, moves and kernels played one after the other."""
    n = len(case.seconds)
    back = _returns(case, tiers)
    held = np.tile(case.held(tiers)[0], _STEPS)
    for moves in back.values():
        for at, before, number in moves:
            if at < before:
                held[max(at, 0) : min(before, n * _STEPS)] += case.sizes[number]
    capacity = case.problem.tiers[0].capacity_bytes * (1.0 + _ROUNDING)
    leaving: dict[int, list[int]] = {}
    for number in np.flatnonzero(tiers).tolist():
        leaving.setdefault(case.gaps[number].after, []).append(number)
    free_out, free_back = np.zeros(len(case.problem.tiers)), np.zeros(len(case.problem.tiers))
    gone = np.zeros(len(tiers))  # when a rest's last move out ended
    going: list[tuple[float, float]] = []
    arrival: dict[int, float] = {}  # of the kernel that waits
    end_s, ends = 0.0, [0.0]
    for k in range(n * _STEPS):
        ready_s = end_s
        going = sorted(move for move in going if move[0] > ready_s)
        left = sum(size for _, size in going)
        for ended_s, size in going:
            if held[k] + left <= capacity:
                break
            ready_s, left = ended_s, left - size
        for _, before, number in back.get(k, ()):
            tier = tiers[number]
            start_s = max(ready_s, free_back[tier], gone[number])
            free_back[tier] = start_s + case.back_s[number, tier]
            arrival[before] = max(arrival.get(before, 0.0), free_back[tier])
        start_s = max(ready_s if k % n in case.births else end_s, arrival.pop(k, 0.0))
        end_s = start_s + case.seconds[k % n]
        for number in leaving.get(k % n, ()):
            tier = tiers[number]
            gone[number] = end_s
            if case.out_s[number, tier]:
                gone[number] = free_out[tier] = max(end_s, free_out[tier]) + case.out_s[number, tier]
                going.append((gone[number], case.sizes[number]))
        if k % n == n - 1:
            ends.append(end_s)
    return ends[-1] - ends[-2]


def _returns(case: _Case, tiers: Tiers) -> dict[int, list[tuple[int, int, int]]]:
    """Moves back by the kernel from which on there is room for them: that one, the kernel that waits, and the rest's number."""
    n = len(case.seconds)
    room = np.tile(case.problem.tiers[0].capacity_bytes * (1.0 + _ROUNDING) - case.held(tiers)[0], _STEPS + 1)
    moves = []
    for number in np.flatnonzero(tiers).tolist():
        gap = case.gaps[number]
        if len(gap.inside) == n:
            continue  # never used
        length = len(gap.inside)
        moves += [(gap.before + step * n, length, number) for step in range(_STEPS + 1)]
    found: dict[int, list[tuple[int, int, int]]] = {}
    for before, length, number in sorted(moves):
        at = before
        while at > max(before - length, 0) and room[at - 1] >= case.sizes[number]:
            at -= 1
        room[at:before] -= case.sizes[number]
        found.setdefault(at, []).append((at, before, number))
    return found


def _answer(case: _Case, tiers: Tiers, bound: float, solver: str, clock: Clock) -> Placement:
    problem, kernels_s = case.problem, float(case.seconds.sum())
    time_s = case.time_s(tiers)
    if not np.isfinite(time_s):
        raise too_large(problem)
    peaks = case.held(tiers).max(axis=1, initial=0.0)
    rests = tuple(
        Rest(
            problem.tensors[gap.tensor].name, problem.kernels[gap.after].name, problem.kernels[gap.before].name,
            problem.tiers[tiers[i]].name, float(case.out_s[i, tiers[i]] + case.back_s[i, tiers[i]]),
        )
        for i, gap in enumerate(case.gaps)
        if tiers[i]
    )  # fmt: skip
    certificate = certify(
        time_s, min(max(bound, kernels_s), time_s), solver, clock, {"rests": len(case.gaps)}
    )
    names = [tier.name for tier in problem.tiers]
    return Placement(rests, time_s, kernels_s, dict(zip(names, peaks.tolist(), strict=True)), certificate)
