"""Generation with attention and experts on devices of their own, between which micro-batches go back and forth.

A replica is some attention ranks, each with the caches of its own sequences, and expert devices, each with whole experts. Its
sequences are ``m`` micro-batches: while one is with the experts, attention runs another, and a third is on its way. With the
times of a layer's attention ``A`` and experts ``E`` for a micro-batch and ``C`` of its tokens' way, a layer takes a micro-batch
``A + E + 2C``, and the slower side, ``F = max(A, E)``, is never idle if ``m·F`` is as much. Prompts run in a pool of their own.

Both sides are priced as parts of the ledger of any other iteration. Tokens travel over the outermost links.

Source: Zhu et al. 2025 (MegaScale-Infer, SIGCOMM, arXiv:2504.02263), section 4, equations 1 to 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from planner.costs.serving import ping_pong_s
from planner.engine.pricer import Pricer
from planner.errors import Problem, SpecError
from planner.ledger import Array, Item, Ledger
from planner.load.iteration_time import Price
from planner.serving.candidates import Account, Candidates, iterations_of
from planner.serving.capacity import capacity
from planner.serving.composition import Composition
from planner.serving.disaggregated import Split, search_disaggregated
from planner.serving.iteration import Iterations
from planner.serving.plan import PARTS, Pool
from planner.serving.pools import Decode, Index, at_most
from planner.serving.space import ServeSpace, mesh_of
from planner.specs.serve_problem import ServeProblem
from planner.technique import ServingContext
from planner.units import counted

__all__ = [
    "BATCHES",
    "Turns",
    "given_row",
    "ping_pong_kinds",
    "ping_pong_pools",
    "search_ping_pong",
    "sides_of",
    "turn_price",
    "turns_of",
]

BATCHES = (2, 3, 4)
"""Micro-batches of a replica: more make experts' products too small (section 4.2, ``N_m``)."""
_DEGREES = ("tp", "dp", "ep")  # of attention ranks, how many of them, and expert devices
_BYTES = 2.0  # of an activation that travels
_TRAVELS = ("moe.dispatch", "moe.combine")
_ATTENDS = ("moe.permute", "moe.unpermute", "moe.router")


def search_ping_pong(
    problem: ServeProblem, pricer: Pricer, account: Account, given: tuple[Pool, ...] = ()
) -> list[Split]:
    """The best pairs of a pool for prompts and of such replicas, or of the replicas that are ``given``.

    Raises:
        SpecError: the model has no experts.
    """
    if not any(block.moe for block in problem.model.blocks.values()):
        raise SpecError(
            Problem("--mode ping_pong", f"no experts in {problem.model.name}", "a model with experts")
        )
    generating = partial(ping_pong_kinds, given=given) if given else ping_pong_kinds
    return search_disaggregated(problem, pricer, account, generating)


def ping_pong_pools(f: Split, knobs: Mapping[str, Any]) -> tuple[Pool, Pool]:
    """The two kinds of devices of a plan's replicas; experts are whole, one rank of ``dp`` per device."""
    tp, dp, ep = (int(f.rows[1][index]) for index in (0, 2, 3))
    attention = {"tp": tp, "pp": 1, "dp": dp, "ep": 1, "etp": 1}
    experts = {"tp": 1, "pp": 1, "dp": ep, "ep": ep, "etp": 1}
    return (
        Pool("attention", f.replicas[1], attention, knobs, f.in_flight),
        Pool("experts", f.replicas[1], experts, knobs, f.in_flight),
    )


