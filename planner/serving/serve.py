"""``serve``: the best deployments of a model for some traffic, with the search's account of itself."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from planner.engine.pricer import Pricer
from planner.errors import Infeasible, SpecError
from planner.plans.plan import Optimality, SearchReport
from planner.serving.aggregated import QUANTILES
from planner.serving.candidates import Account
from planner.serving.disaggregated import Split, search_disaggregated
from planner.serving.front import pareto
from planner.serving.listed import Listing
from planner.serving.nearest import reasons
from planner.serving.plan import Pool, ServeEstimate, ServePlan, ServeResult
from planner.serving.search import Found, search_aggregated
from planner.serving.space import ServeSpace, degrees_of
from planner.specs.serve_problem import ServeProblem
from planner.uncertainty.serving import novelty_of, serving_interval

if TYPE_CHECKING:
    from planner.serving.mixed import MixedFound

__all__ = ["serve"]


def serve(problem: ServeProblem, top: int = 10, given: tuple[Pool, ...] = ()) -> ServeResult:
    """Searches the best plans.

    Args:
        problem: model, machines, traffic, stack and choices.
        top: plans to keep.
        given: on several clusters, offloaded, or of parts, pools that are there: only their load is found.

    Raises:
        SpecError: a fixed or forbidden choice is unknown.
        Infeasible: nothing keeps the limits; says which binds, by how much, and what comes nearest.
    """
    try:
        return _searched(problem, top, given)
    except _NothingError as nothing:
        raise Infeasible(reasons(problem, nothing.account, _has_plan)) from None


class _NothingError(Exception):
    """No plan is left."""

    def __init__(self, account: Account) -> None:
        super().__init__()
        self.account = account


def _has_plan(problem: ServeProblem) -> bool:
    """Whether a changed problem has a plan."""
    try:
        return bool(_searched(problem, 1, ()).plans)
    except (_NothingError, SpecError):
        return False


def _searched(problem: ServeProblem, top: int, given: tuple[Pool, ...]) -> ServeResult:
    started = time.perf_counter()
    if problem.others:
        return _serve_mixed(problem, top, given, started)
    space = ServeSpace(problem)
    if "offloaded" in (*problem.modes, space.fixed.get("mode")):
        return _serve_offloaded(problem, top, given, started)
    pricer = Pricer(problem.cluster, problem.stack)
    account = Account()
    modes = (str(space.fixed["mode"]),) if "mode" in space.fixed else problem.modes
    modes = ("static",) if "static" in modes else modes
    found: list[Found | Split] = []
    if "aggregated" in modes:
        found += _distinct(search_aggregated(problem, space, pricer, top, account))
    if "disaggregated" in modes:
        found += search_disaggregated(problem, pricer, account)
    if "static" in modes:
        from planner.serving.static_batch import search_static

        found += search_static(problem, space, pricer, account)
    if "ping_pong" in modes:
        from planner.serving.ping_pong import search_ping_pong

        found += search_ping_pong(problem, pricer, account, given)
    if not found:
        raise _NothingError(account)
    found.sort(key=lambda f: _order(problem, f))
    listing = Listing(problem, pricer)
    listed: list[Found | Split] = []
    for number, candidate in enumerate(found[:_MOST_LISTED]):
        reached = max((_value(problem, f) for f in listed), default=0.0)
        if number >= max(top, _LISTED) and _value(problem, candidate) <= reached:
            break  # what requests that arrive on their own wait for only lowers a candidate's rate
        f = candidate if "static" in modes else listing.of(candidate)
        if f is not None:
            listed.append(f)
    if not listed:
        raise _NothingError(account)
    listed.sort(key=lambda f: _order(problem, f))
    best = _value(problem, listed[0])
    plans = tuple(
        _plan(
            problem,
            f,
            Optimality("exact" if not i else "gap", 1.0 - _value(problem, f) / best, None, _SOLVER),
        )
        for i, f in enumerate(listed[:top])
    )
    return ServeResult(plans, _report(account, started), tuple(pareto(account.curves)))


def _serve_mixed(problem: ServeProblem, top: int, given: tuple[Pool, ...], started: float) -> ServeResult:
    """Pools on several clusters."""
    from planner.serving.mixed import search_mixed

    account = Account()
    found = search_mixed(problem, account, given)
    if not found:
        raise _NothingError(account)

    def value(f: MixedFound) -> float:
        if problem.machines_count:
            return f.requests_per_s
        return f.requests_per_s / (f.watts if problem.objective == "energy" else f.usd_per_hour or f.devices)

    found.sort(key=lambda f: (-value(f), f.usd_per_hour or 0.0, f.devices))
    best = value(found[0])
    plans = tuple(
        ServePlan(
            model=problem.model.name, cluster="+".join(cluster.name for cluster in problem.clusters), stack=problem.stack.name,
            traffic={name: value for name, value in asdict(problem.traffic).items() if value is not None},
            mode="disaggregated", pools=f.pools, estimate=_mixed_estimate(problem, f),
            optimality=Optimality(
                "gap" if i or account.gap else "exact", 1.0 - value(f) / best * (1.0 - account.gap), None, _MIXED_SOLVER
            ),
            assumptions=assumptions(problem),
        )
        for i, f in enumerate(found[:top])
    )  # fmt: skip
    return ServeResult(plans, _report(account, started))


def _serve_offloaded(problem: ServeProblem, top: int, given: tuple[Pool, ...], started: float) -> ServeResult:
    """A model on every device, spread over device, host and disk."""
    from planner.serving.offloaded import broken_rules, offloaded_plan, search_offloaded, shortage

    only = next(((int(p.knobs["gpu_batch_size"]), int(p.knobs["gpu_batches"])) for p in given), None)
    pricer, account = Pricer(problem.cluster, problem.stack), Account()
    if broken := broken_rules(problem, pricer):
        account.rejected.update(broken)
        raise _NothingError(account)
    found = search_offloaded(problem, pricer, only)
    if not found:
        account.miss("memory", max(shortage(problem, pricer), 1.0), "device, host and disk together")
        raise _NothingError(account)
    plans = []
    for index, f in enumerate(found[:top]):
        pool, estimate = offloaded_plan(problem, f)
        gap = 1.0 - f.tokens_per_s / found[0].tokens_per_s
        plans.append(
            ServePlan(
                model=problem.model.name, cluster=problem.cluster.name, stack=problem.stack.name,
                traffic={name: value for name, value in asdict(problem.traffic).items() if value is not None},
                mode="offloaded", pools=(pool,), estimate=estimate,
                optimality=Optimality("gap" if index else "exact", gap, None, _OFFLOADED_SOLVER),
                assumptions=(*assumptions(problem), "offloading: links reach what FlexGen's reach on a T4 (fitted)"),
            )
        )  # fmt: skip
    account = Account(candidates=len(found), scored=len(found))
    return ServeResult(tuple(plans), _report(account, started))


def _report(account: Account, started: float) -> SearchReport:
    return SearchReport(
        account.candidates, account.scored, account.repriced, dict(account.excluded), dict(account.rejected),
        time.perf_counter() - started,
    )  # fmt: skip


def _mixed_estimate(problem: ServeProblem, f: MixedFound) -> ServeEstimate:
    ttft, tpot, osl = _named(f.latencies.ttft_s), _named(f.latencies.tpot_s), problem.traffic.osl
    tokens_per_s = f.requests_per_s * osl
    return ServeEstimate(
        output_tokens_per_s_per_device=tokens_per_s / f.devices,
        output_tokens_per_s_per_user=1.0 / tpot["mean"],
        ttft_s=ttft,
        tpot_s=tpot,
        e2e_s={name: ttft[name] + (osl - 1) * tpot[name] for name in ttft},
        max_concurrency=f.most,
        goodput_requests_per_s=f.requests_per_s,
        usd_per_million_output_tokens=None
        if f.usd_per_hour is None
        else f.usd_per_hour / 3600.0 / tokens_per_s * 1e6,
        joules_per_output_token=f.watts / tokens_per_s,
        memory_bytes=f.memory,
        memory_budget_bytes=f.memory_budget_bytes,
        binding=f.binding,
    )


_SOLVER = "grid, bound and bisection of the load by means; rate matching of pools; listed plans by chains"
_OFFLOADED_SOLVER = "a linear program of placements for every batch and block"
_MIXED_SOLVER = "integer program over all replicas that none makes superfluous; listed plans by chains"
_LISTED, _MOST_LISTED = 10, 64
"""Candidates put through the chains at least, so that the best does not depend on how many are asked for; and at most."""


def _distinct(found: list[Found]) -> list[Found]:
    """The best iteration budget of every recipe and mesh."""
    kept: dict[Any, Found] = {}
    for f in found:
        kept.setdefault((tuple(f.recipe.items()), tuple(f.row)), f)
    return list(kept.values())


def _rate(problem: ServeProblem, f: Found | Split) -> float:
    return f.requests_per_s if isinstance(f, Split) else f.tokens_per_s / problem.traffic.osl


def _tpot_s(f: Found | Split) -> float:
    return f.tpot_s if f.latencies is None else f.latencies.tpot_s["mean"]


def _order(problem: ServeProblem, f: Found | Split) -> tuple[float, float, int]:
    return -_value(problem, f), _tpot_s(f), f.devices


def _value(problem: ServeProblem, f: Found | Split) -> float:
    """What the ranking maximises: what the machines answer, or for every device, dollar or joule."""
    rate = _rate(problem, f)
    return rate if problem.machines_count else rate / f.devices


def _plan(problem: ServeProblem, f: Found | Split, judged: Optimality) -> ServePlan:
    return ServePlan(
        model=problem.model.name, cluster=problem.cluster.name, stack=problem.stack.name,
        traffic={name: value for name, value in asdict(problem.traffic).items() if value is not None},
        mode=_mode(problem, f),
        pools=_split_pools(problem, f) if isinstance(f, Split) else _pools(problem, f),
        estimate=_split_estimate(problem, f) if isinstance(f, Split) else _estimate(problem, f),
        optimality=judged, assumptions=assumptions(problem),
    )  # fmt: skip


def _mode(problem: ServeProblem, f: Found | Split) -> str:
    """How pools are composed."""
    if isinstance(f, Split):
        return "ping_pong" if "batches_in_turn" in f.recipes[1] else "disaggregated"
    return "static" if "static" in (problem.fixed.get("mode"), *problem.modes) else "aggregated"


def _mesh(row: Any) -> dict[str, int]:
    return degrees_of(row)


def _pools(problem: ServeProblem, f: Found) -> tuple[Pool, ...]:
    knobs: dict[str, Any] = {
        **_recipe(problem, f.recipe),
        "chunk_tokens": int(f.chunk),
        "max_sequences": int(f.most),
    }
    return (Pool("aggregated", f.replicas, _mesh(f.row), knobs, f.in_flight),)


def _recipe(problem: ServeProblem, recipe: Mapping[str, str]) -> dict[str, Any]:
    """A recipe as knobs, with what was told of its drafts."""
    told = problem.speculation
    if told is None or "draft_tokens" not in recipe:
        return dict(recipe)
    draft = told.method if told.model is None else told.model.name
    return {
        **recipe,
        "draft": draft,
        **({"draft_head": told.head} if told.head else {}),
        "acceptance": told.acceptance,
        "draft_tokens": int(recipe["draft_tokens"]),
    }


def _split_pools(problem: ServeProblem, f: Split) -> tuple[Pool, ...]:
    prefill: dict[str, Any] = {**f.recipes[0], "chunk_tokens": int(f.chunk)}
    decode: dict[str, Any] = {**_recipe(problem, f.recipes[1]), "max_sequences": int(f.most)}
    prompts = Pool("prefill", f.replicas[0], _mesh(f.rows[0]), prefill, 1)
    if "batches_in_turn" in decode:
        from planner.serving.ping_pong import ping_pong_pools

        return prompts, *ping_pong_pools(f, decode)
    return (
        prompts,
        Pool("decode", f.replicas[1], _mesh(f.rows[1]), decode, f.in_flight),
    )


def _estimate(problem: ServeProblem, f: Found) -> ServeEstimate:
    state = f.state
    if f.latencies is not None:
        return _told(
            problem, f, _named(f.latencies.ttft_s), _named(f.latencies.tpot_s), int(f.most * f.replicas)
        )
    ttft = {"mean": float(state.ttft_s[0])} | {n: float(state.ttft_at(q)[0]) for n, q in QUANTILES.items()}
    tpot = {"mean": float(state.tpot_s[0])} | {n: float(state.tpot_at(q)[0]) for n, q in QUANTILES.items()}
    return _told(problem, f, ttft, tpot, int(f.most * f.replicas))


def _named(values: Mapping[str, float]) -> dict[str, float]:
    return {name: values[name] for name in ("mean", *QUANTILES)}


def _split_estimate(problem: ServeProblem, f: Split) -> ServeEstimate:
    if f.latencies is not None:
        most = int(f.most * f.replicas[1])
        return _told(problem, f, _named(f.latencies.ttft_s), _named(f.latencies.tpot_s), most)
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
        output_tokens_per_s_per_user=1.0 / (tpot["mean"] if osl > 1 else ttft["mean"]),
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
            "open" if problem.traffic.concurrency is None else "closed",
            novelty_of(problem.stack, device),
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
        + (
            f"; drafted tokens accepted with {problem.speculation.acceptance:g} (given)"
            if problem.speculation
            else ""
        )
        + ("; experts chosen uniformly" if any(b.moe for b in problem.model.blocks.values()) else ""),
        *_too_long(problem),
    )


def _too_long(problem: ServeProblem) -> tuple[str, ...]:
    """A request that is longer than the model's positions, where it is: engines refuse it unless they are told otherwise."""
    most, asked = problem.model.max_seq_len, problem.traffic.isl + problem.traffic.osl
    if asked <= most:
        return ()
    return (f"context: {asked:,} tokens of a request, of a model made for {most:,}",)
