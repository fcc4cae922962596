"""What a little more of something would buy.

Speed and batch are priced by the same plan, on hardware or a job that is changed a little. Memory makes no plan faster: it lets
another one fit, so it is priced by what the search would take with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from planner.errors import PlannerError
from planner.plans.plan import Plan
from planner.solve.named import estimate
from planner.solve.space import DEGREES
from planner.solve.train import search
from planner.specs.cluster import Cluster, NodeGroup, Tier
from planner.specs.device import Device, Sourced
from planner.specs.problem import Problem
from planner.technique import ADDITIVE_SLOTS

__all__ = ["sensitivities"]

_MORE = 1.1
_NOTABLE = 1e-3  # a plan that gains less is no news
_FREE = (*ADDITIVE_SLOTS, *DEGREES, "virtual_stages", "pipeline_layout", "recompute_layers")


def sensitivities(problem: Problem, plan: Plan) -> list[dict[str, Any]]:
    """The plan with each network tier, memory bandwidth, matrix peak and host link 10 % faster, and with twice the batch.

    With 10 % more memory, it is the best plan that fits then. Where that is so now already, another plan is an entry too.

    ``gain`` is the relative growth of tokens per second over this plan; entries are ordered by it. ``choices`` are those in
    which the plan that the search would take differs from this one; empty where the plan stays.
    """
    found = []
    for what, changed in _changes(problem):
        try:
            new = estimate(changed).estimate
        except PlannerError:  # the changed job breaks a rule, so it buys nothing
            continue
        gain = new.tokens_per_s_per_device / plan.estimate.tokens_per_s_per_device - 1.0
        found.append(_entry(what, new.step_time_s, gain, new.fits))
    found += _replanned(problem, plan)
    return sorted(found, key=lambda entry: -entry["gain"])


# -- details ---------------------------------------------------------------------------------------------------------


def _entry(
    what: str, step_time_s: float, gain: float, fits: bool, choices: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    return {"what": what, "step_time_s": step_time_s, "gain": gain, "fits": fits, "choices": choices or {}}


def _replanned(problem: Problem, plan: Plan) -> Iterator[dict[str, Any]]:
    """What the search would take on this machine, and on one with more memory.

    The kernels, their formats, and how they are cut and communicate stay as they are, which keeps the space small; mesh,
    micro-batch, sharding of states, recompute, offload and schedule are free. A plan that does not fit is told what it lacks.
    """
    estimate = plan.estimate
    peak = estimate.memory_bytes["peak"]
    if not estimate.fits:
        if peak > estimate.memory_budget_bytes:
            missing = math.ceil(100.0 * (peak / estimate.memory_budget_bytes - 1.0))
            yield _entry(f"memory +{missing} %", estimate.step_time_s, 0.0, True)
        return
    kept = {name: str(value).lower() for name, value in plan.knobs.items() if name not in _FREE}
    open_ = replace(problem, fixed=kept)
    more = "memory +10 %"
    then = now = _faster(replace(open_, cluster=_with_device(problem.cluster, _larger_memory)), plan)
    if then.estimate.memory_bytes["peak"] > estimate.memory_budget_bytes:
        now = _faster(open_, plan)
    if now is not plan:
        yield _other("another plan", now, plan)
    if then is not now and _gain(then, now) > _NOTABLE:
        yield _other(more if now is plan else f"another plan and {more}", then, plan)
    else:
        yield _entry(more, estimate.step_time_s, 0.0, True)


def _faster(problem: Problem, plan: Plan) -> Plan:
    """The best plan of a problem where it is notably faster than ``plan``, else that."""
    try:
        found = search(problem, 1, limit_s=plan.estimate.step_time_s / (1.0 + _NOTABLE)).plans
    except PlannerError:
        return plan
    return found[0] if found else plan


def _gain(new: Plan, old: Plan) -> float:
    return old.estimate.step_time_s / new.estimate.step_time_s - 1.0


def _other(what: str, new: Plan, plan: Plan) -> dict[str, Any]:
    """The entry of a new plan: its gain, and the choices in which it differs."""
    before, after = {**plan.mesh, **plan.knobs}, {**new.mesh, **new.knobs}
    choices = {name: value for name, value in after.items() if before.get(name) != value}
    return _entry(what, new.estimate.step_time_s, _gain(new, plan), True, choices)


def _changes(problem: Problem) -> Iterator[tuple[str, Problem]]:
    cluster = problem.cluster
    for index, tier in enumerate(cluster.tiers):
        yield (
            f"{tier.name} bandwidth +10 %",
            replace(problem, cluster=_with_tier(cluster, index, _faster_tier)),
        )
        yield f"{tier.name} latency ÷1.1", replace(problem, cluster=_with_tier(cluster, index, _quicker_tier))
    yield "memory bandwidth +10 %", replace(problem, cluster=_with_device(cluster, _faster_memory))
    yield "matrix peak +10 %", replace(problem, cluster=_with_device(cluster, _higher_peak))
    yield "host link +10 %", replace(problem, cluster=_with_host_link(cluster))
    workload = problem.workload
    doubled = 2 * workload.global_batch_size
    yield "global batch ×2", replace(problem, workload=replace(workload, global_batch_size=doubled))


def _with_tier(cluster: Cluster, index: int, change: Callable[[Tier], Tier]) -> Cluster:
    """The cluster with one of its tiers changed, in its node groups and between them too."""
    name = cluster.tiers[index].name

    def changed(tiers: Iterable[Tier]) -> tuple[Tier, ...]:
        return tuple(change(tier) if tier.name == name else tier for tier in tiers)

    parts = tuple(replace(part, tiers=changed(part.tiers)) for part in cluster.parts)
    return replace(
        cluster, tiers=changed(cluster.tiers), parts=parts, links=tuple(map(changed, cluster.links))
    )


def _with_host_link(cluster: Cluster) -> Cluster:
    link = cluster.host_link_bytes_per_s * _MORE
    return replace(cluster, host_link_bytes_per_s=link, parts=tuple(map(_with_host_link, cluster.parts)))


def _faster_tier(tier: Tier) -> Tier:
    return replace(tier, bytes_per_s=tier.bytes_per_s * _MORE)


def _quicker_tier(tier: Tier) -> Tier:
    return replace(tier, latency_s=tier.latency_s / _MORE)


def _with_device(cluster: Cluster, change: Callable[[Device], Device]) -> Cluster:
    def changed(group: NodeGroup) -> NodeGroup:
        return replace(group, device=change(group.device))

    groups = tuple(changed(group) for group in cluster.groups)
    return replace(cluster, groups=groups, parts=tuple(_with_device(part, change) for part in cluster.parts))


def _faster_memory(device: Device) -> Device:
    return replace(device, memory_bytes_per_s=_more(device.memory_bytes_per_s))


def _larger_memory(device: Device) -> Device:
    return replace(device, memory_bytes=_more(device.memory_bytes))


def _higher_peak(device: Device) -> Device:
    peaks = {dtype: _more(rate) for dtype, rate in device.peak_flop_per_s.items()}
    return replace(device, peak_flop_per_s=peaks)


def _more(number: Sourced) -> Sourced:
    return replace(number, value=number.value * _MORE)
