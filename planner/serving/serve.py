"""``serve``: the best deployments of a model for some traffic, with the search's account of itself."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from planner.engine import Pricer
from planner.errors import Infeasible
from planner.errors import Problem as Fault
from planner.plan import Optimality, SearchReport
from planner.serving.aggregated import QUANTILES
from planner.serving.plan import Pool, ServeEstimate, ServePlan, ServeResult
from planner.serving.search import Account, Found, search_aggregated
from planner.serving.space import DEGREES, ServeSpace
from planner.specs.serve_problem import ServeProblem

__all__ = ["serve"]

_LIMITS = {"ttft": ("ttft_s", "--ttft-ms"), "tpot": ("tpot_s", "--tpot-ms"), "e2e": ("e2e_s", "--e2e-ms")}


def serve(problem: ServeProblem, top: int = 10) -> ServeResult:
    """Searches the best plans.

    Args:
        problem: model, machines, traffic, stack and choices.
        top: plans to keep.

    Raises:
        SpecError: a fixed or forbidden choice is unknown.
        Infeasible: nothing keeps the limits; says which binds, by how much, and what comes nearest.
    """
    started = time.perf_counter()
    space = ServeSpace(problem)
    pricer = Pricer(problem.cluster, problem.stack)
    account = Account()
    found = search_aggregated(problem, space, pricer, top, account)
    if not found:
        raise Infeasible(_reasons(problem, account))
    best = _distinct(found)
    plans = tuple(_plan(problem, f, _judged(index, f, best[0])) for index, f in enumerate(best[:top]))
    report = SearchReport(
        account.candidates, account.scored, account.repriced, dict(account.excluded), dict(account.rejected),
        time.perf_counter() - started,
    )  # fmt: skip
    return ServeResult(plans, report, tuple(_front(problem, found)))


def _distinct(found: list[Found]) -> list[Found]:
    """The best iteration budget of every recipe and mesh."""
    kept: dict[Any, Found] = {}
    for f in found:
        kept.setdefault((tuple(f.recipe.items()), tuple(f.row)), f)
    return list(kept.values())


def _judged(index: int, f: Found, best: Found) -> Optimality:
    gap = 1.0 - f.tokens_per_s / best.tokens_per_s
    return Optimality("exact" if index == 0 else "gap", gap, None, "grid, bound and bisection of the load")


def _plan(problem: ServeProblem, f: Found, judged: Optimality) -> ServePlan:
    mesh = {name: int(value) for name, value in zip(DEGREES, f.row, strict=True)}
    knobs: dict[str, Any] = {**f.recipe, "chunk_tokens": int(f.chunk), "max_sequences": max(f.in_flight, 1)}
    pool = Pool("aggregated", f.replicas, mesh, knobs, f.in_flight)
    return ServePlan(
        model=problem.model.name, cluster=problem.cluster.name, stack=problem.stack.name,
        traffic={name: value for name, value in asdict(problem.traffic).items() if value is not None},
        mode="aggregated", pools=(pool,), estimate=_estimate(problem, f), optimality=judged,
        assumptions=assumptions(problem),
    )  # fmt: skip


def _estimate(problem: ServeProblem, f: Found) -> ServeEstimate:
    state, traffic, device = f.state, problem.traffic, problem.cluster.device
    ttft = {"mean": float(state.ttft_s[0])} | {n: float(state.ttft_at(q)[0]) for n, q in QUANTILES.items()}
    tpot = {"mean": float(state.tpot_s[0])} | {n: float(state.tpot_at(q)[0]) for n, q in QUANTILES.items()}
    e2e = {name: ttft[name] + (traffic.osl - 1) * tpot[name] for name in ttft}
    rate = f.tokens_per_s / traffic.osl
    price = problem.usd_per_hour
    software = problem.stack.serving
    assert software is not None
    return ServeEstimate(
        output_tokens_per_s_per_device=f.tokens_per_s / f.devices,
        output_tokens_per_s_per_user=1.0 / tpot["mean"],
        ttft_s=ttft,
        tpot_s=tpot,
        e2e_s=e2e,
        max_concurrency=int(f.most * f.replicas),
        goodput_requests_per_s=rate,
        usd_per_million_output_tokens=None if price is None else price / 3600.0 * f.devices / f.tokens_per_s * 1e6,
        joules_per_output_token=float(device.power_w) * f.devices / f.tokens_per_s,
        memory_bytes=f.memory,
        memory_budget_bytes=float(software.memory_fraction) * float(device.memory_bytes),
        binding=f.binding,
    )


def assumptions(problem: ServeProblem) -> tuple[str, ...]:
    """What every number of this problem rests on."""
    software = problem.stack.serving
    assert software is not None
    return (
        f"engine: stack {problem.stack.name!r}, {float(software.iteration_s) * 1e3:.2f} ms of host time per iteration "
        f"({software.iteration_s.kind}), {float(software.memory_fraction):.0%} of memory ({software.memory_fraction.kind})",
        "experts: routing uniform and independent" if any(b.moe for b in problem.model.blocks.values()) else "lengths as given",
    )


def _front(problem: ServeProblem, found: list[Found]) -> list[Mapping[str, Any]]:
    """Plans that no other beats in tokens per second and user and per second and device."""
    points = sorted(found, key=lambda f: -f.tokens_per_s / f.devices)
    front: list[Mapping[str, Any]] = []
    best = np.inf
    for f in points:
        tpot = float(f.state.tpot_s[0])
        if tpot < best:
            best = tpot
            row = {name: int(value) for name, value in zip(DEGREES, f.row, strict=True)}
            front.append(
                {
                    "mode": "aggregated", "mesh": row, "chunk_tokens": int(f.chunk), "in_flight": f.in_flight,
                    "output_tokens_per_s_per_device": f.tokens_per_s / f.devices,
                    "output_tokens_per_s_per_user": 1.0 / tpot,
                }
            )  # fmt: skip
    return front


def _reasons(problem: ServeProblem, account: Account) -> list[Fault]:
    """Which limit binds, by how much, and the nearest change that would fit."""
    faults = []
    traffic = problem.traffic
    for limit, (ratio, where) in sorted(account.nearest.items(), key=lambda item: item[1][0]):
        if limit in _LIMITS:
            name, flag = _LIMITS[limit]
            allowed = getattr(traffic, name) * 1e3
            faults.append(
                Fault(
                    flag, f"nothing is faster than {allowed * ratio:.4g} ms at the lightest load ({where})",
                    f"at most {allowed:g} ms", f"{flag} {np.ceil(allowed * ratio * 10) / 10:g} would fit, or faster devices.",
                )
            )  # fmt: skip
        elif limit == "rate":
            most = (traffic.rate_per_s or 0.0) / ratio
            faults.append(
                Fault(
                    "--rate", f"{problem.cluster.devices} devices answer at most {most:.4g} requests/s ({where})",
                    f"{traffic.rate_per_s:g} requests/s",
                    f"{int(np.ceil(problem.cluster.devices * ratio))} devices would, or a lower rate.",
                )
            )  # fmt: skip
        elif limit == "memory":
            faults.append(
                Fault(
                    "device memory", f"weights and buffers take {ratio:.2f} times what a device offers ({where})",
                    "room for one request", "More devices, narrower weights (--precision fp8), or shorter prompts.",
                )
            )  # fmt: skip
    if not faults:
        reasons = ", ".join(f"{count} {reason}" for reason, count in account.rejected.most_common(3))
        faults.append(Fault("serve", f"no candidate is left ({reasons})", "one that is valid", "Loosen --fix or --forbid."))
    return faults


def named(problem: ServeProblem, **fixed: Any) -> ServeProblem:
    """The problem with more choices fixed."""
    return replace(problem, fixed={**problem.fixed, **fixed})
