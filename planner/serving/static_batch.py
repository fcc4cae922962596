"""Static batches: what waits is taken as one batch, which runs until its longest answer has ended; then the next.

A replica runs a batch's prompts in one pass, pads its answers to the longest, and hands all of them over together. Requests that
come meanwhile wait for the end: of arrivals of their own a batch takes as many as came during the one before, whose time is a
setup and a part per request, so that the mean response is Inoue's; the wait lies anywhere within a batch. Clients that replace
every answer make one batch of all. It is the baseline of iteration-level batching, and what offline engines do.

Sources: Y. Inoue 2021 (Performance Evaluation 147, arXiv:1912.06322), Theorem 2; Yu et al. 2022 (Orca, OSDI), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.costs.queueing import batch_response_s
from planner.engine.pricer import Pricer
from planner.ledger import Array
from planner.load.length_law import LengthLaw
from planner.serving.aggregated import QUANTILES, Steady
from planner.serving.candidates import Account, Candidates, candidates, iterations_of
from planner.serving.capacity import capacity
from planner.serving.iteration import Iterations
from planner.serving.percentiles import Latencies
from planner.serving.search import Found
from planner.serving.slots import MOST_LOAD
from planner.serving.space import ServeSpace, mesh_of
from planner.specs.serve_problem import ServeProblem
from planner.specs.traffic import Traffic

__all__ = ["Batches", "longest_answer", "search_static"]


def longest_answer(traffic: Traffic, batch: Array) -> tuple[Array, Array]:
    """Tokens of the longest of so many answers: mean and squared coefficient of variation.

    >>> mean, variation = longest_answer(Traffic(1, 100, length_scv=1.0), np.array([32.0]))
    >>> round(float(mean[0]) / 100, 2), round(float(variation[0]), 2)  # H_32 = 4.06, and (sum of 1/k²)/H_32²
    (4.06, 0.1)
    """
    if traffic.length_scv == 0.0:
        return np.full_like(batch, float(traffic.osl)), np.zeros_like(batch)
    law = LengthLaw.of(float(traffic.osl), traffic.length_scv)
    beyond = 1.0 - law.below ** np.maximum(batch, 1.0)[:, None]
    before = np.concatenate([np.ones((len(batch), 1)), beyond[:, :-1]], axis=1)
    widths = 0.5 * (before + beyond) * np.diff(law.points, prepend=0.0)
    mean = np.sum(widths, axis=1)
    square = np.sum(2.0 * law.points * widths, axis=1)
    return mean, np.maximum(square / mean**2 - 1.0, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """Batches of so many requests on every row: their prompts' pass, all of their time, and what a request waits before, mean."""

    size: Array
    prompts_s: Array
    batch_s: Array
    wait_s: Array
    traffic: Traffic
    admission_s: float

    @classmethod
    def of(cls, iterations: Iterations, traffic: Traffic, size: Array, clients: Array | None) -> Batches:
        """The batches of rows; ``clients`` of a replica, where they replace every answer at once."""
        prompts_s, batch_s, variation = _times(iterations, traffic, size)
        if clients is not None:
            wait_s = np.maximum(clients / size - 1.0, 0.0) * batch_s
        else:
            _, half_s, _ = _times(iterations, traffic, size / 2.0)
            each_s = np.maximum(batch_s - half_s, 0.0) / (size / 2.0)
            setup_s = np.maximum(batch_s - each_s * size, 1e-9)
            wait_s = np.maximum(batch_response_s(size / batch_s, each_s, setup_s) - batch_s, 0.0)
            wait_s = wait_s * (1.0 + variation)  # who comes meets a long batch rather than a short one
        admission_s = float(iterations.software.admitted_s(traffic.isl))
        return cls(size, prompts_s, batch_s, np.asarray(wait_s), traffic, admission_s)

    @property
    def tpot_s(self) -> Array:
        """Time per further token of an answer that is handed over with its batch."""
        return np.asarray((self.batch_s - self.prompts_s) / max(self.traffic.osl - 1.0, 1.0))

    def ttft_s(self, quantile: float | None) -> Array:
        """Mean (None) or quantile of the time to the first token: a wait is the rest of a batch, for as many as meet one."""
        wait_s = self.wait_s
        if quantile is not None:
            busy = np.clip(2.0 * self.wait_s / self.batch_s, 1e-9, 1.0)
            longest_s = np.maximum(self.batch_s, 2.0 * self.wait_s)
            wait_s = longest_s * np.maximum(1.0 - (1.0 - quantile) / busy, 0.0)
        return np.asarray(wait_s + self.prompts_s + self.admission_s)

    def kept(self) -> tuple[NDArray[np.bool_], NDArray[np.str_], Array]:
        """Rows that keep every limit; the limit that is missed by most, and found over allowed of it."""
        traffic = self.traffic
        ttft_s = self.ttft_s(None if traffic.percentile is None else traffic.percentile / 100.0)
        answer_s = ttft_s + (traffic.osl - 1.0) * self.tpot_s
        found = ((ttft_s, traffic.ttft_s), (self.tpot_s, traffic.tpot_s), (answer_s, traffic.e2e_s))
        ratios = np.stack([np.zeros_like(ttft_s) if most is None else s / most for s, most in found])
        return (
            ratios.max(axis=0) <= 1.0,
            np.array(["ttft", "tpot", "e2e"])[ratios.argmax(axis=0)],
            ratios.max(axis=0),
        )

    def found(
        self, c: Candidates, row: int, replicas: int, rate_per_s: float, most: float, binding: str
    ) -> Found:
        """One row at its load."""
        zero = np.zeros(1)
        own = [
            x[[row]]
            for x in (self.size, self.tpot_s, self.prompts_s, self.ttft_s(None), self.wait_s, self.batch_s)
        ]
        size, tpot_s, prompts_s, ttft_s, wait_s, batch_s = own
        state = Steady(
            np.array([rate_per_s]),
            size,
            tpot_s,
            zero,
            prompts_s,
            ttft_s,
            wait_s,
            prompts_s / batch_s,
            prompts_s,
            tpot_s,
        )
        asked = {} if self.traffic.percentile is None else {"at": self.traffic.percentile / 100.0}
        ttft = {name: float(self.ttft_s(q)[row]) for name, q in ({"mean": None} | QUANTILES | asked).items()}
        held = c.capacity.take(np.array([row]))
        cache = float(held.request_bytes[0] * size[0] / max(float(c.rows[row][2]), 1.0))
        parts = {
            "weights": float(held.weights_bytes[0]), "kv_cache": cache, "activations": float(held.activation_bytes[0]),
            "reserved": held.reserved_bytes,
        }  # fmt: skip
        return Found(
            c.recipe, c.rows[row], float(c.chunks[row]), replicas, int(size[0]), most, state,
            {"peak": sum(parts.values()), **parts}, binding, rate_per_s * replicas * self.traffic.osl, rate_per_s,
            Latencies(ttft, dict.fromkeys(ttft, float(tpot_s[0]))),
        )  # fmt: skip


