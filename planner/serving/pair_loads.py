"""Prefill beside decode replicas, and the load of both at which they answer most.

A limit of whole answers couples the pools: what generation takes of it at its load, prompts cannot wait. So do clients that
replace every answer: the longer generation takes, the fewer prompts they send. Each number of sequences of a decode replica is
therefore a choice of its own, beside which prefill replicas take the highest load that the rest of the limit allows. Time
between tokens grows with the load, so that between two loads no prefill replica does more than at the lower, no decode replica
more than the higher load's sequences at the lower one's pace, and no replicas answer more per device than their devices shared
in proportion would. What these bounds leave above the best that is known for its sizes of replicas is halved, down to the
request.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from planner.costs.serving import queue_load
from planner.ledger import Array
from planner.serving.numbers import Asked, Replicas, numbers_of, seated_numbers
from planner.serving.pools import Decode, Index, Prefill
from planner.specs.serve_problem import ServeProblem

__all__ = ["HIGHEST_LOAD", "Matched", "Pairs", "best_loads", "prompt_rate"]

HIGHEST_LOAD = 0.95  # of a prefill replica where no limit keeps it lower: beyond it the queue has no steady state to speak of
_MORE = 1.0 + 1e-9  # of a value, from which another is better


def prompt_rate(problem: ServeProblem, p: Prefill, i: Index, first_s: Array, tpot_s: Array | None) -> Array:
    """Requests per second of prefill replicas (rows ``i``) at the highest load that keeps the limits.

    Args:
        problem: its traffic has the limits.
        p, i: the replicas.
        first_s: time to the first token without a wait.
        tpot_s: time between tokens of the decode replicas; None: a limit of whole answers does not count.
    """
    traffic = problem.traffic
    room = np.full_like(first_s, np.inf) if traffic.ttft_s is None else traffic.ttft_s - first_s
    if traffic.e2e_s is not None and tpot_s is not None:
        room = np.minimum(room, traffic.e2e_s - first_s - (traffic.osl - 1.0) * tpot_s)
    quantile = None if traffic.percentile is None else traffic.percentile / 100.0
    load = np.asarray(queue_load(room, (p.pace_s * p.prompts)[i], quantile, HIGHEST_LOAD))
    return np.asarray(load / p.pace_s[i])


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Rows ``i`` of prefill beside rows ``j`` of decode replicas, pair by pair.

    ``first_s`` is the time to the first token without a wait, of which ``admission_s`` an engine takes to admit a request.
    """

    problem: ServeProblem
    p: Prefill
    d: Decode
    asked: Asked
    i: Index
    j: Index
    first_s: Array
    admission_s: float

    @property
    def sizes(self) -> tuple[Array, Array]:
        """Devices of a replica of either kind."""
        return self.p.kind.size[self.i], self.d.kind.size[self.j]

    def take(self, index: Index | NDArray[np.bool_]) -> Pairs:
        """Some pairs."""
        return replace(self, i=self.i[index], j=self.j[index], first_s=self.first_s[index])

    def answers(self, in_flight: Array, tpot_s: Array) -> Array:
        """Requests per second of a decode replica that generates so many sequences."""
        return np.where(in_flight > 0.0, in_flight / ((self.problem.traffic.osl - 1.0) * tpot_s), 0.0)

    def cycle_s(self, tpot_s: Array) -> Array:
        """Seconds for which a request is in flight, where none waits: most of them in a decode replica."""
        return self.first_s - self.admission_s + (self.problem.traffic.osl - 1.0) * tpot_s

    def at(self, in_flight: Array, tpot_s: Array, seated: bool = True) -> Matched:
        """The pairs at loads of their decode replicas."""
        prompts = prompt_rate(self.problem, self.p, self.i, self.first_s, tpot_s)
        return self.matched(in_flight, tpot_s, prompts, self.answers(in_flight, tpot_s), seated)

    def matched(
        self, in_flight: Array, tpot_s: Array, prompts: Array, answers: Array, seated: bool
    ) -> Matched:
        """The best numbers of replicas of given rates, on nodes that an engine finds for them or on devices however they lie."""
        problem, traffic, sizes = self.problem, self.problem.traffic, self.sizes
        able = (prompts > 0.0) & (answers > 0.0)
        rates = np.where(able, prompts, 1.0), np.where(able, answers, 1.0)
        clients = np.inf if traffic.concurrency is None else traffic.concurrency / self.cycle_s(tpot_s)
        pools = Replicas(rates, sizes, self.asked, clients)
        x, y = numbers_of(problem, pools) if len(able) else rates
        if seated:
            x, y = seated_numbers(problem, pools, x, y)
        answered = np.minimum(np.minimum(x * rates[0], y * rates[1]), clients)
        answered = np.where(able & (x > 0.0), answered, 0.0)
        if traffic.rate_per_s is not None:
            enough = answered >= traffic.rate_per_s * (1.0 - 1e-9)
            answered = np.where(enough, traffic.rate_per_s, 0.0)
        used = np.maximum(x * sizes[0] + y * sizes[1], 1.0)
        value = answered if problem.machines_count else answered / used
        return Matched(in_flight, tpot_s, x, y, answered, value)

    def shared(self, prompts: Array, answers: Array) -> Array:
        """A bound of the value: devices shared by both kinds of replicas in proportion, none of them idle."""
        able = (prompts > 0.0) & (answers > 0.0)
        left, right = self.sizes
        each = left / np.where(able, prompts, 1.0) + right / np.where(able, answers, 1.0)
        devices = self.problem.cluster.devices if self.problem.machines_count else 1
        return np.where(able, devices / each, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Matched:
    """Pairs at a load of their decode replicas: sequences, time between tokens, numbers of replicas, requests per second, value.

    The value is what the ranking maximises: requests per second, or those per device; 0 where a pair carries none.
    """

    in_flight: Array
    tpot_s: Array
    prefills: Array
    decodes: Array
    answered: Array
    value: Array

    def update(self, index: Index, other: Matched) -> None:
        """Puts better ones in the place of what was the best of some pairs; a pair may come several times."""
        order = np.argsort(other.value, kind="stable")  # the best of a pair is written last
        order = order[other.value[order] > self.value[index[order]] * _MORE]
        for field in fields(self):
            getattr(self, field.name)[index[order]] = getattr(other, field.name)[order]


def best_loads(pairs: Pairs) -> tuple[Matched, NDArray[np.bool_]]:
    """Every pair at its best load, and which pairs a bound excludes: others of the same sizes answer as much.

    The highest load of the decode replicas is the best where nothing couples the pools; where something does, see above.
    """
    d, every, traffic = pairs.d, np.arange(len(pairs.i)), pairs.problem.traffic
    if (traffic.e2e_s is None and traffic.concurrency is None) or not len(every):
        return pairs.at(d.in_flight[pairs.j], d.tpot_s[pairs.j]), np.zeros(len(every), dtype=bool)
    search = _Search.of(pairs)
    search.grid()
    while len(search.open.pair):
        search.halve()
    return search.best, (search.best.value <= 0.0) & (search.bar[search.shape] > 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class _Brackets:
    """Loads of pairs between two that are priced; time between tokens and requests of a prefill replica at the lower."""

    pair: Index
    low: Array
    high: Array
    tpot_s: Array
    prompts: Array

    def take(self, index: Index | NDArray[np.bool_]) -> _Brackets:
        return _Brackets(*(getattr(self, f.name)[index] for f in fields(self)))


@dataclass(slots=True)
class _Search:
    """What is known: the best load of every pair, the best value of every two sizes, and brackets that may hold a better one."""

    pairs: Pairs
    best: Matched
    shape: Index
    bar: Array
    open: _Brackets

    @classmethod
    def of(cls, pairs: Pairs) -> _Search:
        sizes = pairs.sizes[0] * (pairs.problem.cluster.devices + 1.0) + pairs.sizes[1]
        shapes, shape = np.unique(sizes, return_inverse=True)
        best = Matched(*(np.zeros(len(pairs.i)) for _ in fields(Matched)))
        nothing = np.zeros(0)
        none = _Brackets(np.zeros(0, dtype=np.intp), nothing, nothing, nothing, nothing)
        return cls(pairs, best, shape, np.zeros(len(shapes)), none)

    def grid(self) -> None:
        """Tries the loads that every decode row is priced at, most promising ones first, and brackets the others."""
        d, pairs, j = self.pairs.d, self.pairs, self.pairs.j
        within = d.loads <= d.in_flight
        loads = np.where(within, d.loads, d.in_flight)[:, j]
        tpot_s = np.where(within, d.steps_s, d.tpot_s)[:, j]
        points = len(loads)
        index = np.tile(np.arange(len(j)), points)
        many = pairs.take(index)
        prompts = prompt_rate(pairs.problem, pairs.p, many.i, many.first_s, tpot_s.reshape(-1))
        bound = many.shared(prompts, many.answers(loads.reshape(-1), tpot_s.reshape(-1)))
        first = np.argmax(bound.reshape(loads.shape), axis=0) * len(j) + np.arange(len(j))
        flat = _Brackets(index, loads.reshape(-1), loads.reshape(-1), tpot_s.reshape(-1), prompts)
        self.try_(flat, bound, first)
        self.try_(flat, bound, np.arange(len(index)))
        rest = np.arange((points - 1) * len(j))
        self.open = replace(flat.take(rest), high=loads[1:].reshape(-1))
        self.narrow()

    def try_(self, at: _Brackets, bound: Array, index: Index) -> None:
        """Matches replicas at the lower ends of some brackets, as far as a bound of their values leaves a chance."""
        index = index[bound[index] > self.bar[self.shape[at.pair[index]]] * _MORE]
        at, pairs = at.take(index), self.pairs.take(at.pair[index])
        answers = pairs.answers(at.low, at.tpot_s)
        found = pairs.matched(at.low, at.tpot_s, at.prompts, answers, seated=True)
        self.best.update(at.pair, found)
        np.maximum.at(self.bar, self.shape[at.pair], found.value)

    def narrow(self) -> None:
        """Drops brackets that hold no load, or none that could be better than what is known for the same sizes."""
        self.open = self.open.take(self.open.high - self.open.low > 1.0)
        for whole in (False, True):  # whole replicas bound by more, and take longer
            at = self.open
            pairs = self.pairs.take(at.pair)
            answers = pairs.answers(at.high - 1.0, at.tpot_s)
            bound = (
                pairs.matched(at.low, at.tpot_s, at.prompts, answers, seated=False).value
                if whole
                else pairs.shared(at.prompts, answers)
            )
            self.open = at.take(bound > self.bar[self.shape[at.pair]] * _MORE)

    def halve(self) -> None:
        """Tries the middle of every bracket, and leaves both halves."""
        at, d = self.open, self.pairs.d
        middle = np.floor((at.low + at.high) / 2.0)
        pairs = self.pairs.take(at.pair)
        points, where = np.unique(np.stack([pairs.j.astype(float), middle]), axis=1, return_inverse=True)
        tpot_s = d.step_s(points[0].astype(np.intp), points[1])[where.reshape(-1)]
        prompts = prompt_rate(pairs.problem, pairs.p, pairs.i, pairs.first_s, tpot_s)
        upper = _Brackets(at.pair, middle, at.high, tpot_s, prompts)
        self.try_(upper, pairs.shared(prompts, pairs.answers(middle, tpot_s)), np.arange(len(middle)))
        halves = (replace(at, high=middle), upper)
        self.open = _Brackets(
            *(np.concatenate([getattr(half, f.name) for half in halves]) for f in fields(_Brackets))
        )
        self.narrow()
