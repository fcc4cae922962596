"""A planning problem: what to train, on which machines, under which limits, with which choices already made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from planner.specs.cluster import Cluster
from planner.specs.model import Model
from planner.specs.stack import Stack
from planner.specs.workload import TrainWorkload

if TYPE_CHECKING:
    from planner.technique import Launcher

__all__ = ["OBJECTIVES", "Problem"]

OBJECTIVES = ("step_time", "usd", "energy", "devices")


@dataclass(frozen=True, slots=True)
class Problem:
    """One training problem.

    Attributes:
        model, cluster, workload, stack: the specifications.
        fixed: knob → value that every plan must have.
        forbidden: globs over ``knob=value`` and over values, none of which a plan may match.
        reserve: fraction of device memory that stays free.
        launcher: the launcher whose abilities bound the space; None for no such bound.
        objective: what the ranking minimises.
        usd_per_device_hour: price; None takes the device profile's.
        deadline_s: the run (``workload.tokens``) must end in this time.
    """

    model: Model
    cluster: Cluster
    workload: TrainWorkload
    stack: Stack
    fixed: Mapping[str, Any] = field(default_factory=dict)
    forbidden: tuple[str, ...] = ()
    reserve: float = 0.0
    launcher: Launcher | None = None
    objective: str = "step_time"
    usd_per_device_hour: float | None = None
    deadline_s: float | None = None

    @property
    def memory_budget_bytes(self) -> float:
        """Bytes per device that a plan may use."""
        return float(self.cluster.device.memory_bytes) * (1.0 - self.reserve)
