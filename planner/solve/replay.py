"""A stored plan as the problem that names it, so that it can be priced again."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from planner.errors import Problem as Fault
from planner.errors import SpecError
from planner.plans.plan import Plan
from planner.specs.cluster import Cluster
from planner.specs.cluster_file import load_cluster
from planner.specs.models import load_model
from planner.specs.problem import Problem
from planner.specs.stack import load_stack
from planner.specs.workload import TrainWorkload

__all__ = ["replay"]


def replay(plan: Plan) -> Problem:
    """The problem whose only plan is this one; model, cluster and stack are loaded anew by name.

    The memory budget and the price are read off the plan's estimate.

    Raises:
        SpecError: the plan names something that is not there (any more), or holds values that cannot be.
    """
    known = {field.name for field in fields(TrainWorkload)}
    values: dict[str, Any] = {name: value for name, value in plan.workload.items() if name in known}
    try:
        workload = TrainWorkload(**{**values, "precisions": tuple(values["precisions"])})
    except (TypeError, KeyError) as error:
        raise SpecError(Fault(f"plan {plan.id}: workload", f"is incomplete ({error})", "a job")) from None
    model, cluster = load_model(plan.model), load_cluster(plan.cluster)
    if cluster.devices != plan.devices:
        found = f"{plan.devices} devices in the plan, {cluster.devices} in {plan.cluster}"
        raise SpecError(
            Fault(f"plan {plan.id}: mesh", found, "degrees whose product is the number of devices")
        )
    estimate = plan.estimate
    hours = estimate.step_time_s * plan.devices / 3600.0
    return Problem(
        replace(model, name=plan.model),
        replace(cluster, name=plan.cluster),
        workload,
        replace(load_stack(plan.stack), name=plan.stack),
        fixed=_choices(plan),
        reserve=_reserve(plan, cluster),
        allowed=plan.permissions,
        usd_per_device_hour=None if estimate.usd_per_step is None else estimate.usd_per_step / hours,
        layerwise=plan.layerwise,
    )


def _reserve(plan: Plan, cluster: Cluster) -> float:
    """The fraction of device memory that was to stay free."""
    budget, device = plan.estimate.memory_budget_bytes, cluster.device
    if plan.places:
        budget = plan.places[0]["memory_budget_bytes"]
        device = cluster.groups[plan.places[0]["group"]].device
    return max(0.0, 1.0 - budget / float(device.memory_bytes))


def _choices(plan: Plan) -> dict[str, str]:
    """The plan's knobs; the layout of one that says where every layer is follows from that."""
    values = {**plan.mesh, **plan.knobs}
    if plan.layerwise is not None:
        del values["pipeline_layout"]
    return {name: str(value).lower() for name, value in values.items()}
