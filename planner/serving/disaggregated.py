"""Prompts and generation in pools of their own, and how many replicas of each carry most together.

A prefill replica is a queue that serves prompts one batch after the other (M/D/1; with stages, a tandem of which the slowest
sets the pace); a decode replica holds as many sequences as its caches and the limit between tokens allow. Keys and values travel
from one to the other, layer by layer while the prompt still runs. For every pair of kinds of replicas the best numbers on the
given devices follow exactly: one pool's rate grows with its replicas, the other's falls with what is left. A limit of whole
answers is split between the pools where they answer most (:mod:`planner.serving.pair_loads`).

Sources: Zhong et al. 2024 (DistServe, OSDI), section 3 (prefill as M/D/1); Patel et al. 2024 (Splitwise, ISCA), section 4.2
(transfer per layer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.engine.pricer import Pricer
from planner.ledger import Array
from planner.serving.candidates import Account
from planner.serving.front import Curve
from planner.serving.numbers import Asked, Replicas, numbers_of
from planner.serving.pair_loads import HIGHEST_LOAD, Matched, Pairs, best_loads, prompt_rate
from planner.serving.percentiles import Latencies
from planner.serving.pools import Decode, Prefill, decode_kinds, prefill_kinds, transfer_s
from planner.serving.space import ServeSpace, mesh_of
from planner.specs.serve_problem import ServeProblem

__all__ = ["Split", "note_missed", "search_disaggregated"]

Generating: TypeAlias = Callable[[ServeProblem, ServeSpace, Pricer, Account], list[Decode]]


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A pair of pools at the load that it carries.

    Attributes:
        recipes, rows, chunk: what each pool runs, prefill first; the budget of prefill iterations.
        sizes: devices of a replica of either pool.
        replicas: of each pool.
        requests_per_s: answers of both pools together.
        load: fraction of time that prefill replicas are at work.
        wait_s, prefill_s, transfer_s: parts of the time to the first token.
        tpot_s: time between tokens; ``in_flight`` sequences of a decode replica, ``most`` that its caches hold.
        memory: bytes of the fullest decode device.
        binding: what keeps the load from growing.
        latencies: of arrivals of their own, where they were asked for.
    """

    recipes: tuple[Mapping[str, str], Mapping[str, str]]
    rows: tuple[NDArray[Any], NDArray[Any]]
    sizes: tuple[int, int]
    chunk: float
    replicas: tuple[int, int]
    requests_per_s: float
    load: float
    wait_s: float
    prefill_s: float
    transfer_s: float
    admission_s: float
    tpot_s: float
    in_flight: int
    most: float
    memory: Mapping[str, float]
    binding: str
    latencies: Latencies | None = None

    @property
    def devices(self) -> int:
        """Devices of both pools."""
        return sum(n * size for n, size in zip(self.replicas, self.sizes, strict=True))

    def ttft_at(self, quantile: float | None) -> float:
        """Mean (None) or quantile of the time to the first token."""
        wait_s = self.wait_s
        if quantile is not None:
            wait_s = (
                self.wait_s / self.load * np.log(self.load / (1.0 - quantile))
                if self.load > 1.0 - quantile
                else 0.0
            )
        return float(wait_s + self.prefill_s + self.transfer_s + self.admission_s)


def search_disaggregated(
    problem: ServeProblem, pricer: Pricer, account: Account, generating: Generating = decode_kinds
) -> list[Split]:
    """The best numbers of replicas for every pair of replica sizes; ``generating`` lists those that generate."""
    if problem.traffic.osl < 2 or problem.cluster.devices < 2:
        return []
    scratch = Account()  # kinds of replicas; what counts as a candidate is a pair
    left, right = ServeSpace(problem, "prefill"), ServeSpace(problem, "decode")
    prefills, decodes = (
        prefill_kinds(problem, left, pricer, scratch),
        generating(problem, right, pricer, scratch),
    )
    if not (prefills and decodes) and not account.candidates:
        account.rejected.update(scratch.rejected)  # what to tell where nothing is left
    asked = left.fixed.get("replicas"), right.fixed.get("replicas")
    found: list[Split] = []
    for p in prefills:
        for d in decodes:
            if p.kind.recipe["cache"] == d.kind.recipe["cache"]:
                found += _pairs(problem, p, d, asked, pricer, account)
    return found


