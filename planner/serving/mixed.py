"""Prompts and generation on devices of several types: kinds of replicas on every cluster, and the exact numbers of each.

Every cluster has its kinds (layout, budget, formats) for both phases (:mod:`planner.serving.kinds`); those that no other of the
size makes superfluous are kept (:mod:`planner.serving.offer`), and an integer program finds the numbers of replicas and who feeds
whom (:mod:`planner.serving.matching`). Listed are the best of all, and the best of every two clusters. A limit of
whole answers is split between both phases first (:mod:`planner.serving.answer_split`).

A plan's latencies are those of its slowest pools: what every request keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np

from planner.engine.pricer import Pricer
from planner.serving.answer_split import best_split
from planner.serving.candidates import Account, iterations_of
from planner.serving.disaggregated import note_missed
from planner.serving.kinds import Kinds, parts_of
from planner.serving.matching import Numbers
from planner.serving.offer import Kind, Offer
from planner.serving.percentiles import NEARLY, Latencies, Line, decode_pool, highest_rate, prefill_pool
from planner.serving.plan import Pool
from planner.serving.pools import Index
from planner.serving.space import degrees_of, mesh_of
from planner.specs.serve_problem import ServeProblem

__all__ = ["MixedFound", "search_mixed"]

_LIGHT = 1e-3  # of the rate that pools carry: next to nobody waits
_SPARE = 1.1  # times the replicas for a rate at which the chains' latencies miss a limit that means keep


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


def search_mixed(problem: ServeProblem, account: Account, given: tuple[Pool, ...] = ()) -> list[MixedFound]:
    """The best numbers of replicas over all clusters, and over every ordered two of them; or those of ``given`` pools."""
    pricers = [Pricer(part.cluster, part.stack) for part in parts_of(problem)]
    scratch = Account()  # kinds of replicas; what counts as a candidate is a pair
    kinds = Kinds.of(problem, pricers, scratch)
    account.nearest.update(scratch.nearest)
    if kinds is None:
        account.rejected.update(scratch.rejected)
        return []
    found: dict[tuple[Any, ...], MixedFound] = {}
    best = bound = 0.0
    for route in [kinds] if given else _routes(kinds):
        shared, most = _split(problem, route, given)
        if route is kinds:
            _count(shared, account)
        one, value = _best_of(problem, shared, given, account)
        best, bound = max(best, value), max(bound, most)
        if one is not None:
            found.setdefault(
                tuple((p.role, p.cluster, p.replicas, tuple(p.mesh.items())) for p in one.pools), one
            )
    if not found:
        _note_missed(problem, kinds, account)
    account.gap = max(1.0 - best / bound, 0.0) if bound > 0.0 else 0.0
    return list(found.values())


def _routes(kinds: Kinds) -> Iterator[Kinds]:
    """Everybody may feed everybody, and then one cluster another or itself."""
    yield kinds
    for sender, receiver in product(range(len(kinds.parts)), repeat=2):
        if (some := kinds.along(sender, receiver)) is not None:
            yield some


def _split(problem: ServeProblem, kinds: Kinds, given: tuple[Pool, ...]) -> tuple[Kinds, float]:
    """Kinds under the limit of whole answers as it is shared between first token and generation, and a bound.

    It is shared as pools answer most; no split has a value above the bound, which is 0 where there is nothing to split. The
    slowest prefill and the slowest decode replicas keep the limit together, so that one split holds for all of them.
    """
    traffic = problem.traffic
    if traffic.e2e_s is None or traffic.osl < 2:
        return kinds, 0.0

    def parted(first_s: float, answer_s: float) -> Kinds:
        ttft_s = min(first_s, traffic.ttft_s or np.inf)
        tpot_s = min(answer_s / (traffic.osl - 1.0), traffic.tpot_s or np.inf)
        limits = replace(traffic, ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=None)
        return kinds.within(replace(problem, traffic=limits))

    def value(first_s: float, answer_s: float) -> float:
        offer = Offer.of(parted(first_s, answer_s), given)
        numbers = None if offer is None else offer.numbers()
        return 0.0 if offer is None or numbers is None else offer.value(numbers, numbers.rate_per_s)

    answer_s, bound = best_split(value, traffic.e2e_s)
    return parted(traffic.e2e_s - answer_s, answer_s), bound


def _count(kinds: Kinds, account: Account) -> None:
    """Pairs of kinds: what became of them."""
    offer = Offer.of(kinds)
    scored = 0 if offer is None else offer.fleet.prompts.size
    prompts, answers = kinds.rates()
    together, between, first = kinds.allowed, answers > 0.0, prompts > 0.0
    account.candidates += together.size
    account.rejected["cannot stand side by side"] += int((~together).sum())
    account.rejected["tpot limit"] += int((together & ~between).sum())
    account.rejected["ttft limit"] += int((together & between & ~first).sum())
    account.scored += scored
    account.excluded["another of the size does as much"] += int((between & first).sum()) - scored


def _note_missed(problem: ServeProblem, kinds: Kinds, account: Account) -> None:
    """Remembers by how much the lightest loads miss the limits; where they keep them, the rate that is answered at most."""
    between_s = np.concatenate([d.steps_s[0] for _, d in kinds.right])
    if kinds.allowed.any():
        between_s = np.broadcast_to(between_s, kinds.allowed.shape)[kinds.allowed]
        note_missed(problem, account, kinds.first_s[kinds.allowed], between_s)
    if set(account.nearest) - {"memory"}:
        return
    traffic, most = problem.traffic, 0.0
    if traffic.rate_per_s is not None:
        free = replace(problem, objective="throughput", traffic=replace(traffic, rate_per_s=None))
        most = max((one.requests_per_s for one in search_mixed(free, Account())), default=0.0)
    if traffic.rate_per_s is not None and most > 0.0:
        account.miss("rate", max(traffic.rate_per_s / most, 1.0), "pools on several clusters")


def _best_of(
    problem: ServeProblem, kinds: Kinds, given: tuple[Pool, ...], account: Account
) -> tuple[MixedFound | None, float]:
    """The best pools whose latencies under load keep the limits, and their value.

    Kinds that keep them at no load stand aside for others; where all do but at less than a given rate, more replicas share it.
    """
    spare = 1.0
    while (offer := Offer.of(kinds, given)) is not None:
        numbers = offer.numbers(spare)
        if numbers is None:
            break
        load = _Load(kinds, offer, numbers)
        kept = highest_rate(load.latencies, problem.traffic, numbers.rate_per_s, numbers.rate_per_s)
        if kept is not None:
            return load.found(problem, *kept), offer.value(numbers, kept[0])
        slow = load.slow(account)
        if given or (not any(slow) and problem.traffic.rate_per_s is None):
            break
        kinds, spare = kinds.without(*slow), spare if any(slow) else spare * _SPARE
    return None, 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Load:
    """Pools under load, by chains."""

    kinds: Kinds
    offer: Offer
    numbers: Numbers
    lines: dict[Kind, Line] = field(default_factory=dict)

    def latencies(self, rate_per_s: float) -> Latencies:
        """Of the slowest pools, where all answer so many requests per second together."""
        return Latencies(
            _slowest([self._first_s(i, rate_per_s) for i in self._used(0)]),
            _slowest([self._between_s(j, rate_per_s) for j in self._used(1)]),
        )

    def slow(self, account: Account) -> tuple[list[int], list[int]]:
        """Kinds of either role that miss their limit at next to no load, which the account remembers."""
        traffic, light = self.kinds.problem.traffic, _LIGHT * self.numbers.rate_per_s
        where = "mean" if traffic.percentile is None else "at"
        found: tuple[list[int], list[int]] = ([], [])
        for role, (limit, limit_s, kinds, seconds) in enumerate(
            (
                ("ttft", traffic.ttft_s, self.offer.left, self._first_s),
                ("tpot", traffic.tpot_s, self.offer.right, self._between_s),
            )
        ):
            for k in self._used(role):
                ratio = 0.0 if limit_s is None else seconds(k, light)[where] / limit_s
                if ratio > 1.0:
                    found[role].append(kinds[k].index)
                    account.miss(limit, ratio, "prompts and generation apart")
        return found

    def found(self, problem: ServeProblem, rate_per_s: float, latencies: Latencies) -> MixedFound:
        """The pools at a rate."""
        parts, share = self.kinds.parts, rate_per_s / self.numbers.rate_per_s
        pools = []
        for role, kinds in enumerate((self.offer.left, self.offer.right)):
            used = self._used(role)
            for k in used:
                count, flow = self._of(role, k)
                pool = _pool(parts, kinds[k], count, share * flow / count, latencies)
                own = flow / self.numbers.rate_per_s
                pools.append(replace(pool, share=own if len(used) > 1 else 0.0))
        answering = [self.offer.right[j] for j in self._used(1)]
        slow = max(answering, key=lambda d: (d.memory or {}).get("peak", 0.0))
        ratio, limit = latencies.missed(problem.traffic)
        binding = (
            "rate" if problem.traffic.rate_per_s is not None else limit if ratio > NEARLY else slow.binding
        )
        software = self.kinds.pricers[slow.cluster].stack.serving
        assert software is not None
        own_parts = [next(part for part in parts if part.cluster.name == pool.cluster) for pool in pools]
        priced = list(zip(own_parts, pools, strict=True))
        usd = [
            None if (price := part.usd_per_hour) is None else price * pool.devices for part, pool in priced
        ]
        watts = sum(float(part.cluster.device.power_w) * pool.devices for part, pool in priced)
        budget = float(software.memory_fraction) * float(parts[slow.cluster].cluster.device.memory_bytes)
        most = int(sum(self.offer.right[j].most * self._of(1, j)[0] for j in self._used(1)))
        cost = None if None in usd else sum(each for each in usd if each is not None)
        return MixedFound(
            tuple(pools), rate_per_s, latencies, cost, watts, slow.memory or {}, budget, most, binding
        )

    def _used(self, role: int) -> Index:
        """Kinds of a role that have something to do."""
        return np.flatnonzero(self.numbers.flow.sum(axis=1 - role) > 0.0)

    def _of(self, role: int, k: int) -> tuple[int, float]:
        """Replicas of a kind, and what all of them carry."""
        count = (self.numbers.left, self.numbers.right)[role][k]
        return round(float(count)), float(self.numbers.flow.sum(axis=1 - role)[k])

    def _first_s(self, i: int, rate_per_s: float) -> dict[str, float]:
        count, flow = self._of(0, i)
        own = rate_per_s / self.numbers.rate_per_s * flow / count
        beside_s = float(np.max(self.offer.beside_s[i][self.numbers.flow[i] > 0.0]))
        found = prefill_pool(self._line(self.offer.left[i]), self.kinds.problem.traffic, own)
        return {name: seconds + beside_s for name, seconds in found.items()}

    def _between_s(self, j: int, rate_per_s: float) -> dict[str, float]:
        count, flow = self._of(1, j)
        own, kind = rate_per_s / self.numbers.rate_per_s * flow / count, self.offer.right[j]
        return decode_pool(self._line(kind), self.kinds.problem.traffic, kind.most, own)

    def _line(self, kind: Kind) -> Line:
        if kind not in self.lines:
            part, pricer = self.kinds.parts[kind.cluster], self.kinds.pricers[kind.cluster]
            mesh = mesh_of(kind.row[None, :])
            iterations = iterations_of(part, kind.recipe, mesh, pricer)
            self.lines[kind] = Line.of(iterations, part.traffic, kind.most, kind.chunk * float(mesh.dp[0]))
        return self.lines[kind]


def _pool(parts: list[ServeProblem], kind: Kind, count: int, rate_per_s: float, found: Latencies) -> Pool:
    mesh, cluster = degrees_of(kind.row), parts[kind.cluster].cluster.name
    if kind.role == "prefill":
        return Pool("prefill", count, mesh, {**kind.recipe, "chunk_tokens": int(kind.chunk)}, 1, cluster)
    held = rate_per_s * (parts[kind.cluster].traffic.osl - 1.0) * found.tpot_s["mean"]
    in_flight = max(1, int(np.ceil(min(held, kind.most))))
    return Pool("decode", count, mesh, {**kind.recipe, "max_sequences": int(kind.most)}, in_flight, cluster)


def _slowest(pools: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(pool[name] for pool in pools) for name in pools[0]}
