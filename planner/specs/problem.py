"""A planning problem: what to train, on which machines, under which limits, with which choices already made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from planner.errors import Problem as Fault
from planner.errors import SpecError, did_you_mean
from planner.specs.cluster import Cluster
from planner.specs.model import Model
from planner.specs.stack import Stack
from planner.specs.workload import TrainWorkload

if TYPE_CHECKING:
    from planner.technique import Launcher

__all__ = ["MAX_OOM_RISK", "OBJECTIVES", "PERMISSIONS", "Problem"]

PERMISSIONS = {
    "staleness": "replicas that disagree for a while, or updates from gradients of earlier weights",
    "lossy": "gradients, weights or activations that arrive with fewer digits than they were computed with",
}
"""What changes the result of training, and is therefore never chosen without being allowed."""

MAX_OOM_RISK = 0.1
"""By default, the upper end of the interval of a peak, which one measurement of ten exceeds, is within the device's memory."""

OBJECTIVES = ("step_time", "usd", "energy", "gpu_hours")


@dataclass(frozen=True, slots=True)
class Problem:
    """One training problem.

    Attributes:
        model, cluster, workload, stack: the specifications.
        fixed: knob → value that every plan must have.
        forbidden: globs over ``knob=value`` and over values, none of which a plan may match.
        reserve: fraction of device memory that stays free.
        max_oom_risk: the largest chance of running out of memory that a search accepts where any plan keeps it.
        launcher: the launcher whose abilities bound the space; None for no such bound.
        objective: what the ranking minimises.
        usd_per_device_hour: price; None takes the device profile's.
        allowed: keys of :data:`PERMISSIONS`: what plans may do that changes the result of training.
        explore: globs over ``slot=choice`` and over techniques: choices to search that hardly ever win and are left aside
            otherwise; ``all`` is every one of them.
        pue: energy at the meter over that of the devices, the data centre's power usage effectiveness.
        kg_per_kwh: kilograms of CO₂-equivalent per kilowatt-hour of its electricity; None leaves emissions out.
        deadline_s: the run (``workload.tokens``) must end in this time.
        layerwise: strategies of the layers of the plan that is named, as :class:`~planner.plans.plan.Plan` has them; None
            where all layers are treated alike, and for a search.

    Raises:
        SpecError: a limit is out of range, or two of them do not go together (all problems at once).
    """

    model: Model
    cluster: Cluster
    workload: TrainWorkload
    stack: Stack
    fixed: Mapping[str, Any] = field(default_factory=dict)
    forbidden: tuple[str, ...] = ()
    reserve: float = 0.0
    max_oom_risk: float = MAX_OOM_RISK
    launcher: Launcher | None = None
    objective: str = "step_time"
    usd_per_device_hour: float | None = None
    pue: float = 1.0
    kg_per_kwh: float | None = None
    deadline_s: float | None = None
    allowed: tuple[str, ...] = ()
    explore: tuple[str, ...] = ()
    layerwise: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise SpecError(faults)

    def _faults(self) -> Iterator[Fault]:
        if not 0.0 <= self.reserve < 1.0:
            yield Fault("reserve", f"{self.reserve:g} of device memory", "a fraction from 0 to less than 1")
        if not 0.0 < self.max_oom_risk <= 1.0:
            yield Fault("max_oom_risk", f"{self.max_oom_risk:g}", "a chance above 0, at most 1")
        if self.objective not in OBJECTIVES:
            expected = f"one of {', '.join(OBJECTIVES)}"
            yield Fault(
                "objective", repr(self.objective), expected, did_you_mean(str(self.objective), OBJECTIVES)
            )
        for name in self.allowed:
            if name not in PERMISSIONS:
                expected = f"one of {', '.join(PERMISSIONS)}"
                yield Fault("allowed", repr(name), expected, did_you_mean(name, tuple(PERMISSIONS)))
        price = self.usd_per_device_hour
        if price is not None and not (math.isfinite(price) and 0.0 < price <= 1e6):
            yield Fault("usd_per_device_hour", f"{price:g}", "a price above 0, at most 1e6")
        if self.objective == "usd" and price is None and self.cluster.device.usd_per_hour is None:
            found = f"{self.cluster.name} has no price"
            yield Fault("objective", found, "a price per device and hour", "Give one with --usd-per-hour.")
        if not 1.0 <= self.pue <= 10.0:
            yield Fault("pue", f"{self.pue:g}", "a power usage effectiveness from 1 to 10")
        if self.kg_per_kwh is not None and not 0.0 <= self.kg_per_kwh <= 10.0:
            yield Fault("kg_per_kwh", f"{self.kg_per_kwh:g}", "kilograms from 0 to 10, such as 0.385")
        if self.deadline_s is not None:
            if not (math.isfinite(self.deadline_s) and self.deadline_s > 0.0):
                yield Fault("deadline_s", f"{self.deadline_s:g}", "a duration above 0")
            if self.workload.tokens is None:
                yield Fault(
                    "deadline_s", "the length of the run is not given", "tokens", "Give it with --tokens."
                )

    @property
    def memory_budget_bytes(self) -> float:
        """Bytes per device that a plan may use."""
        return float(self.cluster.device.memory_bytes) * (1.0 - self.reserve)
