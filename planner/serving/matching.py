"""How many replicas of which kinds answer most together: pools of prompts and of generation on devices of several types.

An integer program: whole replicas, and between every two kinds the rate of requests that one hands to the other. A prefill
replica spends a fraction of its time on each request, a decode replica likewise; replicas of a cluster share its devices.
Of the flows that whole replicas carry, the one that leaves the busiest of either role most time is taken, so that given replicas
are fed as those that were found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.ledger import Array
from planner.solve.combinatorial.milp import Program, solve

__all__ = ["Fleet", "Numbers", "match"]

_SAME = 1.0 - 1e-9
_RATIOS = 20
_NOTHING = 1e-6  # of all requests: a flow that solvers' tolerances leave


@dataclass(frozen=True, slots=True, eq=False)
class Fleet:
    """What can be combined; ``i`` counts kinds of prefill replicas, ``j`` of decode replicas.

    Attributes:
        devices: of every cluster.
        left_size, left_cluster, left_cost: of prefill replicas: devices, index of the cluster, cost (dollars, watts or devices).
        right_size, right_cluster, right_cost: of decode replicas.
        prompts: (i, j) requests per second of a prefill replica that hands them to such a decode replica; 0 where it must not.
        answers: (j,) requests per second of a decode replica.
    """

    devices: Sequence[int]
    left_size: Array
    left_cluster: Array
    left_cost: Array
    right_size: Array
    right_cluster: Array
    right_cost: Array
    prompts: Array
    answers: Array


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """Replicas of every kind, and the rate of requests from one to another, (i, j)."""

    left: Array
    right: Array
    flow: Array

    @property
    def rate_per_s(self) -> float:
        """Requests of all."""
        return float(np.sum(self.flow))


def match(
    fleet: Fleet,
    wanted_per_s: float | None = None,
    *,
    thrifty: bool = False,
    counts: tuple[Array, Array] | None = None,
    spare: float = 1.0,
) -> Numbers | None:
    """The numbers that answer most at the least cost for it, a wanted rate at the least cost, or most per cost.

    None where a wanted rate is more than the devices answer, or nothing is answered at all. With ``counts`` the replicas are
    given, and only who feeds whom is found. Replicas for a wanted rate answer ``spare`` times as much.

    >>> one = np.ones(1)
    >>> fleet = Fleet([4], 1 * one, 0 * one, one, 1 * one, 0 * one, one, 3 * np.ones((1, 1)), 1 * one)
    >>> found = match(fleet)  # three decode replicas keep a prefill replica busy
    >>> found.left.tolist(), found.right.tolist(), round(found.rate_per_s, 6)
    ([1.0], [3.0], 3.0)
    """
    found = _replicas(fleet, None if wanted_per_s is None else wanted_per_s * spare, thrifty, counts)
    if found is None or found.rate_per_s <= _SAME * (wanted_per_s or 0.0):
        return None
    return _spread(fleet, found, wanted_per_s or found.rate_per_s)


def _replicas(
    fleet: Fleet, wanted_per_s: float | None, thrifty: bool, counts: tuple[Array, Array] | None
) -> Numbers | None:
    """The numbers of replicas, with some flow that they carry."""
    if counts is not None:
        return _solved(fleet, per_cost=0.0, at_least=0.0, counts=counts)
    if wanted_per_s is not None:
        return _solved(fleet, per_cost=None, at_least=wanted_per_s)
    most = _solved(fleet, per_cost=0.0, at_least=0.0)
    if most is None or most.rate_per_s <= 0.0:
        return None
    if thrifty:
        return _most_per_cost(fleet, most)
    return _solved(fleet, per_cost=None, at_least=_SAME * most.rate_per_s) or most


def _spread(fleet: Fleet, numbers: Numbers, rate_per_s: float) -> Numbers:
    """A rate over given replicas such that the busiest of either role have least to do, both roles alike."""
    i, j = np.nonzero((fleet.prompts > 0.0) & (numbers.left[:, None] > 0.5) & (numbers.right > 0.5))
    program = Program()
    busy = program.variables(np.ones(2), upper=2.0)  # at most 1, and tolerances
    flow = program.variables(np.zeros(len(i)), upper=rate_per_s)
    times = (1.0 / (fleet.prompts[i, j] * numbers.left[i])), 1.0 / (fleet.answers[j] * numbers.right[j])
    for role, (index, time) in enumerate(zip((i, j), times, strict=True)):
        for k in np.unique(index):
            own = np.flatnonzero(index == k)
            program.constrain([[*flow[own], busy[role]]], [[*time[own], -1.0]], high=0.0)
    program.constrain([flow], [np.ones(len(i))], low=rate_per_s * _SAME)
    found = solve(program)
    assert found.found
    flows = np.where(found.values[flow] > _NOTHING * rate_per_s, found.values[flow], 0.0)
    rates = np.zeros_like(fleet.prompts)
    rates[i, j] = flows * (rate_per_s / flows.sum())
    return replace(numbers, flow=rates)


def _most_per_cost(fleet: Fleet, start: Numbers) -> Numbers:
    """The largest ratio of rate to cost, by Dinkelbach's iteration (1967): maximise rate − ratio·cost until that is 0."""
    best = start
    for _ in range(_RATIOS):
        ratio = best.rate_per_s / _cost(fleet, best)
        found = _solved(fleet, per_cost=ratio, at_least=0.0)
        if (
            found is None
            or _cost(fleet, found) <= 0.0
            or found.rate_per_s * _SAME <= ratio * _cost(fleet, found)
        ):
            return best
        best = found
    return best