def ping_pong_kinds(
    problem: ServeProblem, space: ServeSpace, pricer: Pricer, account: Account, given: tuple[Pool, ...] = ()
) -> list[Decode]:
    """Replicas for every recipe and number of micro-batches, or for those of ``given`` pools alone."""
    found = []
    if given:
        rows, batches_told = given_row(given)
        turns: tuple[int, ...] = (batches_told,)
    else:
        rows, turns = np.array(list(_rows(problem, space)), dtype=np.float64), BATCHES
        if not len(rows):
            degrees = ", ".join(f"{n}={space.fixed[n]}" for n in _DEGREES if n in space.fixed) or "both sides"
            none = f"no attention ranks and expert devices on {counted(problem.cluster.devices, 'device')} have {degrees}"
            raise SpecError(Problem("--mode ping_pong", none, "other degrees, or more devices"))
    for recipe in space.recipes():
        if recipe["micro_batches"] != "1" or recipe["experts"] != "exchanged" or "draft_tokens" in recipe:
            continue
        for batches in turns:
            kind = _candidates(problem, {**recipe, "batches_in_turn": str(batches)}, rows, pricer, account)
            if kind is not None:
                found.append(_decode(problem, kind, batches, pricer))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Replicas(Candidates):
    """Rows whose experts lie beside the attention ranks."""

    @property
    def size(self) -> Array:
        """Devices of a replica."""
        return np.asarray(self.rows[:, 0] * self.rows[:, 2] + self.rows[:, 3])

    def take(self, index: Index) -> _Replicas:
        """Some rows."""
        return _Replicas(
            self.recipe, self.rows[index], self.chunks[index], self.capacity.take(index), self.most[index]
        )


def _candidates(
    problem: ServeProblem, recipe: Mapping[str, str], rows: Array, pricer: Pricer, account: Account
) -> _Replicas | None:
    attention, experts = sides_of(problem, recipe, rows, pricer)
    held = capacity(attention, problem.traffic.isl, problem.traffic.osl, 1024.0)
    room = capacity(experts, problem.traffic.isl, problem.traffic.osl, 1024.0).cache_bytes
    fits = (held.sequences >= float(recipe["batches_in_turn"]) * rows[:, 2]) & (room >= 0.0)
    account.candidates += len(rows)
    account.rejected["device memory"] += int((~fits).sum())
    chunks = np.ones(len(rows))
    return (
        _Replicas(recipe, rows, chunks, held, held.sequences).take(np.flatnonzero(fits))
        if fits.any()
        else None
    )


def _rows(problem: ServeProblem, space: ServeSpace) -> Iterator[tuple[int, ...]]:
    """Attention ranks of some devices each, and expert devices: ``tp pp dp ep etp cp``. Any number of ranks, for balance."""
    model, devices = problem.model, problem.cluster.devices
    heads = [b.attention.heads for b in model.blocks.values() if b.attention]
    experts = [b.moe.experts for b in model.blocks.values() if b.moe]
    powers = [2**i for i in range(devices.bit_length())]
    widest = problem.cluster.tiers[0].size
    ranks = sorted({n * power for n in (1, 3, 5, 7) for power in powers})
    wanted = ([space.fixed.get(name)] for name in _DEGREES)
    tps, dps, eps = (
        x if x != [None] else every for x, every in zip(wanted, (powers, ranks, powers), strict=True)
    )
    for tp, dp, ep in product(tps, dps, eps):
        whole = all(h % tp == 0 for h in heads) and all(e % ep == 0 for e in experts)
        if whole and tp <= widest and tp * dp + ep <= devices:
            yield tp, 1, dp, ep, 1, 1


def given_row(pools: Sequence[Pool]) -> tuple[Array, int]:
    """The row of a plan's replicas, and their micro-batches."""
    attention, experts = (next(pool for pool in pools if pool.role == role) for role in PARTS)
    row = (attention.mesh["tp"], 1, attention.mesh["dp"], experts.mesh["ep"], 1, 1)
    return np.array([row], dtype=np.float64), int(attention.knobs["batches_in_turn"])


def sides_of(
    problem: ServeProblem, recipe: Mapping[str, str], rows: Array, pricer: Pricer
) -> tuple[Iterations, Iterations]:
    """Iterations of the attention ranks alone, and of the expert devices alone."""
    parts = []
    for of_experts in (False, True):
        iterations = iterations_of(problem, recipe, mesh_of(rows), pricer)

        def keep(ledger: Ledger, _: ServingContext, wanted: bool = of_experts) -> Ledger:
            items = tuple(i for i in ledger.items if i.what not in _TRAVELS and _is_expert(i) == wanted)
            return replace(ledger, items=items)

        iterations.widen(keep)
        parts.append(iterations)
    return parts[0], parts[1]