def search_static(problem: ServeProblem, space: ServeSpace, pricer: Pricer, account: Account) -> list[Found]:
    """Every mesh at the largest batch that keeps the limits."""
    found: list[Found] = []
    for recipe in space.recipes():
        c = candidates(problem, space, recipe, pricer, account)
        if c is not None:
            found += _of_recipe(problem, space, c, pricer, account)
    return found


def _of_recipe(
    problem: ServeProblem, space: ServeSpace, c: Candidates, pricer: Pricer, account: Account
) -> list[Found]:
    traffic = problem.traffic
    once = (c.chunks == c.chunks.min()) & (c.rows[:, 1] == 1.0)
    account.excluded["a batch runs its prompts in one pass, in one stage"] += int((~once).sum())
    c = c.take(np.flatnonzero(once))
    if not len(c.chunks):
        return []
    iterations = iterations_of(problem, c.recipe, mesh_of(c.rows), pricer)
    c = _sized(iterations, traffic, c, space.fixed.get("max_sequences"))
    room = np.floor(problem.cluster.devices / c.size)
    room = np.minimum(room, float(space.fixed.get("replicas", np.inf)))
    clients = None if traffic.concurrency is None else np.ceil(traffic.concurrency / room)
    top = c.most if clients is None else np.minimum(c.most, clients)

    def at(size: Array) -> Batches:
        return Batches.of(iterations, traffic, size, clients)

    lightest, worst, ratio = at(top if clients is not None else np.ones_like(top)).kept()
    for k in np.flatnonzero(~lightest):
        account.rejected[f"{worst[k]} limit"] += 1
        account.miss(str(worst[k]), float(ratio[k]), "static batches")
    # Beyond part of what full batches answer, more come during a batch than the next one holds.
    full = np.inf if clients is not None else MOST_LOAD * top / at(top).batch_s
    most = top if clients is not None else _largest(lambda n: _carried(at(n), full), top)
    rate = most / at(most).batch_s
    replicas, size = room, most
    if traffic.rate_per_s is not None:
        replicas = np.ceil(traffic.rate_per_s / rate - 1e-9)
        each = traffic.rate_per_s / replicas
        size = _largest(lambda n: n / at(n).batch_s < each, most) + (most > 1.0)
        size, rate = np.minimum(size, most), each
    batches, (_, limit, next_ratio) = at(size), at(np.minimum(size + 1.0, top)).kept()
    binding = np.where(next_ratio > 1.0, limit, "memory")
    usable = lightest & (replicas >= 1.0) & (replicas <= room)
    for k in np.flatnonzero(lightest & ~usable):
        account.rejected["rate"] += 1
        account.miss("rate", float(replicas[k] / max(room[k], 1.0)), "static batches")
    account.scored += int(usable.sum())
    return [
        batches.found(
            c, int(k), int(replicas[k]), float(rate[k]), float(c.most[k]),
            "rate" if traffic.rate_per_s is not None else "concurrency" if clients is not None else str(binding[k]),
        )
        for k in np.flatnonzero(usable)
    ]  # fmt: skip