def _pairs(
    problem: ServeProblem, p: Prefill, d: Decode, asked: Asked, pricer: Pricer, account: Account
) -> list[Split]:
    """The best pair of every two sizes of replicas, of one recipe each."""
    assert pricer.stack.serving is not None
    admission_s = float(pricer.stack.serving.admitted_s(problem.traffic.isl))
    link_bytes_per_s = problem.cluster.tiers[-1].effective_bytes_per_s
    way_s = transfer_s(p, d, link_bytes_per_s, problem.model.n_layers)
    first_s = p.batch_s[:, None] + way_s + admission_s
    prompts = prompt_rate(problem, p, np.arange(len(p.batch_s))[:, None], first_s, None)
    able = _able(problem, p, d, first_s, prompts, account)
    if not able.any():
        return []
    if problem.traffic.concurrency is None and problem.traffic.rate_per_s is None:
        account.curves.append(_curve(problem, p, d, np.where(able | (d.rate <= 0.0), prompts, 0.0)))
    i, j = np.nonzero(able)
    pairs = Pairs(problem, p, d, asked, i, j, first_s[i, j], admission_s)
    best, excluded = best_loads(pairs)
    kept = best.value > 0.0
    account.scored += int(kept.sum())
    none = "more devices than there are" if problem.traffic.rate_per_s is None else "rate"
    account.rejected[none] += int((~kept & ~excluded).sum())
    if excluded.any():
        account.excluded["throughput"] += int(excluded.sum())
    if not kept.any():
        _note_rate(pairs, account)
    return [_split(pairs, best, int(k)) for k in _best_of_sizes(pairs, best.value) if kept[k]]


def _able(
    problem: ServeProblem, p: Prefill, d: Decode, first_s: Array, prompts: Array, account: Account
) -> NDArray[np.bool_]:
    """The pairs that keep the limits at some load and stand on the devices; the others are counted with their reason."""
    traffic, devices = problem.traffic, problem.cluster.devices
    rules = list(_pair_rules(problem, p, d))
    fits = p.kind.size[:, None] + d.kind.size[None, :] <= devices
    stands = np.logical_and.reduce([fits, *(ok for _, ok in rules)])
    answer_s = first_s + (traffic.osl - 1.0) * d.steps_s[0]
    if stands.any():
        between_s = np.broadcast_to(d.steps_s[0], stands.shape)
        note_missed(problem, account, first_s[stands], between_s[stands])
    able = np.ones(stands.shape, dtype=bool)
    for reason, ok in (
        ("ttft limit", prompts > 0.0),
        ("tpot limit", np.broadcast_to(d.rate > 0.0, able.shape)),
        ("e2e limit", answer_s <= (np.inf if traffic.e2e_s is None else traffic.e2e_s)),
        *rules,
        ("more devices than there are", fits),
    ):
        account.rejected[reason] += int((able & ~ok).sum())
        able &= ok
    account.candidates += able.size
    return able


def _note_rate(pairs: Pairs, account: Account) -> None:
    """Remembers by how much a rate that nothing answers is more than all devices answer."""
    traffic = pairs.problem.traffic
    if traffic.rate_per_s is None:
        return
    free = replace(pairs.problem, objective="throughput", traffic=replace(traffic, rate_per_s=None))
    most = float(best_loads(replace(pairs, problem=free))[0].answered.max())
    if most > 0.0:
        account.miss("rate", max(traffic.rate_per_s / most, 1.0), "prompts and generation apart")


def _best_of_sizes(pairs: Pairs, value: Array) -> NDArray[np.intp]:
    """The best pair of every two sizes of replicas, best first."""
    order = np.argsort(-value, kind="stable")
    left, right = pairs.sizes
    sizes = left[order] * (pairs.problem.cluster.devices + 1.0) + right[order]
    return np.asarray(order[np.sort(np.unique(sizes, return_index=True)[1])])


def _pair_rules(problem: ServeProblem, p: Prefill, d: Decode) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """What the engine says of every prefill row (down) beside every decode row (across)."""
    if problem.launcher is None:
        return
    shape = len(p.kind.rows), len(d.kind.rows)
    for rule in problem.launcher.pairs(mesh_of(p.kind.rows[:, None, :]), mesh_of(d.kind.rows[None, :, :])):
        yield f"{problem.launcher.name}: {rule.reason}", np.broadcast_to(rule.ok, shape)


