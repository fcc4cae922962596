"""Prompts and generation on devices of several types: kinds of replicas on every cluster, and the exact numbers of each.

Every cluster has its kinds (layout, budget, formats) for both phases; of each size the fastest is kept. A request goes from any
prefill replica to any decode replica over the slower cluster's network, and an integer program finds the numbers of replicas and
who feeds whom (:mod:`planner.serving.matching`). Listed are the best of all, and the best of every two clusters. A limit of
whole answers is split between both phases first (:mod:`planner.serving.answer_split`).

A plan's latencies are those of its slowest pools: what every request keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.engine import Pricer
from planner.ledger import Array
from planner.serving.answer_split import best_split
from planner.serving.candidates import Account, iterations_of
from planner.serving.disaggregated import note_missed
from planner.serving.matching import Fleet, Numbers
from planner.serving.offer import Kind, Offer, parts_of
from planner.serving.percentiles import NEARLY, Latencies, Line, decode_pool, highest_rate, prefill_pool
from planner.serving.plan import Pool
from planner.serving.pools import Decode, Prefill, decode_kinds, prefill_kinds, transfer_s
from planner.serving.space import ServeSpace, degrees_of, mesh_of
from planner.specs.serve_problem import ServeProblem

__all__ = ["MixedFound", "search_mixed"]

_LIGHT = 1e-3  # of the rate that pools carry: next to nobody waits


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
    parts = parts_of(problem)
    pricers = [Pricer(part.cluster, part.stack) for part in parts]
    scratch = Account()  # kinds of replicas; what counts as a candidate is a pair
    shared, bound = _split(problem, pricers, given)
    offer = Offer.of(shared, pricers, scratch, given)
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
    best = 0.0
    for allowed in _choices(len(parts), offer.left, offer.right):
        numbers = offer.numbers(problem, allowed)
        if numbers is None:
            continue
        kinds = offer.left, offer.right
        one = _found(problem, parts, pricers, kinds, fleet, offer.transfer_s, numbers, account)
        if one is not None:
            best = max(best, offer.value(problem, numbers, one.requests_per_s))
            found.setdefault(
                tuple((p.role, p.cluster, p.replicas, tuple(p.mesh.items())) for p in one.pools), one
            )
    if not found:
        _note_missed(problem, parts, pricers, account)
    account.gap = max(1.0 - best / bound, 0.0) if bound > 0.0 else 0.0
    return list(found.values())


def _split(
    problem: ServeProblem, pricers: list[Pricer], given: tuple[Pool, ...]
) -> tuple[ServeProblem, float]:
    """The problem with its limit of whole answers shared between first token and generation as pools answer most, and a bound.

    No split has a value above the bound; 0 where there is nothing to split.

    The slowest prefill and the slowest decode replicas keep the limit together, so that one split holds for all of them.
    """
    traffic = problem.traffic
    if traffic.e2e_s is None or traffic.osl < 2:
        return problem, 0.0

    def parted(first_s: float, answer_s: float) -> ServeProblem:
        ttft_s = min(first_s, traffic.ttft_s or np.inf)
        tpot_s = min(answer_s / (traffic.osl - 1.0), traffic.tpot_s or np.inf)
        return replace(problem, traffic=replace(traffic, ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=None))

    def value(first_s: float, answer_s: float) -> float:
        shared = parted(first_s, answer_s)
        offer = Offer.of(shared, pricers, Account(), given)
        numbers = None if offer is None else offer.numbers(shared)
        if offer is None or numbers is None:
            return 0.0
        return offer.value(problem, numbers, numbers.rate_per_s)

    answer_s, bound = best_split(value, traffic.e2e_s)
    return parted(traffic.e2e_s - answer_s, answer_s), bound


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
    pairs = [_lightest(problem, one, other) for one in prompts for other in answers]
    first_s, between_s = (np.concatenate([pair[k] for pair in pairs]) for k in (0, 1))
    if len(first_s):
        note_missed(problem, account, first_s, between_s)
    if set(account.nearest) - {"memory"}:
        return
    traffic, most = problem.traffic, 0.0
    if traffic.rate_per_s is not None:
        free = replace(problem, objective="throughput", traffic=replace(traffic, rate_per_s=None))
        most = max((one.requests_per_s for one in search_mixed(free, Account())), default=0.0)
    if traffic.rate_per_s is not None and most > 0.0:
        account.miss("rate", max(traffic.rate_per_s / most, 1.0), "pools on several clusters")


def _lightest(
    problem: ServeProblem, sender: tuple[ServeProblem, Pricer, Prefill], receiver: tuple[ServeProblem, Decode]
) -> tuple[Array, Array]:
    """Times to the first token and between tokens, at no load, of all pairs of rows that stand side by side."""
    (part, pricer, p), (other, d) = sender, receiver
    slower = min(each.cluster.tiers[-1].effective_bytes_per_s for each in (part, other))
    first_s = p.batch_s[:, None] + transfer_s(p, d, slower, problem.model.n_layers) + _admission_s(pricer)
    taken = p.kind.size[:, None] + d.kind.size[None, :]
    room = part.cluster.devices if part.cluster is other.cluster else np.inf
    fits = (taken <= room) & (p.kind.recipe["cache"] == d.kind.recipe["cache"])
    return first_s[fits], np.broadcast_to(d.steps_s[0], fits.shape)[fits]


def _choices(count: int, left: list[Kind], right: list[Kind]) -> Iterator[NDArray[np.bool_]]:
    """Who may feed whom: everybody, and then one cluster another or itself."""
    yield np.ones((len(left), len(right)), dtype=bool)
    for a in range(count):
        for b in range(count):
            yield np.array([[p.cluster == a and d.cluster == b for d in right] for p in left])


def _found(
    problem: ServeProblem, parts: list[ServeProblem], pricers: list[Pricer], kinds: tuple[list[Kind], list[Kind]],
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
    problem: ServeProblem, part: ServeProblem, kind: Kind, count: int, rate_per_s: float, found: Latencies
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


def _line(part: ServeProblem, pricer: Pricer, kind: Kind) -> Line:
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
