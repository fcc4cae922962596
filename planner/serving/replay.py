"""A written serving plan, priced again with this version, and every second of its iterations by item."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from planner.composition import Composition
from planner.engine import Pricer
from planner.iteration import Iterations
from planner.ledger import Resident
from planner.serving.aggregated import steady
from planner.serving.plan import Pool, ServePlan
from planner.serving.search import iterations_of
from planner.serving.serve import serve
from planner.serving.space import DEGREES, mesh_of
from planner.specs.cluster_file import load_cluster
from planner.specs.models import load_model
from planner.specs.serve_problem import ServeProblem
from planner.specs.stack import load_stack
from planner.specs.traffic import Traffic
from planner.technique import SERVING_SLOTS

__all__ = ["account", "problem_of", "reprice"]


def problem_of(plan: ServePlan) -> ServeProblem:
    """The problem whose only candidate is the plan.

    Raises:
        SpecError: its model, cluster or stack cannot be found, or its traffic is none.
    """
    fixed: dict[str, Any] = {"mode": plan.mode}
    for pool in plan.pools:
        prefix = "" if pool.role == "aggregated" else f"{pool.role}."
        fixed |= {f"{prefix}{name}": value for name, value in pool.mesh.items()}
        fixed[f"{prefix}replicas"] = pool.replicas
        fixed |= {
            f"{prefix}{name}": pool.knobs[name]
            for name in (*SERVING_SLOTS, "chunk_tokens")
            if name in pool.knobs
        }
    known = Traffic.__dataclass_fields__
    traffic = Traffic(**{name: value for name, value in plan.traffic.items() if name in known})
    return ServeProblem(
        load_model(plan.model), load_cluster(plan.cluster), traffic, load_stack(plan.stack), fixed=fixed
    )


def reprice(plan: ServePlan) -> ServePlan:
    """The plan at the load that it carries under this version.

    Raises:
        SpecError: as :func:`problem_of`.
        Infeasible: it does not keep its limits any more.
    """
    return serve(problem_of(plan), top=1).best


def account(plan: ServePlan) -> list[dict[str, Any]]:
    """Every pool's iterations, item by item: seconds of one iteration, and which technique put the item there."""
    problem = problem_of(plan)
    pricer = Pricer(problem.cluster, problem.stack)
    found = []
    for pool in plan.pools:
        row = np.array([[float(pool.mesh[name]) for name in DEGREES]])
        recipe = {slot: str(pool.knobs[slot]) for slot in SERVING_SLOTS}
        iterations = iterations_of(problem, recipe, mesh_of(row), pricer)
        batches = _batches(problem.traffic, pool, iterations)
        found.append(
            {
                "role": pool.role,
                "iterations": [_iteration(name, batch, iterations) for name, batch in batches.items()],
            }
        )
    return found


def _batches(traffic: Traffic, pool: Pool, iterations: Iterations) -> Mapping[str, Composition]:
    """The iterations that a pool runs."""
    zero, one = np.zeros(1), np.ones(1)
    pp = iterations.ctx.mesh.pp
    context = traffic.isl + traffic.osl * (1.0 + traffic.length_scv) / 2.0
    decodes = pool.in_flight / pp
    if pool.role == "aggregated":
        chunk = one * float(pool.knobs["chunk_tokens"])
        decodes = steady(iterations, traffic, one * pool.in_flight, chunk).decodes / pp
    found: dict[str, Composition] = {}
    if pool.role != "prefill":
        found["generating"] = Composition(decodes, decodes * context, zero, zero)
    if pool.role != "decode":
        budget = float(pool.knobs["chunk_tokens"]) * float(iterations.ctx.mesh.dp[0])
        beside = pool.role == "aggregated" and iterations.software.prompts == "beside"
        running = decodes if beside else zero
        prompt = np.clip(np.minimum(budget - running, traffic.computed_isl), 1.0, None)
        found["with a prompt"] = Composition(running, running * context, prompt, one * traffic.prompt_context)
    return found


def _iteration(name: str, batch: Composition, iterations: Iterations) -> dict[str, Any]:
    """One iteration: its seconds, and those of its items, the largest first."""
    ledger = iterations.sized(batch, captured=bool(batch.prefill_tokens[0] <= 0.0))
    items = [item for item in ledger.items if not isinstance(item, Resident)]
    repeats = iterations.repeats()
    slowdown = float(iterations.software.prompt_slowdown) if batch.prefill_tokens[0] > 0.0 else 1.0
    rows = [
        {
            "what": item.what, "block": item.block, "by": item.by, "source": item.source,
            "seconds": float(np.ravel(price)[0]) * repeats.get(item.block, 1) * slowdown,
        }
        for item, price in zip(items, iterations.pricer.prices(items, ledger.axes), strict=True)
    ]  # fmt: skip
    total = float(iterations.seconds(batch)[0])
    host = iterations.software
    rows.append(
        {
            "what": "host", "block": "", "by": "stack", "source": host.iteration_s.source,
            "seconds": float(host.iteration_s) + float(host.sequence_s) * float(batch.decodes[0]),
        }
    )  # fmt: skip
    return {
        "name": name,
        "decodes": float(batch.decodes[0]),
        "prefill_tokens": float(batch.prefill_tokens[0]),
        "seconds": total,
        "items": sorted((row for row in rows if row["seconds"] > 0.0), key=lambda row: -row["seconds"]),  # type: ignore[operator]
    }
