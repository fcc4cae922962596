"""Replicas that run prompts alone, and replicas that generate alone: what each takes, row by row.

Sources: Zhong et al. 2024 (DistServe, OSDI), section 3; Patel et al. 2024 (Splitwise, ISCA), section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.costs.serving import kv_transfer_s
from planner.engine.pricer import Pricer
from planner.ledger import Array
from planner.serving.candidates import Account, Candidates, candidates, iterations_of
from planner.serving.capacity import capacity
from planner.serving.iteration import Iterations
from planner.serving.space import ServeSpace, links_of, mesh_of
from planner.specs.serve_problem import ServeProblem
from planner.specs.traffic import Traffic

__all__ = ["Decode", "Prefill", "at_most", "decode_kinds", "prefill_kinds", "transfer_s"]

Index = NDArray[np.intp]

_SHARES = (0.0, 0.3, 0.5, 0.65, 0.8, 0.9, 1.0)
"""Loads that a row is priced at first: powers of the sequences that a replica holds."""


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
    """Decode replicas at their largest load; times between tokens at some loads (loads, rows) up to what they hold.

    ``step_s`` tells the time of some rows at loads of their own.
    """

    kind: Candidates
    in_flight: Array
    tpot_s: Array
    rate: Array
    binding: NDArray[np.str_]
    loads: Array
    steps_s: Array
    step_s: Callable[[Index, Array], Array]

    def memory(self, j: int, in_flight: float) -> dict[str, float]:
        """Bytes of a row's fullest device, its caches filled by so many sequences."""
        held = self.kind.capacity
        filled = min(1.0, in_flight / max(float(self.kind.most[j]), 1.0))
        parts = {
            "weights": float(held.weights_bytes[j]),
            "kv_cache": float(held.cache_bytes[j]) * filled,
            "activations": float(held.activation_bytes[j]),
            "reserved": held.reserved_bytes,
        }
        return {"peak": sum(parts.values()), **parts}


def prefill_kinds(
    problem: ServeProblem, space: ServeSpace, pricer: Pricer, account: Account
) -> list[Prefill]:
    """Prefill replicas, one entry per recipe."""
    return [p for r in space.recipes() if (p := _prefill(problem, space, r, pricer, account)) is not None]


def decode_kinds(problem: ServeProblem, space: ServeSpace, pricer: Pricer, account: Account) -> list[Decode]:
    """Decode replicas, one entry per recipe."""
    return [d for r in space.recipes() if (d := _decode(problem, space, r, pricer, account)) is not None]


def transfer_s(p: Prefill, d: Decode, bytes_per_s: float, layers: int) -> Array:
    """Seconds that a cache's way from every prefill row (down) to every decode row (across) adds to a prompt.

    Args:
        p, d: the rows.
        bytes_per_s: of a device's link.
        layers: of the model, whose caches go one by one (Splitwise, section 4.2).
    """
    senders, receivers = (links_of(k.kind.rows, k.kind.recipe) for k in (p, d))
    rate = bytes_per_s * np.minimum(senders[:, None], receivers[None, :])
    return np.asarray(kv_transfer_s((p.bytes_ * senders)[:, None], rate, p.batch_s[:, None], float(layers)))


def _prefill(
    problem: ServeProblem, space: ServeSpace, recipe: Mapping[str, str], pricer: Pricer, account: Account
) -> Prefill | None:
    kind = candidates(problem, space, recipe, pricer, account, traffic_osl=1.0)
    if kind is None:
        return None
    traffic = problem.traffic
    together = np.maximum(np.floor(kind.chunks / traffic.computed_isl), 1.0)
    if np.all(together > 1.0):  # at a light load prompts run alone, whatever the budget
        alone = np.flatnonzero(kind.chunks == kind.chunks.min())
        kind = kind.take(np.concatenate([np.arange(len(together)), alone]))
        together = np.concatenate([together, np.ones(len(alone))])
    mesh = mesh_of(kind.rows)
    iterations = iterations_of(problem, recipe, mesh, pricer)
    prompts = together * mesh.dp
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

    def paced(many: Iterations, n: Array) -> Array:
        each = np.maximum(n, 1.0) / many.ctx.mesh.pp
        zero = np.zeros_like(each)
        return many(each, each * context, zero, zero) / many.accepted

    def step_s(row: Index, n: Array) -> Array:
        return paced(iterations_of(problem, recipe, mesh_of(kind.rows[row]), pricer), n)

    return at_most(traffic, kind, lambda n: paced(iterations, n), step_s)


def at_most(
    traffic: Traffic,
    kind: Candidates,
    paced: Callable[[Array], Array],
    step_s: Callable[[Index, Array], Array],
) -> Decode:
    """Replicas at the most sequences that keep the limit between tokens.

    Args:
        traffic: lengths and limits.
        kind: the replicas; their ``most`` is what they hold.
        paced: seconds between tokens of every row by its sequences; ``step_s`` the same of some rows.
    """
    loads = np.floor(np.stack([kind.most**share for share in _SHARES]))
    steps = step_s(np.tile(np.arange(len(kind.rows)), len(loads)), loads.reshape(-1)).reshape(loads.shape)
    kept = steps <= (np.inf if traffic.tpot_s is None else traffic.tpot_s)
    binding = np.where(kept[-1], "memory", "tpot")
    count = np.sum(np.logical_and.accumulate(kept, axis=0), axis=0)
    low = np.where(count > 0, np.take_along_axis(loads, np.maximum(count - 1, 0)[None], axis=0)[0], 0.0)
    high = np.where(
        count > 0, np.take_along_axis(loads, np.minimum(count, len(loads) - 1)[None], axis=0)[0], 0.0
    )
    while np.any(high - low > 1.0):
        middle = np.floor((low + high) / 2.0)
        within = paced(middle) <= (traffic.tpot_s or np.inf)
        moving = high - low > 1.0
        low, high = np.where(moving & within, middle, low), np.where(moving & ~within, middle, high)
    tpot_s = paced(low)
    rate = np.where(low > 0.0, low / ((traffic.osl - 1.0) * tpot_s), 0.0)
    return Decode(kind, low, tpot_s, rate, binding, loads, steps, step_s)