def _is_expert(item: Item) -> bool:
    """Whether an item is the experts': their weights and products, and what lies between these."""
    return "expert" in item.tags or ("moe" in item.tags and item.what not in _ATTENDS)


def _decode(problem: ServeProblem, kind: Candidates, batches: int, pricer: Pricer) -> Decode:
    def paced(row: Index, n: Array) -> Array:
        return _iteration_s(problem, kind.recipe, kind.rows[row], n, batches, pricer)

    return at_most(problem.traffic, kind, lambda n: paced(np.arange(len(kind.rows)), n), paced)


@dataclass(frozen=True, slots=True, eq=False)
class Turns:
    """Micro-batches that generate a token for each of their sequences.

    Attributes:
        attention_s, experts_s, way_s: of one layer and micro-batch: either side, and one way between them.
        host_s: of all of them, once.
        layers, batches: with experts; micro-batches.
    """

    attention_s: Array
    experts_s: Array
    way_s: Array
    host_s: Array
    layers: float
    batches: float

    @property
    def seconds(self) -> Array:
        """Of all layers and micro-batches."""
        passed_s = ping_pong_s(self.attention_s, self.experts_s, self.way_s, self.layers, self.batches)
        return np.asarray(passed_s + self.host_s)


def turns_of(
    problem: ServeProblem,
    sides: tuple[Iterations, Iterations],
    n: Array,
    context_tokens: Array,
    batches: float,
) -> Turns:
    """Replicas of so many sequences, whose contexts have so many tokens together, in some micro-batches."""
    attention, _ = sides
    model, zero = problem.model, np.zeros_like(n)
    each = np.maximum(n, 1.0) / batches
    batch = Composition(each, context_tokens / batches, zero, zero)
    mixtures = [(model.blocks[name], count) for name, count in model.layers if model.blocks[name].moe]
    layers = float(sum(count for _, count in mixtures))
    sides_s = [(side.seconds(batch) - side.host_s(batch)) / layers for side in sides]
    top_k = max(float(block.moe.top_k) for block, _ in mixtures if block.moe)
    copies = each * top_k * model.hidden * _BYTES
    link, mesh = problem.cluster.tiers[-1], attention.ctx.mesh
    ranks = np.minimum(mesh.tp * mesh.dp, mesh.ep)  # the side with fewer devices is the slower
    way_s = link.latency_s + copies / ranks / link.effective_bytes_per_s
    whole = Composition(each * batches, context_tokens, zero, zero)
    return Turns(sides_s[0], sides_s[1], way_s, attention.host_s(whole), layers, batches)


def turn_price(problem: ServeProblem, sides: tuple[Iterations, Iterations], batches: float) -> Price:
    """Seconds in which the replicas of a row generate a token for each of their sequences, those that join among them."""

    def price(decodes: Array, context: Array, joined: Array, joined_context: Array) -> Array:
        n, tokens = np.broadcast_arrays(decodes + joined, context + joined_context)
        turns = turns_of(problem, sides, n.reshape(-1), tokens.reshape(-1), batches)
        return np.asarray(turns.seconds.reshape(n.shape))

    return price


def _iteration_s(
    problem: ServeProblem, recipe: Mapping[str, str], rows: Array, n: Array, batches: int, pricer: Pricer
) -> Array:
    """Seconds in which replicas of so many sequences generate a token for each."""
    traffic = problem.traffic
    context = np.maximum(n, 1.0) * (traffic.isl + traffic.osl * (1.0 + traffic.length_scv) / 2.0)
    return turns_of(problem, sides_of(problem, recipe, rows, pricer), n, context, float(batches)).seconds
