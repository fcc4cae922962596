"""A written serving plan, priced again with this version, and every second of its iterations by item."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from planner.engine.pricer import Pricer
from planner.serving.aggregated import steady
from planner.serving.candidates import iterations_of
from planner.serving.composition import Composition
from planner.serving.iteration import Iterations
from planner.serving.iteration_items import iteration_items
from planner.serving.plan import PARTS, Pool, ServePlan
from planner.serving.serve import serve
from planner.serving.space import mesh_of, recipe_of, row_of
from planner.specs.cluster_file import load_cluster
from planner.specs.models import load_model
from planner.specs.serve_problem import ServeProblem
from planner.specs.speculation import METHODS, Speculation
from planner.specs.stack import load_stack
from planner.specs.traffic import Traffic
from planner.technique import SERVING_SLOTS

__all__ = ["account", "part_of", "problem_of", "reprice"]


def problem_of(plan: ServePlan) -> ServeProblem:
    """The problem whose only candidate is the plan.

    Raises:
        SpecError: its model, cluster or stack cannot be found, or its traffic is none.
    """
    clusters = [load_cluster(name) for name in plan.cluster.split("+")]
    fixed: dict[str, Any] = {"mode": plan.mode}
    for pool in plan.pools if len(clusters) == 1 else ():
        part = (
            pool.role in PARTS
        )  # of a replica that generates: its devices are no mesh, and stand in the pools alone
        prefix = "" if pool.role == "aggregated" else "decode." if part else f"{pool.role}."
        fixed |= {} if part else {f"{prefix}{name}": value for name, value in pool.mesh.items()}
        fixed[f"{prefix}replicas"] = pool.replicas
        fixed |= {
            f"{prefix}{name}": pool.knobs[name]
            for name in (*SERVING_SLOTS, "chunk_tokens", "draft_tokens")
            if name in pool.knobs
        }
        if (
            "max_sequences" in pool.knobs and not part
        ):  # of a replica; the search counts those of a stage of an attention rank
            each = -(-int(pool.knobs["max_sequences"]) // (pool.mesh["dp"] * pool.mesh["pp"]))
            fixed[f"{prefix}max_sequences"] = each
    known = Traffic.__dataclass_fields__
    traffic = Traffic(**{name: value for name, value in plan.traffic.items() if name in known})
    return ServeProblem(
        load_model(plan.model), clusters[0], traffic, load_stack(plan.stack), fixed=fixed,
        speculation=_speculation(plan.pools[-1].knobs), others=tuple(clusters[1:]), **_formats(plan),
    )  # fmt: skip


def _formats(plan: ServePlan) -> dict[str, Any]:
    """Formats of the pools, where they are not fixed one by one."""
    if "+" not in plan.cluster:
        return {}
    weights, caches = (
        tuple(dict.fromkeys(str(p.knobs[name]) for p in plan.pools)) for name in ("weights", "cache")
    )
    return {"precisions": weights, "caches": caches}


def part_of(problem: ServeProblem, pool: Pool) -> ServeProblem:
    """The problem on a pool's own cluster."""
    own = next((c for c in problem.clusters if c.name == pool.cluster), problem.cluster)
    return replace(problem, cluster=own, others=())


def _speculation(knobs: Mapping[str, Any]) -> Speculation | None:
    if "draft" not in knobs:
        return None
    method = knobs["draft"] if knobs["draft"] in METHODS else "draft"
    model = load_model(str(knobs["draft"])) if method == "draft" else None
    tokens = (int(knobs["draft_tokens"]),)
    return Speculation(method, float(knobs["acceptance"]), tokens, model, str(knobs.get("draft_head", "")))


def reprice(plan: ServePlan) -> ServePlan:
    """The plan at the load that it carries under this version.

    Raises:
        SpecError: as :func:`problem_of`.
        Infeasible: it does not keep its limits any more.
    """
    problem = problem_of(plan)
    known = bool(problem.others) or plan.mode in ("offloaded", "ping_pong")
    return serve(problem, top=1, given=plan.pools if known else ()).best


def account(plan: ServePlan) -> list[dict[str, Any]]:
    """Every pool's iterations, item by item: seconds of one iteration, and which technique put the item there."""
    whole = problem_of(plan)
    found: list[dict[str, Any]] = []
    if plan.mode == "ping_pong":
        from planner.serving.ping_pong_plan import generating_items

        found = generating_items(whole, plan.pools[1:], Pricer(whole.cluster, whole.stack))
    for pool in plan.pools[: -len(PARTS)] if plan.mode == "ping_pong" else plan.pools:
        problem = part_of(whole, pool)
        pricer = Pricer(problem.cluster, problem.stack)
        if plan.mode == "offloaded":
            from planner.serving.offloaded import offloaded_streams

            found.append({"role": plan.mode, "iterations": offloaded_streams(problem, pricer, pool)})
            continue
        row = row_of(pool.mesh)
        iterations = iterations_of(problem, recipe_of(pool.knobs), mesh_of(row), pricer)
        batches = _batches(problem.traffic, pool, iterations, gated=plan.mode == "static")
        found.append(
            {
                "role": pool.role if not pool.cluster else f"{pool.cluster}: {pool.role}",
                "iterations": [iteration_items(name, batch, iterations) for name, batch in batches.items()],
            }
        )
    return found


def _batches(
    traffic: Traffic, pool: Pool, iterations: Iterations, *, gated: bool
) -> Mapping[str, Composition]:
    """The iterations that a pool runs; one whose batches are ``gated`` runs all their prompts at once, beside nothing."""
    zero, one = np.zeros(1), np.ones(1)
    pp = iterations.ctx.mesh.pp
    context = traffic.isl + traffic.osl * (1.0 + traffic.length_scv) / 2.0
    decodes = pool.in_flight / pp
    if pool.role == "aggregated" and not gated:
        chunk = one * float(pool.knobs["chunk_tokens"])
        decodes = steady(iterations, traffic, one * pool.in_flight, chunk).decodes / pp
    found: dict[str, Composition] = {}
    if pool.role != "prefill":
        found["generating"] = Composition(decodes, decodes * context, zero, zero)
    if pool.role != "decode":
        budget = float(pool.knobs["chunk_tokens"]) * float(iterations.ctx.mesh.dp[0])
        beside = pool.role == "aggregated" and not gated and iterations.software.prompts == "beside"
        running = decodes if beside else zero
        together = pool.in_flight if gated else 1
        prompt = np.clip(np.minimum(budget - running, together * traffic.computed_isl), 1.0, None)
        found["with a prompt"] = Composition(running, running * context, prompt, one * traffic.prompt_context)
    return found
