"""Prompts and generation on devices of several types: kinds of replicas on every cluster, and the exact numbers of each.

Every cluster has its kinds (layout, budget, formats) for both phases; of each size the fastest is kept. A request goes from any
prefill replica to any decode replica over the slower cluster's network, and an integer program finds the numbers of replicas and
who feeds whom (:mod:`planner.serving.matching`). Listed are the best of all, and the best of every two clusters.

A plan's latencies are those of its slowest pools: what every request keeps.
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
from planner.serving.answer_split import best_split
from planner.serving.candidates import Account, iterations_of
from planner.serving.disaggregated import note_missed
from planner.serving.matching import Fleet, Numbers, match
from planner.serving.percentiles import NEARLY, Latencies, Line, decode_pool, highest_rate, prefill_pool
from planner.serving.plan import Pool
from planner.serving.pools import decode_kinds, prefill_kinds
from planner.serving.slots import MOST_LOAD
from planner.serving.space import ServeSpace, degrees_of, links_of, mesh_of, recipe_of, size_of
from planner.specs.cluster import Cluster
from planner.specs.serve_problem import ServeProblem

__all__ = ["MixedFound", "search_mixed"]

_LIGHT = 1e-3  # of the rate that pools carry: next to nobody waits


@dataclass(frozen=True, slots=True, eq=False)
class _Kind:
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
class MixedFound:
    """Pools on several clusters at the load that they carry."""

    pools: tuple[Pool, ...]
    requests_per_s: float
    latencies: Latencies
    usd_per_hour: float | None
    watts: float
    memory: Mapping[str, float]
    memory_budget_bytes: float
    most: int
    binding: str

    @property
    def devices(self) -> int:
        """Devices of all pools."""
        return sum(pool.devices for pool in self.pools)


@dataclass(frozen=True, slots=True, eq=False)
class _Offer:
    """Kinds of replicas of both roles, what a cache's way between them takes, and what can be combined of them."""

    left: list[_Kind]
    right: list[_Kind]
    transfer_s: Array
    fleet: Fleet
    counts: tuple[Array, Array] | None

    @classmethod
    def of(
        cls, problem: ServeProblem, pricers: list[Pricer], account: Account, given: tuple[Pool, ...]
    ) -> _Offer | None:
        """The kinds that keep a problem's limits, or those of given pools; None where a role has none."""
        parts = _parts(problem)
        left: list[_Kind] = []
        right: list[_Kind] = []
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


def search_mixed(problem: ServeProblem, account: Account, given: tuple[Pool, ...] = ()) -> list[MixedFound]:
    """The best numbers of replicas over all clusters, and over every ordered two of them; or those of ``given`` pools."""
    parts = _parts(problem)
    pricers = [Pricer(part.cluster, part.stack) for part in parts]
    scratch = Account()  # kinds of replicas; what counts as a candidate is a pair
    offer = _Offer.of(_split(problem, pricers, account, given), pricers, scratch, given)
    account.nearest.update(scratch.nearest)
    if offer is None:
        account.rejected.update(scratch.rejected)
        _note_missed(problem, parts, pricers, account)
        return []
    fleet = offer.fleet
    account.candidates += fleet.prompts.size
    account.rejected["ttft limit"] += int((fleet.prompts <= 0.0).sum())
    account.scored += int((fleet.prompts > 0.0).sum())
    found: dict[tuple[Any, ...], MixedFound] = {}
    for allowed in _choices(len(parts), offer.left, offer.right):
        numbers = offer.numbers(problem, allowed)
        if numbers is None:
            continue
        kinds = offer.left, offer.right
        one = _found(problem, parts, pricers, kinds, fleet, offer.transfer_s, numbers, account)
        if one is not None:
            found.setdefault(
                tuple((p.role, p.cluster, p.replicas, tuple(p.mesh.items())) for p in one.pools), one
            )
    if not found:
        _note_missed(problem, parts, pricers, account)
    return list(found.values())


def _parts(problem: ServeProblem) -> list[ServeProblem]:
    """The problem on every cluster alone."""
    return [replace(problem, cluster=cluster, others=()) for cluster in problem.clusters]


