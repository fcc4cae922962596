"""All kinds of replicas on clusters of several types, row by row, and how long a request takes from one to another.

Every cluster has its kinds (layout, budget, formats) for both phases. A request goes from any prefill replica to any decode
replica over the slower cluster's network, as far as the cache's format, the engine and the devices allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.costs.serving import queue_load
from planner.engine.pricer import Pricer
from planner.ledger import Array
from planner.serving.candidates import Account
from planner.serving.pools import Decode, Index, Prefill, decode_kinds, prefill_kinds, transfer_s
from planner.serving.slots import MOST_LOAD
from planner.serving.space import ServeSpace, mesh_of
from planner.specs.serve_problem import ServeProblem

__all__ = ["Kinds", "parts_of"]

Flags = NDArray[np.bool_]


def parts_of(problem: ServeProblem) -> list[ServeProblem]:
    """The problem on every cluster alone."""
    return [replace(problem, cluster=cluster, others=()) for cluster in problem.clusters]


@dataclass(frozen=True, slots=True, eq=False)
class Kinds:
    """Kinds of both roles, recipe after recipe; ``i`` counts rows of prefill, ``j`` of decode replicas.

    Attributes:
        problem, parts, pricers: the problem, and it on every cluster alone.
        left, right: index of the cluster and rows of every recipe.
        first_s: (i, j) time to the first token without a wait.
        allowed: (i, j) whether the one may feed the other, and both find room.
    """

    problem: ServeProblem
    parts: list[ServeProblem]
    pricers: list[Pricer]
    left: list[tuple[int, Prefill]]
    right: list[tuple[int, Decode]]
    first_s: Array
    allowed: Flags

    @classmethod
    def of(cls, problem: ServeProblem, pricers: list[Pricer], account: Account) -> Kinds | None:
        """All kinds; None where a role has none."""
        parts = parts_of(problem)
        left = [
            (index, p)
            for index, (part, pricer) in enumerate(zip(parts, pricers, strict=True))
            for p in prefill_kinds(part, ServeSpace(part, "prefill"), pricer, account)
        ]
        right = [
            (index, d)
            for index, (part, pricer) in enumerate(zip(parts, pricers, strict=True))
            for d in decode_kinds(part, ServeSpace(part, "decode"), pricer, account)
        ]
        return cls._joined(problem, pricers, left, right) if left and right else None

    @classmethod
    def _joined(
        cls,
        problem: ServeProblem,
        pricers: list[Pricer],
        left: list[tuple[int, Prefill]],
        right: list[tuple[int, Decode]],
    ) -> Kinds:
        parts = parts_of(problem)
        first_s = np.block([[_first_s(parts, pricers, p, d) for d in right] for p in left])
        allowed = np.block([[_together(parts, p, d) for d in right] for p in left])
        return cls(problem, parts, pricers, left, right, first_s, allowed)

    def along(self, sender: int, receiver: int) -> Kinds | None:
        """Kinds of one cluster's prompts and of one's generation; None where a role has none there."""
        left, right = [p for p in self.left if p[0] == sender], [d for d in self.right if d[0] == receiver]
        return self._joined(self.problem, self.pricers, left, right) if left and right else None

    def within(self, problem: ServeProblem) -> Kinds:
        """The same with other limits, which decode replicas alone depend on."""
        parts = parts_of(problem)
        right = [
            (index, d)
            for index in sorted({index for index, _ in self.right})
            for d in decode_kinds(
                parts[index], ServeSpace(parts[index], "decode"), self.pricers[index], Account()
            )
        ]
        return replace(self, problem=problem, parts=parts, right=right)

    def rates(self) -> tuple[Array, Array]:
        """Requests per second of prefill beside decode replicas (i, j), and of decode replicas (j), as the limits allow."""
        traffic = self.problem.traffic
        pace_s = np.concatenate([p.pace_s for _, p in self.left])[:, None]
        batch_s = np.concatenate([p.pace_s * p.prompts for _, p in self.left])[:, None]
        room_s = (np.inf if traffic.ttft_s is None else traffic.ttft_s) - self.first_s
        quantile = None if traffic.percentile is None else traffic.percentile / 100.0
        load = np.asarray(queue_load(room_s, batch_s, quantile, MOST_LOAD))
        answers = [d.rate * np.where(d.binding == "memory", MOST_LOAD, 1.0) for _, d in self.right]
        return np.where(self.allowed, load / pace_s, 0.0), np.concatenate(answers)

    def without(self, left: Sequence[int], right: Sequence[int]) -> Kinds:
        """The same less some rows."""
        allowed = self.allowed.copy()
        allowed[list(left), :] = False
        allowed[:, list(right)] = False
        return replace(self, allowed=allowed)

    def prefill(self, i: int) -> tuple[int, Prefill, int]:
        """A row's cluster, its recipe's rows, and which of them it is."""
        at, row = _place([len(p.kind.rows) for _, p in self.left], i)
        return *self.left[at], row

    def decode(self, j: int) -> tuple[int, Decode, int]:
        """The same of a decode row."""
        at, row = _place([len(d.kind.rows) for _, d in self.right], j)
        return *self.right[at], row

    @property
    def places(self) -> tuple[Index, Index]:
        """Index of the cluster of all rows of either role."""
        left, right = (
            [np.full(len(rows.kind.rows), index) for index, rows in side] for side in (self.left, self.right)
        )
        return np.concatenate(left), np.concatenate(right)

    @property
    def sizes(self) -> tuple[Array, Array]:
        """Devices of a replica of all rows of either role."""
        left, right = ([rows.kind.size for _, rows in side] for side in (self.left, self.right))
        return np.concatenate(left), np.concatenate(right)


def _place(lengths: list[int], index: int) -> tuple[int, int]:
    ends = np.cumsum(lengths)
    at = int(np.searchsorted(ends, index, side="right"))
    return at, index - int(ends[at] - lengths[at])


def _first_s(
    parts: list[ServeProblem],
    pricers: list[Pricer],
    sender: tuple[int, Prefill],
    receiver: tuple[int, Decode],
) -> Array:
    """Seconds of a prompt's batch, of its cache's way over the slower network, and of its admission."""
    (a, p), (b, d) = sender, receiver
    software = pricers[a].stack.serving
    assert software is not None
    slower = min(parts[k].cluster.tiers[-1].effective_bytes_per_s for k in (a, b))
    way_s = transfer_s(p, d, slower, parts[a].model.n_layers)
    return np.asarray(p.batch_s[:, None] + way_s + float(software.admitted_s(parts[a].traffic.isl)))


def _together(parts: list[ServeProblem], sender: tuple[int, Prefill], receiver: tuple[int, Decode]) -> Flags:
    """Whether one may feed the other and both find room: the cache's format is one, and so says the engine."""
    (a, p), (b, d) = sender, receiver
    clusters, launcher = (parts[a].cluster, parts[b].cluster), parts[a].launcher
    taken = p.kind.size[:, None] + d.kind.size[None, :]
    fits = taken <= (clusters[0].devices if a == b else np.inf)
    alike = p.kind.recipe["cache"] == d.kind.recipe["cache"]
    if launcher is None or not alike:
        return np.asarray(fits & alike)
    rules = launcher.pairs(mesh_of(p.kind.rows[:, None, :]), mesh_of(d.kind.rows[None, :, :]))
    one_build = len({cluster.device.vendor for cluster in clusters}) == 1
    return np.asarray(
        np.logical_and.reduce([fits, *(np.broadcast_to(r.ok, fits.shape) for r in rules)]) & one_build
    )
