"""``serve``: the best deployments of a model for some traffic, with the search's account of itself."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from planner.engine import Pricer
from planner.errors import Infeasible
from planner.errors import Problem as Fault
from planner.plan import Optimality, SearchReport
from planner.serving.aggregated import QUANTILES
from planner.serving.disaggregated import Split, search_disaggregated
from planner.serving.plan import Pool, ServeEstimate, ServePlan, ServeResult
from planner.serving.search import Account, Found, search_aggregated
from planner.serving.space import DEGREES, ServeSpace
from planner.specs.serve_problem import ServeProblem
from planner.uncertainty.serving import serving_interval

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
    modes = (str(space.fixed["mode"]),) if "mode" in space.fixed else problem.modes
    found: list[Found | Split] = []
    if "aggregated" in modes:
        found += _distinct(search_aggregated(problem, space, pricer, top, account))
    if "disaggregated" in modes:
        found += search_disaggregated(problem, pricer, account)
    if not found:
        raise Infeasible(_reasons(problem, account))
    found.sort(key=lambda f: (-_value(problem, f), _tpot_s(f), f.devices))
    best = _value(problem, found[0])
    plans = tuple(
        _plan(
            problem,
            f,
            Optimality("exact" if not i else "gap", 1.0 - _value(problem, f) / best, None, _SOLVER),
        )
        for i, f in enumerate(found[:top])
    )
    report = SearchReport(
        account.candidates, account.scored, account.repriced, dict(account.excluded), dict(account.rejected),
        time.perf_counter() - started,
    )  # fmt: skip
    return ServeResult(plans, report, tuple(_front(problem, found)))


_SOLVER = "grid, bound and bisection of the load; rate matching of pools"


def _distinct(found: list[Found]) -> list[Found]:
    """The best iteration budget of every recipe and mesh."""
    kept: dict[Any, Found] = {}
    for f in found:
        kept.setdefault((tuple(f.recipe.items()), tuple(f.row)), f)
    return list(kept.values())


def _rate(problem: ServeProblem, f: Found | Split) -> float:
    return f.requests_per_s if isinstance(f, Split) else f.tokens_per_s / problem.traffic.osl


def _tpot_s(f: Found | Split) -> float:
    return f.tpot_s if isinstance(f, Split) else float(f.state.tpot_s[0])


def _value(problem: ServeProblem, f: Found | Split) -> float:
    """What the ranking maximises: what the machines answer, or at a given rate, how few of them it takes."""
    rate = _rate(problem, f)
    return rate / f.devices if problem.traffic.rate_per_s is not None else rate


def _plan(problem: ServeProblem, f: Found | Split, judged: Optimality) -> ServePlan:
    return ServePlan(
        model=problem.model.name, cluster=problem.cluster.name, stack=problem.stack.name,
        traffic={name: value for name, value in asdict(problem.traffic).items() if value is not None},
        mode="disaggregated" if isinstance(f, Split) else "aggregated",
        pools=_split_pools(f) if isinstance(f, Split) else _pools(f),
        estimate=_split_estimate(problem, f) if isinstance(f, Split) else _estimate(problem, f),
        optimality=judged, assumptions=assumptions(problem),
    )  # fmt: skip


def _mesh(row: Any) -> dict[str, int]:
    return {name: int(value) for name, value in zip(DEGREES, row, strict=True)}


def _pools(f: Found) -> tuple[Pool, ...]:
    knobs: dict[str, Any] = {**f.recipe, "chunk_tokens": int(f.chunk), "max_sequences": max(f.in_flight, 1)}
    return (Pool("aggregated", f.replicas, _mesh(f.row), knobs, f.in_flight),)


def _split_pools(f: Split) -> tuple[Pool, ...]:
    prefill: dict[str, Any] = {**f.recipes[0], "chunk_tokens": int(f.chunk)}
    decode: dict[str, Any] = {**f.recipes[1], "max_sequences": f.in_flight}
    return (
        Pool("prefill", f.replicas[0], _mesh(f.rows[0]), prefill, 1),
        Pool("decode", f.replicas[1], _mesh(f.rows[1]), decode, f.in_flight),
    )


def _estimate(problem: ServeProblem, f: Found) -> ServeEstimate:
    state = f.state
    ttft = {"mean": float(state.ttft_s[0])} | {n: float(state.ttft_at(q)[0]) for n, q in QUANTILES.items()}
    tpot = {"mean": float(state.tpot_s[0])} | {n: float(state.tpot_at(q)[0]) for n, q in QUANTILES.items()}
    return _told(problem, f, ttft, tpot, int(f.most * f.replicas))


def _split_estimate(problem: ServeProblem, f: Split) -> ServeEstimate:
    ttft = {"mean": f.ttft_at(None)} | {name: f.ttft_at(q) for name, q in QUANTILES.items()}
    tpot = dict.fromkeys(("mean", *QUANTILES), f.tpot_s)
    return _told(problem, f, ttft, tpot, int(f.most * f.replicas[1]))


def _told(
    problem: ServeProblem, f: Found | Split, ttft: Mapping[str, float], tpot: Mapping[str, float], most: int
) -> ServeEstimate:
    device, osl, software = problem.cluster.device, problem.traffic.osl, problem.stack.serving
    assert software is not None
    rate = _rate(problem, f)
    tokens_per_s = rate * osl
    price = problem.usd_per_hour
    return ServeEstimate(
        output_tokens_per_s_per_device=tokens_per_s / f.devices,
        output_tokens_per_s_per_user=1.0 / tpot["mean"],
        ttft_s=ttft,
        tpot_s=tpot,
        e2e_s={name: ttft[name] + (osl - 1) * tpot[name] for name in ttft},
        max_concurrency=most,
        goodput_requests_per_s=rate,
        usd_per_million_output_tokens=None
        if price is None
        else price / 3600.0 * f.devices / tokens_per_s * 1e6,
        joules_per_output_token=float(device.power_w) * f.devices / tokens_per_s,
        memory_bytes=f.memory,
        memory_budget_bytes=float(software.memory_fraction) * float(device.memory_bytes),
        binding=f.binding,
        interval=serving_interval(
            any(block.moe for block in problem.model.blocks.values()),
            isinstance(f, Split),
            {
                "ttft_s": ttft["mean"],
                "tpot_s": tpot["mean"],
                "output_tokens_per_s_per_device": tokens_per_s / f.devices,
            },
        ),
    )


def assumptions(problem: ServeProblem) -> tuple[str, ...]:
    """What every number of this problem rests on."""
    software = problem.stack.on_generation(problem.cluster.device.generation).serving
    assert software is not None
    return (
        f"engine: stack {problem.stack.name!r}, {float(software.iteration_s) * 1e3:.2f} ms of host time per iteration "
        f"({software.iteration_s.kind}), {float(software.memory_fraction):.0%} of memory ({software.memory_fraction.kind})",
        "traffic: prompts and answers of mean lengths"
        + (", clients that replace every answer" if problem.traffic.concurrency else ", independent arrivals")
        + ("; experts chosen uniformly" if any(b.moe for b in problem.model.blocks.values()) else ""),
    )


def _front(problem: ServeProblem, found: list[Found | Split]) -> list[Mapping[str, Any]]:
    """Plans that no other beats in tokens per second and user and per second and device."""
    osl = problem.traffic.osl
    front: list[Mapping[str, Any]] = []
    best = np.inf
    for f in sorted(found, key=lambda f: -_rate(problem, f) / f.devices):
        tpot = _tpot_s(f)
        if tpot < best:
            best = tpot
            pools = _split_pools(f) if isinstance(f, Split) else _pools(f)
            front.append(
                {
                    "mode": "disaggregated" if isinstance(f, Split) else "aggregated",
                    "pools": [{"role": p.role, "replicas": p.replicas, "mesh": dict(p.mesh)} for p in pools],
                    "output_tokens_per_s_per_device": _rate(problem, f) * osl / f.devices,
                    "output_tokens_per_s_per_user": 1.0 / tpot,
                }
            )
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
        faults.append(
            Fault(
                "serve", f"no candidate is left ({reasons})", "one that is valid", "Loosen --fix or --forbid."
            )
        )
    return faults