def _split(
    problem: ServeProblem, pricers: list[Pricer], account: Account, given: tuple[Pool, ...]
) -> ServeProblem:
    """The problem with its limit of whole answers shared between first token and generation, as all pools answer most.

    The slowest prefill and the slowest decode replicas keep the limit together, so that one split holds for all of them.
    """
    traffic = problem.traffic
    if traffic.e2e_s is None or traffic.osl < 2:
        return problem

    def parted(first_s: float, answer_s: float) -> ServeProblem:
        limits = {
            "ttft_s": min(first_s, traffic.ttft_s or np.inf),
            "tpot_s": min(answer_s / (traffic.osl - 1.0), traffic.tpot_s or np.inf),
        }
        return replace(problem, traffic=replace(traffic, **limits, e2e_s=None))

    def value(first_s: float, answer_s: float) -> float:
        shared = parted(first_s, answer_s)
        offer = _Offer.of(shared, pricers, Account(), given)
        numbers = None if offer is None else offer.numbers(shared)
        if offer is None or numbers is None:
            return 0.0
        fleet = offer.fleet
        cost = float(numbers.left @ fleet.left_cost + numbers.right @ fleet.right_cost)
        return numbers.rate_per_s / (1.0 if problem.machines_count else cost)

    answer_s, account.gap = best_split(value, traffic.e2e_s)
    return parted(traffic.e2e_s - answer_s, answer_s)


def _note_missed(
    problem: ServeProblem, parts: list[ServeProblem], pricers: list[Pricer], account: Account
) -> None:
    """Remembers by how much the lightest loads miss the limits; where they keep them, the rate that is answered at most."""
    scratch = Account()
    prompts, answers = [], []
    for part, pricer in zip(parts, pricers, strict=True):
        found = prefill_kinds(part, ServeSpace(part, "prefill"), pricer, scratch)
        prompts += [(part, pricer, p) for p in found]
        answers += [(part, d) for d in decode_kinds(part, ServeSpace(part, "decode"), pricer, scratch)]
    if not prompts or not answers:
        return
    first_s = [
        _first_s(problem, (part, p), (other, d)) + _admission_s(pricer)
        for part, pricer, p in prompts
        for other, d in answers
    ]
    between_s = [float(d.steps_s[0].min()) for _, d in answers]
    note_missed(problem, account, np.min(first_s, keepdims=True), np.min(between_s, keepdims=True))
    if set(account.nearest) - {"memory"}:
        return
    traffic, most = problem.traffic, 0.0
    if traffic.rate_per_s is not None:
        free = replace(problem, objective="throughput", traffic=replace(traffic, rate_per_s=None))
        most = max((one.requests_per_s for one in search_mixed(free, Account())), default=0.0)
    if traffic.rate_per_s is not None and most > 0.0:
        account.miss("rate", max(traffic.rate_per_s / most, 1.0), "pools on several clusters")


def _first_s(
    problem: ServeProblem, sender: tuple[ServeProblem, Any], receiver: tuple[ServeProblem, Any]
) -> float:
    """The shortest time to the first token from one cluster's prefill replicas to the other's decode replicas, at no load."""
    (part, p), (other, d) = sender, receiver
    senders, receivers = (links_of(kind.kind.rows, kind.kind.recipe) for kind in (p, d))
    slower = min(each.cluster.tiers[-1].effective_bytes_per_s for each in (part, other))
    rate = slower * np.minimum(senders, receivers.max())
    layers = float(problem.model.n_layers)
    return float(np.min(p.batch_s + kv_transfer_s(p.bytes_ * senders, rate, p.batch_s, layers)))


def _counts(
    given: tuple[Pool, ...], clusters: tuple[Cluster, ...], left: list[_Kind], right: list[_Kind]
) -> tuple[Array, Array]:
    """Replicas of the given pools, by kind."""

    def of(kind: _Kind) -> float:
        name = clusters[kind.cluster].name
        return float(sum(p.replicas for p in given if p.cluster == name and kind.is_of(p)))

    return np.array([of(kind) for kind in left]), np.array([of(kind) for kind in right])


