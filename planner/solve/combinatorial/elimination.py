"""Exact minimisation of a sum of tables over discrete variables, one variable after the other.

A variable that shares tables with few others is minimised out: its tables become one table over its neighbours. Chains,
trees and series-parallel graphs go this way with tables of two or three variables. Variables go in the order of the table
that they leave, smallest first. The bucket elimination of R. Dechter, Artificial Intelligence 113, 1999.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_ENTRIES", "Bucket", "Elimination", "eliminate", "order", "spread"]

Floats: TypeAlias = NDArray[np.float64]
Scope: TypeAlias = tuple[int, ...]

MOST_ENTRIES = 2_000_000
"""Entries of the largest table that elimination may build: 16 MB."""


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """A variable when it goes.

    Attributes:
        variable: its number.
        scope: the others in its joint table.
        table: the joint table; axis 0 is the variable's, the others are the scope's.
        pairs: the edges that are in it.
        children: buckets whose messages are in it.
        message: the table without the variable.
    """

    variable: int
    scope: Scope
    table: Floats
    pairs: tuple[tuple[int, int], ...]
    children: tuple[int, ...]
    message: Floats

    @property
    def axes(self) -> Scope:
        """The variables of the table's axes."""
        return (self.variable, *self.scope)


class Elimination:
    """A sum of tables with all variables minimised out.

    Attributes:
        buckets: in the order in which the variables went.
        value: the minimum.
        choice: a minimiser, one choice per variable; of several, the one with the lowest numbers in the order of elimination.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = buckets
        self.value = sum(float(bucket.message) for bucket in buckets if not bucket.scope)
        chosen: dict[int, int] = {}
        for bucket in reversed(buckets):
            column = np.moveaxis(bucket.table, 0, -1)[tuple(chosen[other] for other in bucket.scope)]
            chosen[bucket.variable] = int(np.argmin(column))
        self.choice = [chosen[variable] for variable in range(len(buckets))]

    def beliefs(self) -> list[Floats]:
        """Per bucket, for every choice of its table's variables, the least that the whole sum can be with them."""
        found: list[Floats] = [np.zeros(0)] * len(self.buckets)
        outside: dict[int, Floats | float] = {}  # the least of all tables outside a bucket, over its scope
        for index in reversed(range(len(self.buckets))):
            bucket = self.buckets[index]
            rest = outside.get(index, self.value - float(bucket.message.min()))
            belief = found[index] = bucket.table + rest
            for child in bucket.children:
                scope, message = self.buckets[child].scope, self.buckets[child].message
                others = tuple(axis for axis, v in enumerate(bucket.axes) if v not in scope)
                without = (belief - spread(message, scope, bucket.axes)).min(axis=others)
                left = [v for v in bucket.axes if v in scope]  # the axes that remain, in the bucket's order
                outside[child] = np.transpose(without, [left.index(v) for v in scope])
        return found

    def marginals(self) -> list[Floats]:
        """For every variable and each of its choices, the least that the sum can be with that choice."""
        found: dict[int, Floats] = {}
        for bucket, belief in zip(self.buckets, self.beliefs(), strict=True):
            found[bucket.variable] = belief.min(axis=tuple(range(1, belief.ndim)))
        return [found[variable] for variable in range(len(self.buckets))]


def spread(table: Floats, owners: Scope, axes: Scope) -> Floats:
    """A table over some variables with an axis for each of others, of length 1 where it has none.

    >>> spread(np.zeros((2, 3)), (5, 4), (4, 5, 6)).shape
    (3, 2, 1)
    """
    shared = [v for v in axes if v in owners]
    ordered = np.transpose(table, [owners.index(v) for v in shared])
    lengths = iter(ordered.shape)
    return ordered.reshape([next(lengths) if v in owners else 1 for v in axes])


def order(sizes: Sequence[int], scopes: Iterable[Scope]) -> tuple[list[int], int]:
    """The order in which variables go, and the entries of the largest table on the way.

    Args:
        sizes: choices of every variable.
        scopes: the variables of every table.

    >>> order([2, 2, 2], [(0, 1), (1, 2)])  # a chain from its end: tables of two variables
    ([0, 1, 2], 4)
    """
    near: list[set[int]] = [set() for _ in sizes]
    for scope in scopes:
        for variable in scope:
            near[variable].update(set(scope) - {variable})
    left, found, largest = set(range(len(sizes))), [], 0

    def entries(variable: int) -> int:
        return int(np.prod([sizes[other] for other in near[variable]], dtype=np.float64)) * sizes[variable]

    while left:
        variable = min(left, key=lambda v: (entries(v), v))
        largest = max(largest, entries(variable))
        for other in near[variable]:
            near[other].update(near[variable] - {other})
            near[other].discard(variable)
        left.remove(variable)
        found.append(variable)
    return found, largest


def eliminate(costs: Sequence[Floats], edges: Mapping[tuple[int, int], Floats]) -> Elimination:
    """Minimises ``Σ costs[i][x_i] + Σ edges[i, j][x_i, x_j]``.

    Args:
        costs: per variable, of each of its choices.
        edges: per pair of variables, of each pair of choices.

    >>> found = eliminate([np.array([0.0, 1.0]), np.array([3.0, 0.0])], {(0, 1): np.array([[0.0, 9.0], [9.0, 0.0]])})
    >>> found.value, found.choice
    (1.0, [1, 1])
    """
    sequence, _ = order([len(cost) for cost in costs], edges)
    pairs = dict(edges)
    open_children: set[int] = set()
    buckets: list[Bucket] = []
    for variable in sequence:
        mine = [pair for pair in pairs if variable in pair]
        children = tuple(child for child in sorted(open_children) if variable in buckets[child].scope)
        around = {v for pair in mine for v in pair} | {v for child in children for v in buckets[child].scope}
        axes = (variable, *sorted(around - {variable}))
        joint = spread(np.asarray(costs[variable], dtype=np.float64), (variable,), axes)
        for pair in mine:
            joint = joint + spread(np.asarray(pairs.pop(pair)), pair, axes)
        for child in children:
            joint = joint + spread(buckets[child].message, buckets[child].scope, axes)
        open_children -= set(children)
        if axes[1:]:
            open_children.add(len(buckets))
        buckets.append(Bucket(variable, axes[1:], joint, tuple(mine), children, joint.min(axis=0)))
    return Elimination(buckets)
