"""Alpa's inter-operator problem: stages × sub-meshes that minimise ``Σ t_i + (B − 1)·max t_i``, exactly.

``cost[i, j, n]`` is a stage of layers ``i … j`` on the n-th sub-mesh (Zheng et al., OSDI 2022, arXiv:2201.12023, section 5.2).
A dynamic program finds the least sum under a limit on the largest stage. Alpa tries every stage's cost as the limit
(:func:`enumerated`, kept as a reference for tests and benchmarks). :func:`descended` solves without a limit first, then below
the largest stage that came out, and so on. Nothing is skipped between two limits: the optimum for a limit is also that for
every limit down to its own largest stage. Sums only grow as the limit falls, so that it ends with the first that alone is no
better than the best so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.ledger import Array

__all__ = ["Stages", "descended", "enumerated"]


@dataclass(frozen=True, slots=True)
class Stages:
    """A partition: ``(first layer, end, sub-mesh)`` of every stage, its objective, and how many limits were tried."""

    seconds: float
    stages: tuple[tuple[int, int, int], ...]
    limits: int


def descended(cost: Array, devices: Sequence[int], total: int, micro_batches: int) -> Stages | None:
    """The best partition, by limits that descend from the largest stage of the one before.

    Args:
        cost: (layers, layers, sub-meshes) seconds of layers i … j, infinite where they do not fit.
        devices: of each sub-mesh.
        total: devices to be used, all of them.
        micro_batches: B.

    >>> cost = np.array([[[4.0], [8.0]], [[np.inf], [4.0]]])  # two layers of 4 s, on one device each
    >>> descended(cost, [1], 2, 8).seconds  # 4 + 4 + 7·4
    36.0
    """
    program = _Program(cost, devices, total)
    best: Stages | None = None
    limit, tried = np.inf, 0
    while True:
        found = program.solve(limit)
        tried += 1
        if found is None or (best is not None and found[0] >= best.seconds):
            break
        total_s, stages = found
        largest = max(float(cost[i, j - 1, n]) for i, j, n in stages)
        seconds = total_s + (micro_batches - 1) * largest
        if best is None or seconds < best.seconds:
            best = Stages(seconds, stages, tried)
        limit = float(np.nextafter(largest, 0.0))
    return best if best is None else Stages(best.seconds, best.stages, tried)


def enumerated(cost: Array, devices: Sequence[int], total: int, micro_batches: int) -> Stages | None:
    """The same by Alpa's enumeration: every distinct stage cost as the limit, ascending, ended where it alone exceeds the best.

    Its dynamic program knows the number of stages left, ``F(s, k, d)``.
    """
    program = _Program(cost, devices, total)
    best: Stages | None = None
    tried = 0
    for limit in np.unique(cost[np.isfinite(cost)]).tolist():
        if best is not None and micro_batches * limit >= best.seconds:
            break
        found = program.solve_by_count(limit)
        tried += 1
        if found is None:
            continue
        seconds = found[0] + (micro_batches - 1) * limit
        if best is None or seconds < best.seconds:
            best = Stages(seconds, found[1], tried)
    return best if best is None else Stages(best.seconds, best.stages, tried)


class _Program:
    """``F(k, d)``: the least sum of stages that hold the layers from ``k`` on and use ``d`` devices, each within a limit."""

    def __init__(self, cost: Array, devices: Sequence[int], total: int) -> None:
        self.cost, self.devices, self.total = cost, list(devices), total

    def solve(self, limit: float) -> tuple[float, tuple[tuple[int, int, int], ...]] | None:
        """The least sum under a limit, and its stages; None where there is none."""
        layers = len(self.cost)
        allowed = np.where(self.cost <= limit, self.cost, np.inf)
        least = np.full((layers + 1, self.total + 1), np.inf)
        least[layers, 0] = 0.0
        choice = np.zeros((layers, self.total + 1, 2), dtype=np.int32)
        for k in range(layers - 1, -1, -1):
            for n, used in enumerate(self.devices):
                if used > self.total:
                    continue
                # (ends, devices left): this stage and the best of what is behind it
                sums = allowed[k, k:, n][:, None] + least[k + 1 :, : self.total + 1 - used]
                at = sums.argmin(axis=0)
                values = sums[at, np.arange(len(at))]
                better = values < least[k, used:]
                least[k, used:][better] = values[better]
                choice[k, used:][better] = np.stack([k + 1 + at, np.full(len(at), n)], axis=1)[better]
        if not np.isfinite(least[0, self.total]):
            return None
        stages, k, left = [], 0, self.total
        while k < layers:
            end, n = (int(x) for x in choice[k, left])
            stages.append((k, end, n))
            left -= self.devices[n]
            k = end
        return float(least[0, self.total]), tuple(stages)

    def solve_by_count(self, limit: float) -> tuple[float, tuple[tuple[int, int, int], ...]] | None:
        """The same, stage count by stage count, as Alpa has it."""
        layers = len(self.cost)
        allowed = np.where(self.cost <= limit, self.cost, np.inf)
        least = np.full((layers + 1, layers + 1, self.total + 1), np.inf)
        least[0, layers, 0] = 0.0
        choice = np.zeros((layers + 1, layers, self.total + 1, 2), dtype=np.int32)
        for s in range(1, layers + 1):
            for k in range(layers - 1, -1, -1):
                for n, used in enumerate(self.devices):
                    if used > self.total:
                        continue
                    sums = allowed[k, k:, n][:, None] + least[s - 1, k + 1 :, : self.total + 1 - used]
                    at = sums.argmin(axis=0)
                    values = sums[at, np.arange(len(at))]
                    better = values < least[s, k, used:]
                    least[s, k, used:][better] = values[better]
                    choice[s, k, used:][better] = np.stack([k + 1 + at, np.full(len(at), n)], axis=1)[better]
        s = int(least[:, 0, self.total].argmin())
        if not np.isfinite(least[s, 0, self.total]):
            return None
        stages, k, left = [], 0, self.total
        for count in range(s, 0, -1):
            end, n = (int(x) for x in choice[count, k, left])
            stages.append((k, end, n))
            left -= self.devices[n]
            k = end
        return float(least[s, 0, self.total]), tuple(stages)
