"""Launches of engines as problems: what ``--from vllm`` and ``--from sglang`` read, priced on a cluster for some traffic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.engine.pricer import Pricer
from planner.errors import Problem, SpecError
from planner.export.launched import beside
from planner.export.serving.launched import LaunchedPool
from planner.export.serving.sglang_import import read_sglang
from planner.export.serving.target import GENERATION_TOKENS
from planner.export.serving.vllm_import import read_vllm
from planner.serving.candidates import iterations_of
from planner.serving.capacity import capacity
from planner.serving.space import DEGREES, mesh_of, row_of
from planner.specs.cluster import Cluster
from planner.specs.device import Sourced
from planner.specs.model import Model
from planner.specs.models import load_model, named_precision
from planner.specs.serve_problem import ServeProblem
from planner.specs.speculation import Speculation
from planner.specs.stack import Stack, load_stack
from planner.specs.traffic import Traffic
from planner.technique import SERVING_SLOTS, discover

__all__ = ["SERVING_READERS", "problem_of_launch", "read_launch"]

SERVING_READERS: Mapping[str, Callable[[str | Path], LaunchedPool]] = {
    "sglang": read_sglang,
    "vllm": read_vllm,
}
_PAIR = ("prefill", "decode")


def read_launch(launcher: str, paths: str) -> tuple[LaunchedPool, ...]:
    """The pool of a file, or the pools of two with a comma between them: prefill, then decode.

    Raises:
        SpecError: what is wrong with a file, or one pool of a pair is missing.
    """
    names = [paths] if Path(paths).is_file() or "," not in paths else paths.split(",")
    pools = [SERVING_READERS[launcher](name) for name in names]
    if len(pools) == 1 and pools[0].role == "aggregated":
        return tuple(pools)
    if len(pools) != 2:
        where, expected = f"--from {launcher} {paths[:60]}", "both of them, PREFILL_FILE,DECODE_FILE"
        if len(pools) > 2:
            unlike = f"{len(pools)} pools, and no file says how many replicas each has"
            written = "The plan that they were exported from has: planner explain, or simulate, prices it."
            hint = beside(Path(names[0]).parent) or written
            raise SpecError(Problem(where, unlike, "one pool, or a pair: PREFILL_FILE,DECODE_FILE", hint))
        raise SpecError(Problem(where, "is one pool of a pair", expected))
    for pool, role, name in zip(pools, _PAIR, names, strict=True):
        if pool.role not in ("", role):
            raise SpecError(
                Problem(f"--from {launcher} {name}", f"is the {pool.role} pool", f"the {role} pool here")
            )
    return tuple(replace(pool, role=role) for pool, role in zip(pools, _PAIR, strict=True))


def problem_of_launch(
    pools: Sequence[LaunchedPool],
    model: Model,
    cluster: Cluster,
    traffic: Traffic,
    usd_per_device_hour: float | None,
    acceptance: float | None = None,
) -> ServeProblem:
    """The problem whose only candidate is what was launched.

    Args:
        pools: what was launched.
        model: what it serves.
        cluster: where.
        traffic: what it has to answer.
        usd_per_device_hour: price; None: the cluster's.
        acceptance: probability that a drafted token is the model's, of launches that draft.

    Raises:
        SpecError: its replicas do not fit on the cluster, it cannot serve the traffic's lengths, or it drafts tokens and
            nothing says how good they are (or the other way round).
    """
    speculation = _speculation(pools[-1], acceptance)
    fixed: dict[str, Any] = {"mode": "aggregated" if len(pools) == 1 else "disaggregated"}
    formats: dict[str, Any] = {"weights": [], "cache": []}
    for pool in pools:
        mine = _completed(pool, model)
        if pool.drafts is not None and pool.role != "prefill":
            mine["draft_tokens"] = pool.drafts.tokens
        if pool.role != "decode":
            mine.setdefault("chunk_tokens", _default_chunk(pool, cluster))
        prefix = "" if len(pools) == 1 else f"{pool.role}."
        fixed |= {
            f"{prefix}{name}": value for name, value in mine.items() if name not in ("weights", "cache")
        }
        for name in formats:
            fixed[f"{prefix}{name}"] = mine[name]
            formats[name].append(mine[name])
    if len(pools) == 1:
        fixed["replicas"] = _replicas(pools[0], cluster)
    adapters = next((pool.adapters for pool in pools if pool.adapters is not None), None)
    if adapters is not None:
        traffic = replace(traffic, adapters=adapters[0], adapter_rank=adapters[1])
    stack = _stack(pools, model, cluster, traffic, fixed)
    return ServeProblem(
        model, cluster, traffic, stack, tuple(dict.fromkeys(formats["weights"])), tuple(dict.fromkeys(formats["cache"])),
        (str(fixed["mode"]),), fixed, usd_per_device_hour=usd_per_device_hour,
        speculation=speculation,
    )  # fmt: skip


def _speculation(pool: LaunchedPool, acceptance: float | None) -> Speculation | None:
    drafts = pool.drafts
    if drafts is None:
        if acceptance is not None:
            raise SpecError(
                Problem("--acceptance", "is given, and the launch drafts nothing", "no --acceptance")
            )
        return None
    if acceptance is None:
        found = f"is missing; the launch drafts {drafts.tokens} tokens a step"
        raise SpecError(Problem("--acceptance", found, "a measured probability, such as 0.7"))
    head = drafts.model if drafts.method == "eagle" else ""
    model = load_model(drafts.model) if drafts.method == "draft" else None
    return Speculation(drafts.method, acceptance, (drafts.tokens,), model, head)


def _completed(pool: LaunchedPool, model: Model) -> dict[str, Any]:
    """A pool's choices with what follows from the model."""
    ranks = pool.fixed["tp"] * pool.fixed["dp"] * pool.fixed.get("cp", 1)
    moe = any(block.moe for block in model.blocks.values())
    found = {**pool.fixed, "ep": pool.fixed["ep"] if moe else 1}
    found["etp"] = max(ranks // found["ep"], 1) if moe else ranks
    if not moe:
        found["experts"] = "gathered"
    found.setdefault("cache_copies", "kept")
    found.setdefault("weights", named_precision(pool.model) or model.checkpoint)
    if found["weights"] == "fp8" and model.checkpoint == "fp8_block":
        found["weights"] = "fp8_block"
    return found


def _default_chunk(pool: LaunchedPool, cluster: Cluster) -> int:
    """Tokens of an iteration where the launch does not say."""
    software = load_stack(pool.launcher).on_generation(cluster.device.generation).serving
    assert software is not None
    return int(float(software.chunk_tokens))


def _replicas(pool: LaunchedPool, cluster: Cluster) -> int:
    size = int(pool.fixed["tp"] * pool.fixed["pp"] * pool.fixed["dp"] * pool.fixed.get("cp", 1))
    found, left = divmod(cluster.devices, size)
    if not found or left:
        raise SpecError(
            Problem("--cluster", f"{cluster.devices:,} devices", f"a multiple of the {size:,} of a replica")
        )
    return found


def _stack(
    pools: Sequence[LaunchedPool], model: Model, cluster: Cluster, traffic: Traffic, fixed: Mapping[str, Any]
) -> Stack:
    """The engine's constants, with the part of the memory that the launch gives it."""
    stack = load_stack(pools[0].launcher).on_generation(cluster.device.generation)
    pool = pools[-1]  # caches that live long are those of the pool that generates
    software = stack.serving
    assert software is not None
    if pool.memory_fraction is None:
        return stack
    fraction = pool.memory_fraction
    if pool.static:
        fraction += _beside_bytes(pool, model, cluster, traffic, stack) / float(cluster.device.memory_bytes)
    given = Sourced(fraction, "datasheet", "--from")
    return replace(stack, serving=replace(software, memory_fraction=given, on={}))


def _beside_bytes(
    pool: LaunchedPool, model: Model, cluster: Cluster, traffic: Traffic, stack: Stack
) -> float:
    """What a process holds beside weights and caches."""
    mine = _completed(pool, model)
    recipe = {t.slot: t.choices[0] for t in discover("serving").values() if t.default and t.slot}
    recipe |= {slot: str(mine[slot]) for slot in SERVING_SLOTS if slot in mine}
    mesh = mesh_of(row_of({name: mine.get(name, 1) for name in DEGREES}))
    problem = ServeProblem(model, cluster, traffic, stack)
    iterations = iterations_of(problem, recipe, mesh, Pricer(cluster, stack))
    assert stack.serving is not None
    usual = GENERATION_TOKENS if pool.role == "decode" else _default_chunk(pool, cluster)
    tokens = max(mine.get("chunk_tokens", usual), mine.get("max_sequences", 0))
    held = capacity(iterations, traffic.isl, traffic.osl, float(tokens))
    return float(held.activation_bytes[0]) + held.reserved_bytes
