"""What the devices of a plan hold, which of them is fullest, and whether everything fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from planner.engine.block_table import BlockTable
from planner.pipeline.composer import SLOWER, memory_parts
from planner.pipeline.layout import Layout
from planner.pipeline.place import Place
from planner.pipeline.transition import communicators
from planner.schedule.order import Generator
from planner.specs.problem import Problem

__all__ = ["DeviceMemory", "device_memory"]


class DeviceMemory(NamedTuple):
    """What the first device of each run of equal devices holds, and has room for.

    Attributes:
        devices: bytes by pool, per run.
        budgets: bytes, per run.
        cached: bytes that the allocator keeps though nothing lives in them, per run.
        slower: bytes per run in every tier of slower memory.
        slower_budgets: bytes per run that the tiers with a capacity have.
    """

    devices: Sequence[Mapping[str, float]]
    budgets: Sequence[float]
    cached: Sequence[float]
    slower: Mapping[str, Sequence[float]]
    slower_budgets: Sequence[Mapping[str, float]]

    @property
    def fullest(self) -> int:
        """The run with least room left."""
        return max(range(len(self.devices)), key=lambda run: self._used(run) - self.budgets[run])

    @property
    def peak_bytes(self) -> float:
        """Of the fullest run."""
        return self._used(self.fullest)

    @property
    def budget_bytes(self) -> float:
        """Of the fullest run."""
        return self.budgets[self.fullest]

    @property
    def cached_bytes(self) -> float:
        """What the allocator may keep beside the peak, on devices with the fullest one's budget."""
        alike = [run for run, budget in enumerate(self.budgets) if budget == self.budget_bytes]
        most = max(self._used(run) + self.cached[run] for run in alike)
        return max(min(most, self.budget_bytes) - self.peak_bytes, 0.0)

    @property
    def fits(self) -> bool:
        """Whether every run stays within its memory and within its tiers of slower memory."""
        return self.peak_bytes <= self.budget_bytes and all(
            self.slower[tier][run] <= capacity
            for run, capacities in enumerate(self.slower_budgets)
            for tier, capacity in capacities.items()
        )

    def kept_bytes(self, run: int) -> float:
        """What the allocator of a run keeps beside its peak, as far as there is room."""
        return max(min(self.cached[run], self.budgets[run] - self._used(run)), 0.0)

    def _used(self, run: int) -> float:
        return sum(self.devices[run].values())


def device_memory(
    problem: Problem, table: BlockTable, layout: Layout, order: Generator, micro_batches: int, recompute_layers: int | None,
    stage_places: Sequence[Sequence[Place]],
) -> DeviceMemory:  # fmt: skip
    """The memory of the first device of each run of equal devices."""
    homes = [stage_places[run][0].problem for run in layout.run_first]
    communicators_held = np.array([[communicators(stage_places[run])] for run in layout.run_first])
    counts = np.array([float(micro_batches)])
    pools = memory_parts(table, layout, order, counts, problem.stack, communicators_held, recompute_layers)
    slower = {tier: pools.pop(tier)[:, 0].tolist() for tier in SLOWER}
    cached = pools.pop("cached")[:, 0].tolist()
    devices = [
        {pool: float(held[run, 0]) for pool, held in pools.items() if held[run, 0]}
        for run in range(len(homes))
    ]
    budgets = [home.memory_budget_bytes for home in homes]
    return DeviceMemory(devices, budgets, cached, slower, [home.cluster.slower_bytes for home in homes])