def note_missed(problem: ServeProblem, account: Account, first_s: Array, between_s: Array) -> None:
    """Remembers by how much the lightest loads miss the limits, with pairs' times to the first token and between tokens."""
    traffic = problem.traffic
    for name, limit, found_s in (
        ("ttft", traffic.ttft_s, first_s),
        ("tpot", traffic.tpot_s, between_s),
        ("e2e", traffic.e2e_s, first_s + (traffic.osl - 1.0) * between_s),
    ):
        if limit is not None and (nearest_s := float(found_s.min())) > limit:
            account.miss(name, nearest_s / limit, "prompts and generation apart")


def _curve(problem: ServeProblem, p: Prefill, d: Decode, prompt_rate: Array) -> Curve:
    """Decode replicas at some loads, each beside the prefill replicas that run most prompts per device."""
    traffic, devices = problem.traffic, problem.cluster.devices
    best = int(np.argmax(prompt_rate.max(axis=1) / p.kind.size))
    rate = np.tile(prompt_rate[best], len(d.loads))
    answers = (d.loads / ((traffic.osl - 1.0) * d.steps_s)).reshape(-1)
    left, right = np.full_like(rate, p.kind.size[best]), np.tile(d.kind.size, len(d.loads))
    room = (rate > 0.0) & (left + right <= devices)
    rates, sizes = (np.where(room, rate, 1.0), answers), (left, np.where(room, right, 1.0))
    x, y = numbers_of(problem, Replicas(rates, sizes))
    answered = np.minimum(x * rate, y * answers)
    per_device = np.where(room, answered * traffic.osl / np.maximum(x * left + y * right, 1.0), 0.0)
    rows = np.stack(
        [
            np.broadcast_to(p.kind.rows[best], (len(rate), len(p.kind.rows[best]))),
            np.tile(d.kind.rows, (len(d.loads), 1)),
        ],
        axis=1,
    )
    replicas = np.stack([x, y], axis=1)
    return Curve(
        "disaggregated", 1.0 / d.steps_s.reshape(-1), per_device, replicas, rows, ("prefill", "decode")
    )


def _split(pairs: Pairs, best: Matched, k: int) -> Split:
    """One pair at its load; sequences per decode replica follow from Little's law at the time that they take."""
    p, d, i, j, traffic = pairs.p, pairs.d, int(pairs.i[k]), int(pairs.j[k]), pairs.problem.traffic
    replicas, answered = (int(best.prefills[k]), int(best.decodes[k])), float(best.answered[k])
    most, tpot_s, pace_s = float(best.in_flight[k]), float(best.tpot_s[k]), float(p.pace_s[i])
    load = min(answered / replicas[0] * pace_s, HIGHEST_LOAD)
    held = answered / replicas[1] * (traffic.osl - 1.0) * tpot_s
    return Split(
        recipes=(p.kind.recipe, d.kind.recipe),
        rows=(p.kind.rows[i], d.kind.rows[j]),
        sizes=(int(p.kind.size[i]), int(d.kind.size[j])),
        chunk=float(p.kind.chunks[i]),
        replicas=replicas,
        requests_per_s=answered,
        load=load,
        wait_s=load * pace_s * float(p.prompts[i]) / (2.0 * (1.0 - load)),
        prefill_s=float(p.batch_s[i]),
        transfer_s=float(pairs.first_s[k]) - float(p.batch_s[i]) - pairs.admission_s,
        admission_s=pairs.admission_s,
        tpot_s=tpot_s,
        in_flight=max(1, round(held)),
        most=float(d.kind.most[j]),
        memory=d.memory(j, held),
        binding=_binding(pairs, best, k, held >= most * (1.0 - 1e-9)),
    )


def _binding(pairs: Pairs, best: Matched, k: int, slower: bool) -> str:
    """What keeps a pair's load from growing: a given rate, clients, whole answers, or what keeps the slower pool."""
    traffic, d, j = pairs.problem.traffic, pairs.d, int(pairs.j[k])
    if traffic.rate_per_s is not None:
        return "rate"
    if slower and best.in_flight[k] >= d.in_flight[j]:
        return str(d.binding[j])
    if best.answered[k] * pairs.cycle_s(best.tpot_s)[k] >= (traffic.concurrency or np.inf) * (1.0 - 1e-9):
        return "concurrency"
    if traffic.e2e_s is None:  # a sequence more, and clients would send fewer prompts than it answers
        if slower:
            return "concurrency"
        return "prompts" if traffic.ttft_s is None else "ttft"
    rest_s = traffic.e2e_s - (traffic.osl - 1.0) * float(best.tpot_s[k])
    return "e2e" if slower or rest_s < (traffic.ttft_s or np.inf) else "ttft"
