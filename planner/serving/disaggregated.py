"""Prompts and generation in pools of their own, and how many replicas of each carry most together.

A prefill replica is a queue that serves prompts one batch after the other (M/D/1; with stages, a tandem of which the slowest
sets the pace); a decode replica holds as many sequences as its caches and the limit between tokens allow. Keys and values travel
from one to the other, layer by layer while the prompt still runs. For every pair of kinds of replicas the best numbers on the
given devices follow exactly: one pool's rate grows with its replicas, the other's falls with what is left.

Sources: Zhong et al. 2024 (DistServe, OSDI), section 3 (prefill as M/D/1); Patel et al. 2024 (Splitwise, ISCA), section 4.2
(transfer per layer).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.costs.serving import kv_transfer_s, queue_load
from planner.engine import Pricer
from planner.iteration import Iterations
from planner.ledger import Array
from planner.serving.candidates import Account, Candidates, candidates, iterations_of
from planner.serving.capacity import capacity
from planner.serving.front import Curve
from planner.serving.numbers import numbers_of, seated_numbers
from planner.serving.percentiles import Latencies
from planner.serving.space import ServeSpace, links_of, mesh_of, size_of
from planner.specs.serve_problem import ServeProblem

__all__ = [
    "Decode",
    "Prefill",
    "Split",
    "decode_kinds",
    "note_missed",
    "prefill_kinds",
    "search_disaggregated",
]

_MOST_LOAD = 0.95  # of a prefill replica where no limit keeps it lower: beyond it the queue has no steady state to speak of
_SHARES = (0.0, 0.3, 0.5, 0.65, 0.8, 0.9, 1.0)
"""Loads that the front is drawn from: powers of the sequences that a replica holds."""


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """Prefill replicas, one per row: time of a batch, pace, prompts per batch, and bytes of one prompt per device."""

    kind: Candidates
    batch_s: Array
    pace_s: Array
    prompts: Array
    bytes_: Array


@dataclass(frozen=True, slots=True, eq=False)
class Decode:
    """Decode replicas at their largest load; times between tokens at some loads (loads, rows) up to what they hold."""

    kind: Candidates
    in_flight: Array
    tpot_s: Array
    rate: Array
    binding: NDArray[np.str_]
    loads: Array
    steps_s: Array

    def memory(self, j: int, share: float = 1.0) -> dict[str, float]:
        """Bytes of a row's fullest device, its caches filled to a share of what the limits allow."""
        held = self.kind.capacity
        filled = min(1.0, share * float(self.in_flight[j]) / max(float(self.kind.most[j]), 1.0))
        parts = {
            "weights": float(held.weights_bytes[j]),
            "kv_cache": float(held.cache_bytes[j]) * filled,
            "activations": float(held.activation_bytes[j]),
            "reserved": held.reserved_bytes,
        }
        return {"peak": sum(parts.values()), **parts}


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A pair of pools at the load that it carries.

    Attributes:
        recipes, rows, chunk: what each pool runs, prefill first; the budget of prefill iterations.
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
        return int(sum(n * size_of(row) for n, row in zip(self.replicas, self.rows, strict=True)))

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


