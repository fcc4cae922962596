"""What no layer-wise plan of a mesh is faster than, for thousands of meshes at once.

The memory of all devices of a pipeline is taken together, at a price ``λ`` per byte. For every ``λ ≥ 0``

    Σ over devices of m·T + update  ≥  Σ over layers of min_s (cost_s + λ·(held_s + w·saved_s)) − λ·Σ budgets

with ``w`` the micro-batches that a layer's stage has in flight (weak duality). Which stage a layer is on is open: layers fill the
stages with the fewest in flight first, as many to each as one could hold at all. The busiest device works at least the average.

Strategies that swap to the host have no tables yet. Better ones, which cannot be, stand for them: all that is swapped costs is
its way over the host link, beside all other work.
"""

from __future__ import annotations

import numpy as np

from planner.costs.overlap import pipelined_s
from planner.engine import BlockTable
from planner.layout import Layout
from planner.ledger import Array
from planner.solve.branches import Branches
from planner.solve.layerwise.strategies import Totals
from planner.specs.cluster import Cluster

__all__ = ["Relaxation", "in_flight", "path_factor", "with_swaps"]

_PRICES = (0.05, 0.15, 0.4, 1.0, 3.0)  # in seconds of a stage's work per byte of its budget
_SAMPLES = (0.0, 0.25, 0.5, 1.0)  # micro-batches in flight at which minima are taken, of the most there are


def in_flight(pp: int, virtual_stages: int, micro_batches: Array) -> Array:
    """Micro-batches in flight at a device's fullest moment, (virtual stages, rows), 1F1B or interleaved.

    Narayanan et al. 2021 (arXiv:2104.04473), section 2.2. Interleaved devices pass through several such moments: this is the
    one with the first chunk at its fullest and the others even, so that it is no more than the peak.
    """
    device = np.arange(pp)
    if virtual_stages == 1:
        flights = (pp - device)[None].astype(float)
    else:
        extra = 2.0 * (pp - 1.0 - device) + 1.0
        flights = np.full((virtual_stages, pp), float(pp))
        flights[0] = np.maximum(extra, pp)
        flights[-1] = np.minimum(extra, pp)
    held: Array = np.minimum(flights.reshape(-1, 1), micro_batches)
    return held


def path_factor(schedule: str, pp: int, micro_batches: Array) -> Array:
    """How many times the work of one micro-batch through all stages a step takes at least, whatever the cuts.

    With ``S`` that work and ``T_j`` a stage's part of it, the paths of 1F1B through stage ``j``
    (:mod:`planner.costs.pipeline_bounds`) take ``S + Σ_{l>j} T_l + (m − p + j)·T_j`` for ``j > p − m``, and all schedules wait
    at stage ``j`` for ``m − 1`` forwards or backwards, the longer of which is half of ``T_j`` or more: ``S + (m − 1)·T_j/2``.
    Equal stages minimise the largest of them for ``m > p``. Otherwise the first kind, at ``j = p − m + 1``, bounds ``Σ_{l≥j}
    T_l`` by what the step takes beyond ``S``, and the second the other stages. GPipe waits for ``m − 1`` forwards and as many
    backwards of its dearest stages.

    >>> path_factor("1f1b", 4, np.array([1.0, 8.0])).tolist()  # one micro-batch; (8 + 4 − 1)/4
    [1.0, 2.75]
    """
    m = np.asarray(micro_batches, dtype=float)
    even = 1.0 + (m - 1.0) / pp
    if schedule != "1f1b":
        return even
    waits, others = np.maximum(m - 1.0, 1.0), np.maximum(pp - m + 1.0, 0.0)
    few = 1.0 + 1.0 / (1.0 + 2.0 * others / waits)
    return np.where(m > pp, even, np.where(m > 1.0, few, 1.0))