def _carried(batches: Batches, most_per_s: Array | float) -> NDArray[np.bool_]:
    return np.asarray(batches.kept()[0] & (batches.size / batches.batch_s <= most_per_s))


def _times(iterations: Iterations, traffic: Traffic, size: Array) -> tuple[Array, Array, Array]:
    """Seconds of a batch's prompts, and of all of it with their squared coefficient of variation."""
    zero, prompt = np.zeros_like(size), traffic.computed_isl
    prompts_s = iterations(zero, zero, size * prompt, np.full_like(size, traffic.prompt_context))
    longest, variation = longest_answer(traffic, size)
    step_s = iterations(size, size * (traffic.isl + longest / 2.0), zero, zero)
    answers_s = (longest - 1.0) / iterations.accepted * step_s
    batch_s = prompts_s + answers_s
    return prompts_s, np.asarray(batch_s), np.asarray(variation * (answers_s / batch_s) ** 2)


def _sized(iterations: Iterations, traffic: Traffic, c: Candidates, cap: float | None) -> Candidates:
    """Rows with the largest batches whose prompts' activations and whole answers find room together."""
    ranks = iterations.ctx.mesh.dp

    def held(size: Array) -> Candidates:
        tokens = np.maximum(size * traffic.computed_isl / ranks, c.chunks)
        room = capacity(iterations, traffic.isl, float(np.max(longest_answer(traffic, size)[0])), tokens, cap)
        return Candidates(c.recipe, c.rows, tokens, room, room.sequences)

    most = _largest(lambda size: held(size).most >= size, np.maximum(c.most, 1.0))
    found = held(most)
    return Candidates(c.recipe, c.rows, found.chunks, found.capacity, most)


def _largest(holds: Callable[[Array], NDArray[np.bool_]], top: Array) -> Array:
    """The largest whole number up to ``top`` at which something holds that holds below it as well; at least 1."""
    low, high = np.ones_like(top), np.floor(top) + 1.0
    while np.any(high - low > 1.0):
        middle = np.floor((low + high) / 2.0)
        moving, held = high - low > 1.0, holds(middle)
        low, high = np.where(moving & held, middle, low), np.where(moving & ~held, middle, high)
    return low