def search_disaggregated(problem: ServeProblem, pricer: Pricer, account: Account) -> list[Split]:
    """The best numbers of replicas for every pair of replica sizes."""
    if problem.traffic.osl < 2 or problem.cluster.devices < 2:
        return []
    scratch = Account()  # kinds of replicas; what counts as a candidate is a pair
    left, right = ServeSpace(problem, "prefill"), ServeSpace(problem, "decode")
    prefills, decodes = (
        prefill_kinds(problem, left, pricer, scratch),
        decode_kinds(problem, right, pricer, scratch),
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


def prefill_kinds(
    problem: ServeProblem, space: ServeSpace, pricer: Pricer, account: Account
) -> list[Prefill]:
    """Prefill replicas, one entry per recipe."""
    return [p for r in space.recipes() if (p := _prefill(problem, space, r, pricer, account)) is not None]


def decode_kinds(problem: ServeProblem, space: ServeSpace, pricer: Pricer, account: Account) -> list[Decode]:
    """Decode replicas, one entry per recipe."""
    return [d for r in space.recipes() if (d := _decode(problem, space, r, pricer, account)) is not None]


def _prefill(
    problem: ServeProblem, space: ServeSpace, recipe: Mapping[str, str], pricer: Pricer, account: Account
) -> Prefill | None:
    kind = candidates(problem, space, recipe, pricer, account, traffic_osl=1.0)
    if kind is None:
        return None
    traffic, mesh = problem.traffic, mesh_of(kind.rows)
    iterations = iterations_of(problem, recipe, mesh, pricer)
    prompts = np.maximum(np.floor(kind.chunks / traffic.computed_isl), 1.0) * mesh.dp
    zero = np.zeros_like(prompts)
    # Short prompts share an iteration, long ones are cut into several.
    tokens = prompts * traffic.computed_isl
    each = np.minimum(tokens, kind.chunks * mesh.dp)
    batch_s = tokens / each * iterations(zero, zero, each, np.full_like(zero, traffic.prompt_context))
    footprint = iterations.footprint()
    return Prefill(kind, batch_s, batch_s / mesh.pp / prompts, prompts, footprint.cache_bytes(traffic.isl))


def _decode(
    problem: ServeProblem, space: ServeSpace, recipe: Mapping[str, str], pricer: Pricer, account: Account
) -> Decode | None:
    """Rows without a choice of budget, each at the most sequences that keep the limit between tokens."""
    kind = candidates(problem, space, recipe, pricer, account)
    if kind is None:
        return None
    once = kind.chunks == kind.chunks.min()
    traffic, mesh = problem.traffic, mesh_of(kind.rows[once])
    iterations = iterations_of(problem, recipe, mesh, pricer)
    held = capacity(iterations, traffic.isl, traffic.osl, 1024.0, space.fixed.get("max_sequences"))
    kind = Candidates(recipe, kind.rows[once], kind.chunks[once], held, held.sequences)
    context = traffic.isl + traffic.osl * (1.0 + traffic.length_scv) / 2.0

    def step_s(n: Array, many: Iterations = iterations) -> Array:
        each = np.maximum(n, 1.0) / many.ctx.mesh.pp
        zero = np.zeros_like(each)
        return many(each, each * context, zero, zero) / many.accepted

    loads = np.floor(np.stack([held.sequences**share for share in _SHARES]))
    rows = np.tile(kind.rows, (len(loads), 1))
    steps = step_s(loads.reshape(-1), iterations_of(problem, recipe, mesh_of(rows), pricer)).reshape(
        loads.shape
    )
    kept = steps <= (np.inf if traffic.tpot_s is None else traffic.tpot_s)
    binding = np.where(kept[-1], "memory", "tpot")
    count = np.sum(np.logical_and.accumulate(kept, axis=0), axis=0)
    low = np.where(count > 0, np.take_along_axis(loads, np.maximum(count - 1, 0)[None], axis=0)[0], 0.0)
    high = np.where(
        count > 0, np.take_along_axis(loads, np.minimum(count, len(loads) - 1)[None], axis=0)[0], 0.0
    )
    while np.any(high - low > 1.0):
        middle = np.floor((low + high) / 2.0)
        within = step_s(middle) <= (traffic.tpot_s or np.inf)
        moving = high - low > 1.0
        low, high = np.where(moving & within, middle, low), np.where(moving & ~within, middle, high)
    tpot_s = step_s(low)
    rate = np.where(low > 0.0, low / ((traffic.osl - 1.0) * tpot_s), 0.0)
    return Decode(kind, low, tpot_s, rate, binding, loads, steps)


def _pairs(
    problem: ServeProblem,
    p: Prefill,
    d: Decode,
    asked: tuple[int | None, int | None],
    pricer: Pricer,
    account: Account,
) -> list[Split]:
    """Every pair of rows: their loads, their numbers of replicas, and the best of each shape."""
    traffic, devices = problem.traffic, problem.cluster.devices
    tier = problem.cluster.tiers[-1]
    senders, receivers = (links_of(k.kind.rows, k.kind.recipe) for k in (p, d))
    senders, receivers = senders[:, None], receivers[None, :]
    rate = tier.effective_bytes_per_s * np.minimum(senders, receivers)
    transfer = np.asarray(
        kv_transfer_s(p.bytes_[:, None] * senders, rate, p.batch_s[:, None], float(problem.model.n_layers))
    )
    assert pricer.stack.serving is not None
    admission = float(pricer.stack.serving.admission_s)
    room = np.inf if traffic.ttft_s is None else traffic.ttft_s - p.batch_s[:, None] - transfer - admission
    if traffic.e2e_s is not None:
        rest = (
            traffic.e2e_s
            - (traffic.osl - 1.0) * d.tpot_s[None, :]
            - p.batch_s[:, None]
            - transfer
            - admission
        )
        room = np.minimum(room, rest)
    quantile = None if traffic.percentile is None else traffic.percentile / 100.0
    load = np.asarray(queue_load(room, (p.pace_s * p.prompts)[:, None], quantile, _MOST_LOAD))
    prompt_rate = np.broadcast_to(load / p.pace_s[:, None], transfer.shape)
    decode_rate = np.broadcast_to(d.rate[None, :], transfer.shape)
    account.candidates += transfer.size
    late, slow = load <= 0.0, (decode_rate <= 0.0) & (load > 0.0)
    account.rejected["ttft limit"] += int(late.sum())
    account.rejected["tpot limit"] += int(slow.sum())
    first_s = float((p.batch_s[:, None] + transfer + admission).min())
    note_missed(problem, account, first_s, float(d.steps_s[0].min()))
    able = ~late & ~slow
    for reason, ok in _pair_rules(problem, p, d):
        account.rejected[reason] += int((able & ~ok).sum())
        able &= ok
    sizes = (
        np.broadcast_to(p.kind.size[:, None], able.shape),
        np.broadcast_to(d.kind.size[None, :], able.shape),
    )
    able_room = able & (sizes[0] + sizes[1] <= devices)
    account.rejected["more devices than there are"] += int((able & ~able_room).sum())
    wanted = traffic.rate_per_s
    if not able_room.any():
        return []
    if traffic.concurrency is None and wanted is None:
        account.curves.append(_curve(problem, p, d, np.where(able_room | slow, prompt_rate, 0.0)))
    i, j = np.nonzero(able_room)
    x, y = numbers_of(problem, prompt_rate[i, j], decode_rate[i, j], sizes[0][i, j], sizes[1][i, j])
    x, y = (v if n is None else np.full_like(v, float(n)) for v, n in zip((x, y), asked, strict=True))
    x, y = seated_numbers(
        problem, x, y, (p.kind.size[i], d.kind.size[j]), (prompt_rate[i, j], decode_rate[i, j])
    )
    answered = np.minimum(x * prompt_rate[i, j], y * decode_rate[i, j])
    if traffic.concurrency is not None:
        # So many requests in flight, most of them in decode replicas.
        cycle = p.batch_s[i] + transfer[i, j] + (traffic.osl - 1.0) * d.tpot_s[j]
        answered = np.minimum(answered, traffic.concurrency / cycle)
    if wanted is not None:
        enough = (x > 0.0) & (answered >= wanted * (1.0 - 1e-9))
        if not enough.any():
            size = p.kind.size[i] + d.kind.size[j] * prompt_rate[i, j] / decode_rate[i, j]
            most = float(np.max(prompt_rate[i, j] / size)) * devices
            account.miss("rate", max(wanted / most, 1.0), "prompts and generation apart")
        account.rejected["rate"] += int((~enough).sum())
        i, j, x, y, answered = (v[enough] for v in (i, j, x, y, answered))
        answered = np.full_like(answered, wanted)
    account.scored += len(i)
    used = x * p.kind.size[i] + y * d.kind.size[j]
    value = answered if problem.machines_count else answered / used
    # The best pair of every two sizes of replicas.
    order = np.argsort(-value, kind="stable")
    shape = p.kind.size[i[order]] * (devices + 1.0) + d.kind.size[j[order]]
    best = order[np.sort(np.unique(shape, return_index=True)[1])]
    return [
        _split(
            problem,
            p,
            d,
            int(i[k]),
            int(j[k]),
            (int(x[k]), int(y[k])),
            float(answered[k]),
            float(transfer[i[k], j[k]]),
            admission,
        )
        for k in best
    ]


def _pair_rules(problem: ServeProblem, p: Prefill, d: Decode) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """What the engine says of every prefill row (down) beside every decode row (across)."""
    if problem.launcher is None:
        return
    shape = len(p.kind.rows), len(d.kind.rows)
    for rule in problem.launcher.pairs(mesh_of(p.kind.rows[:, None, :]), mesh_of(d.kind.rows[None, :, :])):
        yield f"{problem.launcher.name}: {rule.reason}", np.broadcast_to(rule.ok, shape)


def note_missed(problem: ServeProblem, account: Account, first_s: float, between_s: float) -> None:
    """Remembers by how much the lightest loads, with these times to the first token and between tokens, miss the limits."""
    traffic = problem.traffic
    for name, limit, found in (
        ("ttft", traffic.ttft_s, first_s),
        ("tpot", traffic.tpot_s, between_s),
        ("e2e", traffic.e2e_s, first_s + (traffic.osl - 1.0) * between_s),
    ):
        if limit is not None and found > limit:
            account.miss(name, found / limit, "prompts and generation apart")


def _curve(problem: ServeProblem, p: Prefill, d: Decode, prompt_rate: Array) -> Curve:
    """Decode replicas at some loads, each beside the prefill replicas that run most prompts per device."""
    traffic, devices = problem.traffic, problem.cluster.devices
    best = int(np.argmax(prompt_rate.max(axis=1) / p.kind.size))
    rate = np.tile(prompt_rate[best], len(d.loads))
    answers = (d.loads / ((traffic.osl - 1.0) * d.steps_s)).reshape(-1)
    left, right = np.full_like(rate, p.kind.size[best]), np.tile(d.kind.size, len(d.loads))
    room = (rate > 0.0) & (left + right <= devices)
    x, y = numbers_of(problem, np.where(room, rate, 1.0), answers, left, np.where(room, right, 1.0))
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


def _split(
    problem: ServeProblem, p: Prefill, d: Decode, i: int, j: int, replicas: tuple[int, int], answered: float,
    transfer_s: float, admission_s: float,
) -> Split:  # fmt: skip
    """One pair at its load; sequences per decode replica follow from Little's law at the time that they take."""
    traffic = problem.traffic
    load = min(answered / replicas[0] * float(p.pace_s[i]), _MOST_LOAD)
    service_s = float(p.pace_s[i] * p.prompts[i])
    share = answered / replicas[1] / float(d.rate[j])
    in_flight = max(1, round(float(d.in_flight[j]) * share))
    slower = replicas[1] * float(d.rate[j]) <= replicas[0] * load / float(p.pace_s[i]) * (1.0 + 1e-9)
    return Split(
        (p.kind.recipe, d.kind.recipe), (p.kind.rows[i], d.kind.rows[j]), float(p.kind.chunks[i]), replicas, answered, load,
        load * service_s / (2.0 * (1.0 - load)), float(p.batch_s[i]), transfer_s, admission_s, float(d.tpot_s[j]), in_flight,
        float(d.kind.most[j]), d.memory(j, share),
        "rate" if traffic.rate_per_s is not None else str(d.binding[j]) if slower else "ttft",
    )  # fmt: skip
