"""How many replicas of two pools answer most together: rate matching on given devices, or the fewest for a rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.ledger import Array
from planner.serving.launcher import nodes_taken
from planner.specs.serve_problem import ServeProblem

__all__ = ["Asked", "Replicas", "numbers_of", "seated_numbers"]

Asked = tuple[int | None, int | None]
"""Replicas of either pool that a user fixes."""

_BISECTIONS = 40


@dataclass(frozen=True, slots=True, eq=False)
class Replicas:
    """One replica of either pool, prefill first, pair by pair.

    Attributes:
        rates: requests per second.
        sizes: devices.
        asked: numbers of replicas that stay.
        most: requests per second beyond which there are none to answer.
    """

    rates: tuple[Array, Array]
    sizes: tuple[Array, Array]
    asked: Asked = (None, None)
    most: Array | float = np.inf


def numbers_of(problem: ServeProblem, pools: Replicas) -> tuple[Array, Array]:
    """Replicas of both pools per pair: the fewest for a given rate, or those that carry most.

    With ``y`` decode replicas, the devices that are left hold ``x(y)`` prefill replicas. ``y·answers`` grows and
    ``x(y)·prompts`` falls, so the best is the last ``y`` at which decode is the slower pool, or the next. Where there is no room
    for the other pool, there are 0 prefill replicas.
    """
    devices, wanted = problem.cluster.devices, problem.traffic.rate_per_s
    if wanted is None and not problem.machines_count:
        return _thriftiest(devices, pools)
    (prompts, answers), (left, right), asked = pools.rates, pools.sizes, pools.asked
    if wanted is not None:
        x, y = (
            np.ceil(wanted / rate - 1e-9) if count is None else np.full_like(rate, float(count))
            for rate, count in zip((prompts, answers), asked, strict=True)
        )
        return np.where(x * left + y * right <= devices, x, 0.0), y

    def beside(y: Array) -> Array:
        room = np.maximum(np.floor((devices - y * right) / left), 0.0)
        return room if asked[0] is None else np.where(room >= asked[0], float(asked[0]), 0.0)

    low, high = np.ones_like(left), np.maximum(np.floor((devices - left * (asked[0] or 1)) / right), 1.0)
    if asked[1] is not None:
        low = high = np.full_like(left, float(asked[1]))
    for _ in range(_BISECTIONS):
        if not np.any(high - low > 1.0):
            break
        middle = np.floor((low + high) / 2.0)
        slower = middle * answers <= beside(middle) * prompts
        low, high = np.where(slower, middle, low), np.where(slower, high, middle)
    first, second = (np.minimum(y * answers, beside(y) * prompts) for y in (low, high))
    y = np.where(second > first, high, low)
    needed = np.ceil(y * answers / prompts - 1e-9) if asked[0] is None else np.inf
    return np.minimum(beside(y), needed), y


def seated_numbers(problem: ServeProblem, pools: Replicas, x: Array, y: Array) -> tuple[Array, Array]:
    """Numbers of replicas that an engine finds nodes for: one fewer of the pool that is missed less, until they stand.

    Sizes that divide a node always do.
    """
    per_node = float(problem.cluster.groups[0].devices_per_node)
    nodes = sum(group.nodes for group in problem.cluster.groups)
    rates, sizes = pools.rates, pools.sizes
    if problem.launcher is None or not any(np.any((s < per_node) & (per_node % s > 0.0)) for s in sizes):
        return x, y
    while True:
        short = (nodes_taken(per_node, np.stack(sizes), np.stack([x, y])) > nodes) & (x > 0.0) & (y > 0.0)
        if not short.any():
            return x, y
        fewer = np.minimum((x - 1.0) * rates[0], y * rates[1]) >= np.minimum(
            x * rates[0], (y - 1.0) * rates[1]
        )
        x, y = x - (short & fewer), y - (short & ~fewer)


def _thriftiest(devices: int, pools: Replicas) -> tuple[Array, Array]:
    """Replicas of both pools per pair that answer most per device, by trying every number of decode replicas.

    Beside each, the prefill replicas that keep it busy, or one fewer, or all that there is room for.
    """
    (prompts, answers), (left, right), asked = pools.rates, pools.sizes, pools.asked
    best, x, y = np.zeros_like(left), np.zeros_like(left), np.ones_like(left)
    last = int(np.max((devices - left) / right))
    for count in range(1, last + 1) if asked[1] is None else (asked[1],):
        answered = np.minimum(count * answers, pools.most)
        needed, room = answered / prompts, np.floor((devices - count * right) / left)
        for whole in (np.ceil(needed - 1e-9), np.floor(needed)):
            beside = np.minimum(whole, room) if asked[0] is None else np.full_like(room, float(asked[0]))
            able, used = (beside >= 1.0) & (beside <= room), np.maximum(beside * left + count * right, 1.0)
            value = np.where(able, np.minimum(beside * prompts, answered) / used, 0.0)
            better = value > best * (1.0 + 1e-9)
            best, x, y = (
                np.where(better, value, best),
                np.where(better, beside, x),
                np.where(better, float(count), y),
            )
    return x, y