def _cost(fleet: Fleet, numbers: Numbers) -> float:
    return float(numbers.left @ fleet.left_cost + numbers.right @ fleet.right_cost)


def _solved(
    fleet: Fleet, per_cost: float | None, at_least: float, counts: tuple[Array, Array] | None = None
) -> Numbers | None:
    """Least ``per_cost·cost − rate``, or least cost where there is no price; ``at_least`` so many requests."""
    price, gain = (1.0, 0.0) if per_cost is None else (per_cost, -1.0)
    program = Program()
    rooms = np.asarray(fleet.devices, dtype=np.float64)
    most_left, most_right = counts or (
        _most(rooms, fleet.left_cluster, fleet.left_size),
        _most(rooms, fleet.right_cluster, fleet.right_size),
    )
    x = program.variables(price * fleet.left_cost, upper=most_left, integer=True)
    y = program.variables(price * fleet.right_cost, upper=most_right, integer=True)
    i, j = np.nonzero(fleet.prompts > 0.0)
    if not len(i):
        return None
    most = float(np.sum(most_right * fleet.answers))
    flow = program.variables(np.full(len(i), gain), upper=most)
    for k in range(len(x)):
        own = np.flatnonzero(i == k)
        if len(own):
            program.constrain([[*flow[own], x[k]]], [[*(1.0 / fleet.prompts[k, j[own]]), -1.0]], high=0.0)
    for k in range(len(y)):
        own = np.flatnonzero(j == k)
        if len(own):
            program.constrain([[*flow[own], y[k]]], [[*np.ones(len(own)), -fleet.answers[k]]], high=0.0)
    for k, room in enumerate(rooms):
        mine, theirs = np.flatnonzero(fleet.left_cluster == k), np.flatnonzero(fleet.right_cluster == k)
        if len(mine) + len(theirs):
            sizes = [*fleet.left_size[mine], *fleet.right_size[theirs]]
            program.constrain([[*x[mine], *y[theirs]]], [sizes], high=room)
    if at_least > 0.0:
        program.constrain([flow], [np.ones(len(i))], low=at_least)
    found = solve(program)
    if not found.found:
        return None
    rates = np.zeros_like(fleet.prompts)
    rates[i, j] = found.values[flow]
    return Numbers(found.values[x], found.values[y], rates)


def _most(rooms: Array, cluster: Array, size: Array) -> Array:
    return np.asarray(np.floor(rooms[cluster.astype(int)] / size))
