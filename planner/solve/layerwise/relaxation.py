"""What no layer-wise plan of a mesh is faster than, for thousands of meshes at once.

The memory of all devices of a pipeline is taken together, at a price ``λ`` per byte. For every ``λ ≥ 0``

    Σ over devices of m·T + update  ≥  Σ over layers of min_s (cost_s + λ·(held_s + w·saved_s)) − λ·Σ budgets

with ``w`` the micro-batches that a layer's stage has in flight (weak duality). Which stage a layer is on is open: layers fill the
stages with the fewest in flight first, as many to each as one could hold at all. The busiest device works at least the average.

Strategies that swap to the host have no tables yet. They are replaced by better ones, which cannot be: what is swapped costs
nothing but its way over the host link, beside all other work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from planner.ledger import Array
from planner.solve.branches import Branches
from planner.solve.layerwise.strategies import Totals
from planner.specs.cluster import Cluster

__all__ = ["Relaxation", "in_flight", "with_swaps"]

_PRICES = (0.0, 0.02, 0.1, 0.25, 0.5, 1.0, 2.0, 6.0)  # in seconds of a stage's work per byte of its budget
_SAMPLES = (0.0, 0.25, 0.5, 0.75, 1.0)  # micro-batches in flight at which minima are taken, of the most there are


def in_flight(pp: int, virtual_stages: int, micro_batches: float) -> Array:
    """Micro-batches in flight at a device's fullest moment, (virtual stages per device, devices), 1F1B or interleaved.

    Narayanan et al. 2021 (arXiv:2104.04473), section 2.2. Interleaved devices pass through several such moments: this is the
    one with the first chunk at its fullest and the others even, so that it is no more than the peak.
    """
    device = np.arange(pp)
    if virtual_stages == 1:
        return np.minimum(micro_batches, pp - device)[None].astype(float)
    extra = 2.0 * (pp - 1.0 - device) + 1.0
    chunks = np.full((virtual_stages, pp), float(pp))
    chunks[0] = np.maximum(extra, pp)
    chunks[-1] = np.minimum(extra, pp)
    return np.minimum(chunks, micro_batches)


def with_swaps(totals: Totals, choices: Branches, cluster: Cluster) -> tuple[Array, Array, Array]:
    """(seconds per micro-batch, serial seconds per step, held bytes, saved bytes) of all strategies, swaps under-estimated."""
    found: list[tuple[Array, Array, Array, Array]] = []
    link = max(cluster.host_link_bytes_per_s, 1.0)
    for swap in choices.swaps:
        on = {slot: choice.technique is not None for slot, choice in swap.items()}
        forward, backward, step = totals.forward_s, totals.backward_s, totals.step_s
        held, saved = totals.held_bytes, totals.saved_bytes
        if on.get("optimizer_offload"):
            held = held - totals.optimizer_bytes
        if on.get("parameter_offload"):
            held = held - (totals.held_bytes - totals.gradients_bytes - totals.optimizer_bytes)
        if on.get("activation_offload"):
            forward, backward = (np.maximum(x, saved / link) for x in (forward, backward))
            saved = np.zeros_like(saved)
        found.append((forward + backward, step, held, saved))
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
        self.layers, self.micro_batches, self.pp, self.budget = layers, micro_batches, pp, budget
        cost = micro_batches[:, None] * seconds + step
        # Without any limit of memory: the work of all devices.
        self.free_s = cost.min(axis=0) @ layers
        self.seconds = seconds.min(axis=0) @ layers
        most = np.maximum(2.0 * pp - 1.0, 1.0)
        self.weights = most * np.array(_SAMPLES)
        unit = self.free_s / pp / budget
        # (prices, samples, rows, kinds)
        self.prices = np.array(_PRICES)[:, None] * unit
        self.least = np.stack(
            [
                np.stack([(cost + price[:, None] * (held + growth * w * saved)).min(axis=0) for w in self.weights])
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
            here[-1] += self.layers[kind] - here.sum(axis=0)  # nothing is left out where stages could not hold all
            for number in range(len(self.weights)):
                together = np.where(sample == number, here, 0.0).sum(axis=0)
                total = total + together * self.least[:, number, :, kind]
        rows = np.arange(sample.shape[1])
        # The embedding's stage has most micro-batches in flight, the head's fewest.
        for end, stage in ((kinds, -1), (kinds + 1, 0)):
            total = total + self.layers[end] * self.least[:, sample[stage], rows, end]
        best: Array = total.max(axis=0)
        return best