def with_swaps(
    totals: Totals, alone: BlockTable, choices: Branches, cluster: Cluster, contention: float
) -> tuple[Array, Array, Array, Array]:
    """(seconds per micro-batch, serial seconds per step, held bytes, saved bytes) of all strategies, swaps under-estimated.

    A pool that a swap moves holds nothing, and costs nothing unless it is known how. Weights come up over the host link in the
    forward and in the backward pass, saved activations go down in the one and come up in the other, beside a block's own work
    of that phase. The host reads the optimizer's states at least once, and a quarter of their bytes (16-bit gradients down,
    weights up, of at most 16 bytes per parameter) passes the link.

    Args:
        totals: strategies without swaps.
        alone: the prefix's table: what a block works in any case, and its weights before anything is sharded.
        contention: slowdown of two streams that run side by side.
    """
    link, host = max(cluster.host_link_bytes_per_s, 1.0), max(cluster.host_memory_bytes_per_s, 1.0)
    beside = totals.held_bytes - totals.gradients_bytes - totals.optimizer_bytes
    own, forward, backward = (alone[name][:-1].T for name in ("parameters_bytes", "forward_s", "backward_s"))
    weights = np.minimum(beside, own)
    found: list[tuple[Array, Array, Array, Array]] = []
    for swap in choices.swaps:
        on = {slot: choice.value == "cpu" for slot, choice in swap.items()}
        pools = {pool for choice in swap.values() if choice.technique for pool in choice.technique.moves}
        step, held, saved, moved = totals.step_s, totals.held_bytes, totals.saved_bytes, np.zeros(1)
        if "optimizer" in pools:
            held = held - totals.optimizer_bytes
            step = totals.optimizer_bytes * (1.0 / host + 0.25 / link) * on["optimizer_offload"]
        if "gradients" in pools:
            held = held - totals.gradients_bytes
        if swap["parameter_offload"].technique is not None:
            held, moved = held - weights, moved + weights * on["parameter_offload"]
        if swap["activation_offload"].technique is not None:
            moved, saved = moved + saved * on["activation_offload"], np.zeros_like(saved)
        seconds = totals.forward_s + totals.backward_s
        if moved.any():
            seconds = np.maximum(totals.forward_s, pipelined_s([forward, moved / link], np.inf, contention))
            seconds = seconds + np.maximum(
                totals.backward_s, pipelined_s([backward, moved / link], np.inf, contention)
            )
        found.append((seconds + totals.rest_s, step, held, saved))
    seconds, step, held, saved = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return seconds, step, held, saved


class Relaxation:
    """Bounds of rows that share a pipeline degree and a number of micro-batches.

    Args:
        seconds, step, held, saved: of :func:`with_swaps`, on these rows.
        layers: of each kind; the last two kinds are embedding and head.
        micro_batches: per row.
        pp: pipeline degree.
        budget: bytes of a device for what is held and saved, the stack's own taken off, per row.
        growth: what allocators make of saved bytes.
    """

    def __init__(
        self, seconds: Array, step: Array, held: Array, saved: Array, *, layers: Array, micro_batches: Array, pp: int,
        budget: Array, growth: float,
    ) -> None:  # fmt: skip
        self.layers, self.pp, self.budget = layers, pp, budget
        cost = micro_batches[:, None] * seconds + step
        self.weights = max(2.0 * pp - 1.0, 1.0) * np.array(_SAMPLES)
        # (prices, samples, rows, kinds)
        self.prices = np.array(_PRICES)[:, None] * (cost.min(axis=0) @ layers / pp / budget)
        self.least = np.stack(
            [
                np.stack(
                    [(cost + price[:, None] * (held + growth * w * saved)).min(axis=0) for w in self.weights]
                )
                for price in self.prices
            ]
        )

    def work_s(self, flights: Array, most: Array) -> Array:
        """What all devices work together at least, per row.

        Args:
            flights: (stages, rows) micro-batches in flight.
            most: (rows) layers that one stage holds at most.
        """
        kinds = len(self.layers) - 2
        sample = np.searchsorted(self.weights, np.sort(flights, axis=0), side="right") - 1
        filled = np.arange(len(sample))[:, None] * most
        total = -self.pp * self.prices * self.budget
        for kind in range(kinds):
            here = np.clip(self.layers[kind] - filled, 0.0, most)
            here[-1] += self.layers[kind] - here.sum(
                axis=0
            )  # nothing is left out where stages could not hold all
            for number in range(len(self.weights)):
                together = np.where(sample == number, here, 0.0).sum(axis=0)
                total = total + together * self.least[:, number, :, kind]
        rows = np.arange(sample.shape[1])
        # The embedding's stage has most micro-batches in flight, the head's fewest.
        for end, stage in ((kinds, -1), (kinds + 1, 0)):
            total = total + self.layers[end] * self.least[:, sample[stage], rows, end]
        best: Array = total.max(axis=0)
        return best

    def dearest_s(self, layout: Layout, flights: Array, alone: BlockTable) -> Array:
        """What the device that ends last takes at least under a layout, the wait for its first micro-batch included, per row."""
        sample = np.searchsorted(self.weights, flights, side="right") - 1
        rows = np.arange(sample.shape[1])
        forward_s = alone["forward_s"]
        ahead_s = np.zeros(sample.shape[1])
        best = np.zeros(sample.shape[1])
        for device in range(layout.pp):
            counts: Array = layout.chunks[:, device, :-1]
            total = -self.prices * self.budget
            for chunk in range(layout.virtual_stages):
                least = self.least[:, sample[chunk * layout.pp + device], rows]
                total = total + least @ counts[chunk]
            best = np.maximum(best, ahead_s + total.max(axis=0))
            ahead_s = ahead_s + layout.chunks[0, device] @ forward_s
        return best