def _kept(kind: _Kind, given: tuple[Pool, ...], fastest: Mapping[Any, _Kind]) -> Any:
    """Under which key a kind is kept; None where it is not: one of a size and cache, or every one that is given."""
    if given:
        return len(fastest) if any(kind.is_of(pool) for pool in given) else None
    key = kind.size, str(kind.recipe["cache"])
    return key if kind.rate > (fastest[key].rate if key in fastest else 0.0) else None


def _prefills(
    part: ServeProblem, pricer: Pricer, cluster: int, account: Account, given: tuple[Pool, ...]
) -> Iterator[_Kind]:
    """Of every size the prefill replicas that run most prompts at the load that the first token's limit allows."""
    fastest: dict[Any, _Kind] = {}
    room_s = np.inf if part.traffic.ttft_s is None else part.traffic.ttft_s
    quantile = None if part.traffic.percentile is None else part.traffic.percentile / 100.0
    for p in prefill_kinds(part, ServeSpace(part, "prefill"), pricer, account):
        loads = np.asarray(queue_load(room_s - p.batch_s, p.pace_s * p.prompts, quantile, MOST_LOAD))
        for k in range(len(p.pace_s)):
            kind = _Kind(
                "prefill", cluster, p.kind.recipe, p.kind.rows[k], float(p.kind.chunks[k]), float(loads[k] / p.pace_s[k]),
                float(p.pace_s[k]), float(p.batch_s[k]), float(p.prompts[k]), float(p.bytes_[k]),
            )  # fmt: skip
            key = _kept(kind, given, fastest)
            if key is not None:
                fastest[key] = kind
    yield from fastest.values()


def _decodes(
    part: ServeProblem, pricer: Pricer, cluster: int, account: Account, given: tuple[Pool, ...]
) -> Iterator[_Kind]:
    """Of every size the decode replicas that answer most."""
    fastest: dict[Any, _Kind] = {}
    for d in decode_kinds(part, ServeSpace(part, "decode"), pricer, account):
        for k in range(len(d.rate)):
            held = d.binding[k] == "memory"
            kind = _Kind(
                "decode", cluster, d.kind.recipe, d.kind.rows[k], 2.0, float(d.rate[k]) * (MOST_LOAD if held else 1.0),
                tpot_s=float(d.tpot_s[k]), most=float(d.kind.most[k]), memory=d.memory(k, float(d.in_flight[k])),
                binding=str(d.binding[k]),
            )  # fmt: skip
            key = _kept(kind, given, fastest)
            if key is not None:
                fastest[key] = kind
    yield from fastest.values()


