"""A written plan whose replicas keep attention and experts apart: engines for the simulator, and seconds by item.

An engine of the simulator is one replica, all of whose sequences gain a token when their micro-batches have passed all layers. A
sequence that joins waits for the next such turn, as engines that exchange batches between two sides let it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from planner.engine.pricer import Pricer
from planner.load.iteration_time import Sampled
from planner.serving.composition import Composition
from planner.serving.deployment import Stage, stage_of
from planner.serving.iteration import Iterations
from planner.serving.iteration_items import item, kernel_items, largest_first
from planner.serving.ping_pong import given_row, sides_of, turn_price, turns_of
from planner.serving.plan import Pool
from planner.serving.space import recipe_of
from planner.specs.serve_problem import ServeProblem

__all__ = ["generating", "generating_items"]

_JOINING = 1024.0  # first tokens of an iteration whose caches came over, per attention rank: as other replicas that generate
_SOURCE = "arXiv:2504.02263"


def generating(
    problem: ServeProblem, pools: Sequence[Pool], pricer: Pricer, policy: str | None
) -> tuple[Stage, Iterations]:
    """The replicas that generate as equal engines, and the iterations of their attention ranks, which hold the caches."""
    (rows, batches), pool = given_row(pools), pools[0]
    sides = sides_of(problem, recipe_of(pool.knobs), rows, pricer)
    isl, osl = float(problem.traffic.isl), float(problem.traffic.osl)
    most = int(pool.knobs["max_sequences"])
    stage = stage_of(sides[0], isl, osl, _JOINING, most, role="decode", engines=pool.replicas, policy=policy)

    price = turn_price(problem, sides, float(batches))
    table = Sampled.of(price, stage.rules.max_requests, stage.rules.token_budget, isl + osl)
    return replace(stage, iteration=table, rules=replace(stage.rules, mixed=True)), sides[0]


def generating_items(problem: ServeProblem, pools: Sequence[Pool], pricer: Pricer) -> list[dict[str, Any]]:
    """A token of all micro-batches by what it waits for, and what either side does for one micro-batch, item by item."""
    (rows, batches), pool, traffic = given_row(pools), pools[0], problem.traffic
    sides = sides_of(problem, recipe_of(pool.knobs), rows, pricer)
    n = np.array([float(pool.in_flight)])
    context = n * (traffic.isl + traffic.osl * (1.0 + traffic.length_scv) / 2.0)
    turns = turns_of(problem, sides, n, context, float(batches))
    times_s = {"attention": float(turns.attention_s[0]), "experts": float(turns.experts_s[0])}
    slower = max(times_s, key=lambda side: times_s[side])
    whole_s, busy_s = float(turns.seconds[0]), turns.layers * batches * times_s[slower]
    host_s = float(turns.host_s[0])
    once = Composition(n / batches, context / batches, np.zeros(1), np.zeros(1))
    token = {
        "name": f"a token of each of {batches} micro-batches of {float(n[0]) / batches:,.0f}",
        "decodes": float(n[0]), "prefill_tokens": 0.0, "seconds": whole_s,
        "items": largest_first([
            item(f"{slower} at work", "ping_pong", _SOURCE, busy_s),
            item(f"{slower} waiting for the other side and the way", "ping_pong", _SOURCE, whole_s - busy_s - host_s),
            item("host", "stack", sides[0].software.iteration_s.source, host_s),
        ]),
    }  # fmt: skip
    found: list[dict[str, Any]] = [{"role": "attention and experts", "iterations": [token]}]
    for role, side in zip(times_s, sides, strict=True):
        items = largest_first(kernel_items(once, side))
        iteration = {
            "name": "one micro-batch, all layers", "decodes": float(once.decodes[0]), "prefill_tokens": 0.0,
            "seconds": times_s[role] * turns.layers, "items": items,
        }  # fmt: skip
        found.append({"role": role, "iterations": [iteration]})
    return found
