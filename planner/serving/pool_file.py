"""Engines whose iteration time a file gives, in the place of a plan's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.load.iteration_time import Affine
from planner.load.scheduler import SCHEDULERS, KvPool, Scheduler, scheduler
from planner.serving.deployment import Deployment, Stage

__all__ = ["read_pool"]


def read_pool(path: str | Path, policy: str | None = None) -> Deployment:
    """Engines whose iteration time is given: tables ``[iteration]``, ``[scheduler]`` and ``[cache]`` of a TOML or JSON file.

    Raises:
        SpecError: the file is wrong (all of its problems at once).
    """
    from planner.specs.reader import Reader, read_file

    reader = Reader(read_file(path), str(path))
    times = reader.table("iteration")
    base_s = times.number("base_s", positive=True)
    names = ("per_decode_s", "per_context_token_s", "per_prefill_token_s", "per_prefill_context_token_s")
    price = Affine(base_s, *(times.number(name, 0.0) for name in names))
    times.finish()
    engines = reader.integer("engines", 1, maximum=10**5)
    rules = _read_rules(reader.table("scheduler", None), policy)
    pool = _read_cache(reader.table("cache", None))
    reader.finish()
    reader.raise_if_any()
    return Deployment((Stage("aggregated", engines, price, rules, pool),))


def _read_rules(table: Any, policy: str | None) -> Scheduler:
    if table is None:
        return scheduler(policy or "sarathi")
    name = table.text("policy", "sarathi", choices=SCHEDULERS)
    plain = SCHEDULERS.get(policy or name, SCHEDULERS["sarathi"])
    rules = replace(
        plain,
        max_requests=table.integer("max_requests", plain.max_requests),
        token_budget=table.integer("token_budget", plain.token_budget, maximum=2**62),
        order=table.text("order", plain.order, choices=("arrival", "priority")),
        preemption=table.text("preemption", plain.preemption, choices=("recompute", "swap")),
    )
    table.finish()
    return rules


def _read_cache(table: Any) -> KvPool:
    if table is None:
        return KvPool()
    pool = KvPool(
        table.integer("blocks"),
        table.integer("block_tokens", 16),
        table.integer("watermark_blocks", 0, minimum=0),
        table.number("swap_s_per_block", 0.0),
    )
    table.finish()
    return pool