def _transfers(
    problem: ServeProblem, clusters: tuple[Cluster, ...], left: list[_Kind], right: list[_Kind]
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
    problem: ServeProblem, parts: list[ServeProblem], left: list[_Kind], right: list[_Kind], transfer: Array
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


def _together(problem: ServeProblem, parts: list[ServeProblem], p: _Kind, d: _Kind) -> bool:
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


def _choices(count: int, left: list[_Kind], right: list[_Kind]) -> Iterator[NDArray[np.bool_]]:
    """Who may feed whom: everybody, and then one cluster another or itself."""
    yield np.ones((len(left), len(right)), dtype=bool)
    for a in range(count):
        for b in range(count):
            yield np.array([[p.cluster == a and d.cluster == b for d in right] for p in left])


def _found(
    problem: ServeProblem, parts: list[ServeProblem], pricers: list[Pricer], kinds: tuple[list[_Kind], list[_Kind]],
    fleet: Fleet, transfer: Array, numbers: Numbers, account: Account,
) -> MixedFound | None:  # fmt: skip
    """The pools of an answer at the load at which chains keep the limits."""
    left, right = kinds
    total = numbers.rate_per_s
    used = [(np.flatnonzero(numbers.left > 0.5), left), (np.flatnonzero(numbers.right > 0.5), right)]
    lines = {
        kind.role + str(k): _line(parts[kind.cluster], pricers[kind.cluster], kind)
        for index, of in used
        for k in index
        for kind in [of[k]]
    }
    flows = numbers.flow

    def latencies(rate_per_s: float) -> Latencies:
        share = rate_per_s / total
        first = [
            _later(
                prefill_pool(
                    lines[f"prefill{i}"], problem.traffic, share * float(flows[i].sum() / numbers.left[i])
                ),
                float(np.max(transfer[i][flows[i] > 0.0])) + _admission_s(pricers[left[i].cluster]),
            )
            for i in used[0][0]
            if flows[i].sum() > 0.0
        ]
        between = [
            decode_pool(
                lines[f"decode{j}"],
                problem.traffic,
                right[j].most,
                share * float(flows[:, j].sum() / numbers.right[j]),
            )
            for j in used[1][0]
            if flows[:, j].sum() > 0.0
        ]
        return Latencies(_slowest(first), _slowest(between))

    kept = highest_rate(latencies, problem.traffic, total, total)
    if kept is None:
        ratio, limit = latencies(_LIGHT * total).missed(problem.traffic)
        account.miss(limit, ratio, "prompts and generation apart")
        return None
    rate, found = kept
    pools = []
    for index, of in used:
        for k in index:
            kind, flow = of[k], flows[k].sum() if of is left else flows[:, k].sum()
            if flow <= 0.0:
                continue
            count = int(numbers.left[k] if of is left else numbers.right[k])
            pool = _pool(problem, parts[kind.cluster], kind, count, rate / total * float(flow) / count, found)
            pools.append(replace(pool, share=float(flow) / total if len(index) > 1 else 0.0))
    slow = max((right[j] for j in used[1][0]), key=lambda d: (d.memory or {}).get("peak", 0.0))
    ratio, limit = found.missed(problem.traffic)
    binding = "rate" if problem.traffic.rate_per_s is not None else limit if ratio > NEARLY else slow.binding
    device = parts[slow.cluster].cluster.device
    software = pricers[slow.cluster].stack.serving
    assert software is not None
    prices = [parts[_index(parts, pool)].usd_per_hour for pool in pools]
    return MixedFound(
        tuple(pools), rate, found,
        None if None in prices else float(sum(p * pool.devices for p, pool in zip(prices, pools, strict=True) if p is not None)),
        float(sum(float(parts[_index(parts, pool)].cluster.device.power_w) * pool.devices for pool in pools)),
        slow.memory or {}, float(software.memory_fraction) * float(device.memory_bytes),
        int(sum(right[j].most * numbers.right[j] for j in used[1][0])), binding,
    )  # fmt: skip


def _index(parts: list[ServeProblem], pool: Pool) -> int:
    return next(k for k, part in enumerate(parts) if part.cluster.name == pool.cluster)


def _pool(
    problem: ServeProblem, part: ServeProblem, kind: _Kind, count: int, rate_per_s: float, found: Latencies
) -> Pool:
    mesh = degrees_of(kind.row)
    if kind.role == "prefill":
        return Pool(
            "prefill", count, mesh, {**kind.recipe, "chunk_tokens": int(kind.chunk)}, 1, part.cluster.name
        )
    held = rate_per_s * (problem.traffic.osl - 1.0) * found.tpot_s["mean"]
    in_flight = max(1, int(np.ceil(min(held, kind.most))))
    return Pool(
        "decode", count, mesh, {**kind.recipe, "max_sequences": int(kind.most)}, in_flight, part.cluster.name
    )


def _line(part: ServeProblem, pricer: Pricer, kind: _Kind) -> Line:
    mesh = mesh_of(kind.row[None, :])
    iterations = iterations_of(part, kind.recipe, mesh, pricer)
    return Line.of(iterations, part.traffic, kind.most, kind.chunk * float(mesh.dp[0]))


def _admission_s(pricer: Pricer) -> float:
    assert pricer.stack.serving is not None
    return float(pricer.stack.serving.admission_s)


def _later(values: Mapping[str, float], seconds: float) -> dict[str, float]:
    return {name: value + seconds for name, value in values.items()}


def _slowest(pools: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(pool[name] for pool in pools) for name in pools[0]}
