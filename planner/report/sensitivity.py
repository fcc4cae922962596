"""What a little more of something would buy: the same plan, priced on hardware or a batch that is changed a little."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from planner.errors import PlannerError
from planner.plan import Plan
from planner.solve.train import estimate
from planner.specs.cluster import Cluster, NodeGroup, Tier
from planner.specs.device import Device, Sourced
from planner.specs.problem import Problem

__all__ = ["sensitivities"]

_MORE = 1.1


def sensitivities(problem: Problem, plan: Plan) -> list[dict[str, Any]]:
    """The plan with each network tier, memory bandwidth, matrix peak and host link 10 % faster, and with twice the batch.

    ``gain`` is the relative growth of tokens per second; entries are ordered by it.
    """
    found = []
    for what, changed in _changes(problem):
        try:
            new = estimate(changed).estimate
        except PlannerError:  # the changed job breaks a rule, so it buys nothing
            continue
        gain = new.tokens_per_s_per_device / plan.estimate.tokens_per_s_per_device - 1.0
        found.append({"what": what, "step_time_s": new.step_time_s, "gain": gain, "fits": new.fits})
    return sorted(found, key=lambda entry: -entry["gain"])


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
    link = cluster.host_link_bytes_per_s * _MORE
    yield "host link +10 %", replace(problem, cluster=replace(cluster, host_link_bytes_per_s=link))
    workload = problem.workload
    doubled = 2 * workload.global_batch_size
    yield "global batch ×2", replace(problem, workload=replace(workload, global_batch_size=doubled))


def _with_tier(cluster: Cluster, index: int, change: Callable[[Tier], Tier]) -> Cluster:
    tiers = tuple(change(tier) if i == index else tier for i, tier in enumerate(cluster.tiers))
    return replace(cluster, tiers=tiers)


def _faster_tier(tier: Tier) -> Tier:
    return replace(tier, bytes_per_s=tier.bytes_per_s * _MORE)


def _quicker_tier(tier: Tier) -> Tier:
    return replace(tier, latency_s=tier.latency_s / _MORE)


def _with_device(cluster: Cluster, change: Callable[[Device], Device]) -> Cluster:
    def changed(group: NodeGroup) -> NodeGroup:
        return replace(group, device=change(group.device))

    return replace(cluster, groups=tuple(changed(group) for group in cluster.groups))


def _faster_memory(device: Device) -> Device:
    return replace(device, memory_bytes_per_s=_more(device.memory_bytes_per_s))


def _higher_peak(device: Device) -> Device:
    peaks = {dtype: _more(rate) for dtype, rate in device.peak_flop_per_s.items()}
    return replace(device, peak_flop_per_s=peaks)


def _more(number: Sourced) -> Sourced:
    return replace(number, value=number.value * _MORE)
