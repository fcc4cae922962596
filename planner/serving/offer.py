"""What can be combined of the kinds of replicas on clusters of several types under the limits, and the best numbers of them.

A kind stands aside where another of its cluster and size does as much beside every kind of the other role.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.ledger import Array
from planner.serving.kinds import Kinds
from planner.serving.matching import Fleet, Numbers, match
from planner.serving.plan import Pool
from planner.serving.pools import Index
from planner.serving.space import degrees_of, recipe_of
from planner.specs.serve_problem import ServeProblem

__all__ = ["Kind", "Offer", "undominated"]

_SAME = 1.0 - 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """One kind of replica on one cluster, row ``index`` of its role; ``most`` and what follows of generation."""

    role: str
    index: int
    cluster: int
    recipe: Mapping[str, str]
    row: NDArray[Any]
    chunk: float
    most: float = 1.0
    memory: Mapping[str, float] | None = None
    binding: str = "ttft"

    def is_of(self, pool: Pool, cluster: str) -> bool:
        """Whether a pool's replicas are of this kind, on the cluster of this name."""
        return (
            pool.role == self.role
            and pool.cluster == cluster
            and dict(pool.mesh) == degrees_of(self.row)
            and dict(self.recipe) == recipe_of(pool.knobs)
            and (self.role == "decode" or pool.knobs["chunk_tokens"] == self.chunk)
        )


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """Kinds of replicas of both roles, what first tokens take beside their batch (i, j), and what can be combined."""

    problem: ServeProblem
    left: list[Kind]
    right: list[Kind]
    beside_s: Array
    fleet: Fleet
    counts: tuple[Array, Array] | None

    @classmethod
    def of(cls, kinds: Kinds, given: tuple[Pool, ...] = ()) -> Offer | None:
        """What keeps the limits, or kinds of given pools; None where a role has none."""
        prompts, answers = kinds.rates()
        i, j = _given(kinds, given, prompts) if given else _kept(kinds, prompts, answers)
        if not len(i) or not len(j):
            return None
        left, right = [_prefill(kinds, int(k)) for k in i], [_decode(kinds, int(k)) for k in j]
        cost = np.array([_cost(part) for part in kinds.parts])
        (places, others), (sizes, their_sizes) = kinds.places, kinds.sizes
        fleet = Fleet(
            [part.cluster.devices for part in kinds.parts],
            sizes[i], places[i].astype(float), sizes[i] * cost[places[i]],
            their_sizes[j], others[j].astype(float), their_sizes[j] * cost[others[j]],
            prompts[np.ix_(i, j)], answers[j],
        )  # fmt: skip
        batch_s = np.concatenate([p.batch_s for _, p in kinds.left])
        beside_s = kinds.first_s[np.ix_(i, j)] - batch_s[i, None]
        counts = _counts(kinds, given, left, right) if given else None
        return cls(kinds.problem, left, right, beside_s, fleet, counts)

    def numbers(self, spare: float = 1.0) -> Numbers | None:
        """The best numbers of replicas; for a rate, those that answer so many times as much."""
        thrifty, rate = self.problem.objective != "throughput", self.problem.traffic.rate_per_s
        return match(self.fleet, rate, thrifty=thrifty, counts=self.counts, spare=spare)

    def value(self, numbers: Numbers, rate_per_s: float) -> float:
        """What the ranking maximises: requests per second, or those per cost."""
        cost = float(numbers.left @ self.fleet.left_cost + numbers.right @ self.fleet.right_cost)
        return rate_per_s / (1.0 if self.problem.machines_count else cost)


def undominated(groups: Array, values: Array) -> Index:
    """Rows that no other of their group equals or exceeds in every column; of equal ones the first.

    >>> undominated(np.array([0, 0, 0, 1]), np.array([[3.0, 1.0], [1.0, 2.0], [1.0, 1.0], [1.0, 1.0]])).tolist()
    [0, 1, 3]
    """
    kept: dict[float, list[int]] = {}
    for row in np.argsort(-values.sum(axis=1), kind="stable"):
        others = kept.setdefault(float(groups[row]), [])
        if not np.any(np.all(values[others] >= values[row] * _SAME, axis=1)):
            others.append(int(row))
    return np.sort(np.array([row for rows in kept.values() for row in rows], dtype=np.intp))


def _kept(kinds: Kinds, prompts: Array, answers: Array) -> tuple[Index, Index]:
    """Kinds that carry something and that no other of their cluster and size makes superfluous."""
    left, right = (
        size * len(kinds.parts) + place for size, place in zip(kinds.sizes, kinds.places, strict=True)
    )
    i = np.arange(len(left))
    for _ in range(2):  # fewer prefill replicas tell fewer decode replicas apart
        j = np.flatnonzero((prompts[i].max(axis=0, initial=0.0) > 0.0) & (answers > 0.0))
        j = j[undominated(right[j], np.column_stack([answers[j], prompts[np.ix_(i, j)].T]))]
        i = np.flatnonzero(prompts[:, j].max(axis=1, initial=0.0) > 0.0)
        i = i[undominated(left[i], prompts[np.ix_(i, j)])]
    return i, j


def _given(kinds: Kinds, given: tuple[Pool, ...], prompts: Array) -> tuple[Index, Index]:
    """Rows of the given pools; of prompts alone and together in the same iterations, those that carry more."""
    names = [part.cluster.name for part in kinds.parts]

    def rows(side: list[Kind], rates: Array) -> Index:
        found = [[k.index for k in side if k.is_of(pool, names[k.cluster])] for pool in given]
        return np.unique([max(own, key=lambda k: rates[k]) for own in found if own]).astype(np.intp)

    left, right = kinds.first_s.shape
    return (
        rows([_prefill(kinds, i) for i in range(left)], prompts.max(axis=1)),
        rows([_decode(kinds, j) for j in range(right)], np.zeros(right)),
    )


def _counts(
    kinds: Kinds, given: tuple[Pool, ...], left: list[Kind], right: list[Kind]
) -> tuple[Array, Array]:
    """Replicas of the given pools, by kind."""

    def of(kind: Kind) -> float:
        name = kinds.parts[kind.cluster].cluster.name
        return float(sum(pool.replicas for pool in given if kind.is_of(pool, name)))

    return np.array([of(kind) for kind in left]), np.array([of(kind) for kind in right])


def _prefill(kinds: Kinds, i: int) -> Kind:
    cluster, p, k = kinds.prefill(i)
    return Kind("prefill", i, cluster, p.kind.recipe, p.kind.rows[k], float(p.kind.chunks[k]))


def _decode(kinds: Kinds, j: int) -> Kind:
    cluster, d, k = kinds.decode(j)
    memory, most = d.memory(k, float(d.in_flight[k])), float(d.kind.most[k])
    return Kind("decode", j, cluster, d.kind.recipe, d.kind.rows[k], 2.0, most, memory, str(d.binding[k]))


def _cost(part: ServeProblem) -> float:
    """What a device costs: dollars by the hour, watts, or one device like another where no price is known."""
    if part.objective == "energy":
        return float(part.cluster.device.power_w)
    return part.usd_per_hour or 1.0
