"""Kinds of replicas on clusters of several types, and what can be combined of them.

Every cluster has its kinds (layout, budget, formats) for both phases; of each size the fastest within the limits is kept. A
request goes from any prefill replica to any decode replica over the slower cluster's network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.costs.serving import kv_transfer_s, queue_load
from planner.engine import Pricer
from planner.ledger import Array
from planner.serving.candidates import Account
from planner.serving.matching import Fleet, Numbers, match
from planner.serving.plan import Pool
from planner.serving.pools import decode_kinds, prefill_kinds
from planner.serving.slots import MOST_LOAD
from planner.serving.space import ServeSpace, degrees_of, links_of, mesh_of, recipe_of, size_of
from planner.specs.cluster import Cluster
from planner.specs.serve_problem import ServeProblem

__all__ = ["Kind", "Offer", "parts_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """One kind of replica on one cluster; ``pace_s``, ``batch_s``, ``prompts`` and ``bytes_`` of prefill, the rest of decode."""

    role: str
    cluster: int
    recipe: Mapping[str, str]
    row: NDArray[Any]
    chunk: float
    rate: float
    pace_s: float = 0.0
    batch_s: float = 0.0
    prompts: float = 1.0
    bytes_: float = 0.0
    tpot_s: float = 0.0
    most: float = 1.0
    memory: Mapping[str, float] | None = None
    binding: str = "ttft"

    @property
    def size(self) -> float:
        """Devices of a replica."""
        return float(size_of(self.row))

    def is_of(self, pool: Pool) -> bool:
        """Whether a pool's replicas are of this kind."""
        return (
            pool.role == self.role
            and dict(pool.mesh) == degrees_of(self.row)
            and dict(self.recipe) == recipe_of(pool.knobs)
            and (self.role == "decode" or pool.knobs["chunk_tokens"] == self.chunk)
        )

    @property
    def links(self) -> float:
        """Devices that send or receive a request's cache."""
        return float(links_of(self.row, self.recipe))


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """Kinds of replicas of both roles, what a cache's way between them takes, and what can be combined of them."""

    left: list[Kind]
    right: list[Kind]
    transfer_s: Array
    fleet: Fleet
    counts: tuple[Array, Array] | None

    @classmethod
    def of(
        cls, problem: ServeProblem, pricers: list[Pricer], account: Account, given: tuple[Pool, ...]
    ) -> Offer | None:
        """The kinds that keep a problem's limits, or those of given pools; None where a role has none."""
        parts = parts_of(problem)
        left: list[Kind] = []
        right: list[Kind] = []
        for index, (part, pricer) in enumerate(zip(parts, pricers, strict=True)):
            own = tuple(pool for pool in given if pool.cluster == part.cluster.name)
            left += _prefills(part, pricer, index, account, own) if own or not given else ()
            right += _decodes(part, pricer, index, account, own) if own or not given else ()
        if not left or not right:
            return None
        clusters = problem.clusters
        transfer_s = _transfers(problem, clusters, left, right)
        fleet = _fleet(problem, parts, left, right, transfer_s)
        return cls(left, right, transfer_s, fleet, _counts(given, clusters, left, right) if given else None)

    def numbers(self, problem: ServeProblem, allowed: NDArray[np.bool_] | bool = True) -> Numbers | None:
        """The best numbers of replicas, where prompts go on only as is allowed."""
        fleet = replace(self.fleet, prompts=np.where(allowed, self.fleet.prompts, 0.0))
        thrifty = problem.objective != "throughput"
        return match(fleet, problem.traffic.rate_per_s, thrifty=thrifty, counts=self.counts)

    def value(self, problem: ServeProblem, numbers: Numbers, rate_per_s: float) -> float:
        """What the ranking maximises: requests per second, or those per cost."""
        cost = float(numbers.left @ self.fleet.left_cost + numbers.right @ self.fleet.right_cost)
        return rate_per_s / (1.0 if problem.machines_count else cost)


def parts_of(problem: ServeProblem) -> list[ServeProblem]:
    """The problem on every cluster alone."""
    return [replace(problem, cluster=cluster, others=()) for cluster in problem.clusters]


def _counts(
    given: tuple[Pool, ...], clusters: tuple[Cluster, ...], left: list[Kind], right: list[Kind]
) -> tuple[Array, Array]:
    """Replicas of the given pools, by kind."""

    def of(kind: Kind) -> float:
        name = clusters[kind.cluster].name
        return float(sum(p.replicas for p in given if p.cluster == name and kind.is_of(p)))

    return np.array([of(kind) for kind in left]), np.array([of(kind) for kind in right])


def _kept(kind: Kind, given: tuple[Pool, ...], fastest: Mapping[Any, Kind]) -> Any:
    """Under which key a kind is kept; None where it is not: one of a size and cache, or every one that is given."""
    if given:
        return len(fastest) if any(kind.is_of(pool) for pool in given) else None
    key = kind.size, str(kind.recipe["cache"])
    return key if kind.rate > (fastest[key].rate if key in fastest else 0.0) else None


def _prefills(
    part: ServeProblem, pricer: Pricer, cluster: int, account: Account, given: tuple[Pool, ...]
) -> Iterator[Kind]:
    """Of every size the prefill replicas that run most prompts at the load that the first token's limit allows."""
    fastest: dict[Any, Kind] = {}
    room_s = np.inf if part.traffic.ttft_s is None else part.traffic.ttft_s
    quantile = None if part.traffic.percentile is None else part.traffic.percentile / 100.0
    for p in prefill_kinds(part, ServeSpace(part, "prefill"), pricer, account):
        loads = np.asarray(queue_load(room_s - p.batch_s, p.pace_s * p.prompts, quantile, MOST_LOAD))
        for k in range(len(p.pace_s)):
            kind = Kind(
                "prefill", cluster, p.kind.recipe, p.kind.rows[k], float(p.kind.chunks[k]), float(loads[k] / p.pace_s[k]),
                float(p.pace_s[k]), float(p.batch_s[k]), float(p.prompts[k]), float(p.bytes_[k]),
            )  # fmt: skip
            key = _kept(kind, given, fastest)
            if key is not None:
                fastest[key] = kind
    yield from fastest.values()


def _decodes(
    part: ServeProblem, pricer: Pricer, cluster: int, account: Account, given: tuple[Pool, ...]
) -> Iterator[Kind]:
    """Of every size the decode replicas that answer most."""
    fastest: dict[Any, Kind] = {}
    for d in decode_kinds(part, ServeSpace(part, "decode"), pricer, account):
        for k in range(len(d.rate)):
            held = d.binding[k] == "memory"
            kind = Kind(
                "decode", cluster, d.kind.recipe, d.kind.rows[k], 2.0, float(d.rate[k]) * (MOST_LOAD if held else 1.0),
                tpot_s=float(d.tpot_s[k]), most=float(d.kind.most[k]), memory=d.memory(k, float(d.in_flight[k])),
                binding=str(d.binding[k]),
            )  # fmt: skip
            key = _kept(kind, given, fastest)
            if key is not None:
                fastest[key] = kind
    yield from fastest.values()


def _transfers(
    problem: ServeProblem, clusters: tuple[Cluster, ...], left: list[Kind], right: list[Kind]
) -> Array:
    """Seconds that a cache's way adds to a prompt, (prefill, decode), over the slower of both networks."""
    speed = [cluster.tiers[-1].effective_bytes_per_s for cluster in clusters]
    return np.array(
        [
            [
                float(
                    kv_transfer_s(
                        p.bytes_ * p.links, min(speed[p.cluster], speed[d.cluster]) * min(p.links, d.links), p.batch_s,
                        float(problem.model.n_layers),
                    )
                )
                for d in right
            ]
            for p in left
        ]
    )  # fmt: skip


def _fleet(
    problem: ServeProblem, parts: list[ServeProblem], left: list[Kind], right: list[Kind], transfer: Array
) -> Fleet:
    traffic = problem.traffic
    batch_s, pace_s, prompts = (
        np.array([[getattr(p, n)] for p in left]) for n in ("batch_s", "pace_s", "prompts")
    )
    room = np.full(transfer.shape, np.inf if traffic.ttft_s is None else traffic.ttft_s) - batch_s - transfer
    quantile = None if traffic.percentile is None else traffic.percentile / 100.0
    load = np.asarray(queue_load(room, pace_s * prompts, quantile, MOST_LOAD))
    alike = np.array([[_together(problem, parts, p, d) for d in right] for p in left])
    cost = np.array([_cost(part) for part in parts])
    sizes, places = (
        [np.array([float(getattr(k, n)) for k in kinds]) for kinds in (left, right)]
        for n in ("size", "cluster")
    )
    costs = [size * cost[place.astype(int)] for size, place in zip(sizes, places, strict=True)]
    return Fleet(
        [part.cluster.devices for part in parts], sizes[0], places[0], costs[0], sizes[1], places[1], costs[1],
        np.where(alike, load / pace_s, 0.0), np.array([d.rate for d in right]),
    )  # fmt: skip


def _together(problem: ServeProblem, parts: list[ServeProblem], p: Kind, d: Kind) -> bool:
    """Whether prompts of one kind may go on to another: the cache's format is one, and so says the engine."""
    if p.recipe["cache"] != d.recipe["cache"] or problem.launcher is None:
        return p.recipe["cache"] == d.recipe["cache"]
    vendors = {
        parts[kind.cluster].cluster.device.vendor for kind in (p, d)
    }  # one build of an engine runs on one
    rules = problem.launcher.pairs(mesh_of(p.row[None, None, :]), mesh_of(d.row[None, None, :]))
    return len(vendors) == 1 and all(bool(np.all(rule.ok)) for rule in rules)


def _cost(part: ServeProblem) -> float:
    """What a device costs: dollars by the hour, watts, or one device like another where no price is known."""
    if part.objective == "energy":
        return float(part.cluster.device.power_w)
    return part.usd_per_hour or 1.0
