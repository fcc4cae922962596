"""What no layer-wise plan of a mesh is faster than, for thousands of meshes at once.

The memory of all devices of a pipeline is taken together, at a price ``λ`` per byte. For every ``λ ≥ 0``

    Σ over devices of m·T + update  ≥  Σ over layers of min_s (cost_s + λ·(held_s + w·saved_s)) − λ·Σ budgets

with ``w`` the micro-batches that a layer's stage has in flight (weak duality). Which stage a layer is on is open: layers fill the
stages with the fewest in flight first, as many to each as one could hold at all. The busiest device works at least the average.

Strategies that have no tables yet stand there with what their parts say of them, which is no more than they take.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.engine import BlockTable
from planner.layout import Layout
from planner.ledger import Array

__all__ = ["AtPrices", "Relaxation", "in_flight", "path_factor"]

_PRICES = (0.0, 0.02, 0.06, 0.15, 0.3, 0.6, 1.2, 20.0)  # in seconds of a stage's work per byte of its budget
_AROUND = (
    0.5,
    1.0,
    2.0,
    4.0,
)  # times a price that bounds well by itself, where the host's bytes have one beside it
_HOST_PRICES = (0.1, 0.3, 0.6, 1.0)  # of a byte on the host, of that on the device
_SAMPLES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)  # micro-batches in flight at which minima are taken, per stage


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


class AtPrices(NamedTuple):
    """The least of one block under any strategy.

    Attributes:
        prices: of a byte on the device and on the host, (2, prices, rows).
        work_s: its work in a step with its bytes at their prices, (prices, samples, rows, kinds).
        at_work: bytes while it is at work, (rows, kinds).
        step_s: serial seconds of a step, (rows, kinds).
    """

    prices: Array
    work_s: Array
    at_work: Array
    step_s: Array


@dataclass(frozen=True, slots=True, eq=False)
class Relaxation:
    """Bounds of rows that share a pipeline degree.

    Attributes:
        blocks: of :meth:`~planner.solve.layerwise.strategies.Strategies.blocks`, on these rows.
        layers: of each kind; the last two kinds are embedding and head.
        micro_batches: per row.
        pp: pipeline degree.
        budget: bytes of a device for what is held and saved, the stack's own taken off, per row.
        growth: what allocators make of saved bytes.
        host_bytes: of a device's share of the host.
        centre: price of a byte that bounds well, per row, where one is known.
    """

    blocks: Array
    layers: Array
    micro_batches: Array
    pp: int
    budget: Array
    growth: float
    host_bytes: float
    centre: Array | None = None

    def take(self, index: NDArray[np.intp]) -> Relaxation:
        """Of some of the rows."""
        centre = None if self.centre is None else self.centre[index]
        return replace(
            self, blocks=self.blocks.take(index, axis=2), micro_batches=self.micro_batches[index], budget=self.budget[index],
            centre=centre,
        )  # fmt: skip

    @property
    def seconds(self) -> Array:
        """Of a micro-batch, (strategies, rows, kinds)."""
        seconds: Array = self.blocks[0]
        return seconds

    @property
    def step(self) -> Array:
        """Serial seconds of a step, (strategies, rows, kinds)."""
        step: Array = self.blocks[1]
        return step

    @property
    def fastest_s(self) -> Array:
        """One micro-batch through all layers, each under its fastest strategy, per row."""
        fastest: Array = self.seconds.min(axis=0) @ self.layers
        return fastest

    @property
    def hosts(self) -> bool:
        """Whether some strategies keep bytes on the host."""
        return bool(self.blocks[5:].any())

    def pooled(self, flights: Array, most: Array) -> tuple[Array, Relaxation]:
        """:meth:`work_s`, with the host's bytes at prices too; and the same bounds around the prices that prove most.

        Args: as there.
        """
        total, prices = self._work(flights, most)
        if not self.hosts:
            return total.max(axis=0), self
        rows = np.arange(total.shape[1])
        centre = np.maximum(prices[0][total.argmax(axis=0), rows], prices[0][1])
        around = replace(self, centre=centre)
        return np.maximum(total.max(axis=0), around.work_s(flights, most)), around

    def work_s(self, flights: Array, most: Array) -> Array:
        """What all devices work together at least, per row.

        Args:
            flights: (stages, rows) micro-batches in flight.
            most: (rows) layers that one stage holds at most.
        """
        best: Array = self._work(flights, most)[0].max(axis=0)
        return best

    def _work(self, flights: Array, most: Array) -> tuple[Array, Array]:
        """The same at each of the prices, (prices, rows), and these."""
        kinds = len(self.layers) - 2
        prices, samples = self._prices(), self._samples()
        priced = self._least(self.micro_batches[:, None] * self.seconds + self.step, prices, samples)
        sample = np.searchsorted(samples, np.sort(flights, axis=0), side="right") - 1
        filled = np.arange(len(sample))[:, None] * most
        # Blocks at work: the embedding's stage and the head's may have no layers, and all others have.
        smallest = self.blocks[4].min(axis=0)
        least = smallest[:, :kinds].min(axis=1)
        at_work = smallest[:, kinds:].sum(axis=1) if self.pp > 1 else smallest.max(axis=1)
        room = self.pp * self.budget - self.growth * (at_work + max(self.pp - 2, 0) * least)
        total = -prices[0] * room - prices[1] * self.pp * self.host_bytes
        for kind in range(kinds):
            here = np.clip(self.layers[kind] - filled, 0.0, most)
            # Nothing is left out where stages could not hold all.
            here[-1] += self.layers[kind] - here.sum(axis=0)
            for number in range(len(samples)):
                together = np.where(sample == number, here, 0.0).sum(axis=0)
                total = total + together * priced[:, number, :, kind]
        rows = np.arange(sample.shape[1])
        # The embedding's stage has most micro-batches in flight, the head's fewest.
        for end, stage in ((kinds, -1), (kinds + 1, 0)):
            total = total + self.layers[end] * priced[:, sample[stage], rows, end]
        return total, prices

    def at_prices(self) -> AtPrices:
        """What layouts have in common: the least of one block under any strategy."""
        prices, work = self._prices(), self.micro_batches[:, None] * self.seconds
        least = self._least(work, prices, self._samples())
        return AtPrices(prices, least, self.blocks[4].min(axis=0), self.step.min(axis=0))

    def dearest_s(
        self, priced: AtPrices, rows: NDArray[np.intp], layout: Layout, flights: Array, alone: BlockTable
    ) -> Array:  # fmt: skip
        """What a layout's dearest device takes at least, per row: with the wait for the first micro-batch before its work and for
        the last one after it, when the first device updates.

        Args:
            priced: :meth:`at_prices`.
            rows: which.
            flights: (virtual stages, rows) micro-batches in flight.
            alone: the rows' tables without strategies.
        """
        (prices, of_host), least = priced.prices[:, :, rows], priced.work_s[:, :, rows]
        samples, counts = self._samples(), layout.chunks[:, :, :-1]
        sample = (np.searchsorted(samples, flights, side="right") - 1).reshape(*counts.shape[:2], len(rows))
        # Blocks by micro-batches in flight: (samples, devices, rows, kinds); seconds at prices: (prices, devices, rows).
        live = np.stack(
            [np.einsum("vdr,vdk->drk", (sample == n).astype(float), counts) for n in range(len(samples))]
        )
        work_s = np.einsum("pnrk,ndrk->pdr", least, live)
        there = layout.device_counts[:, :-1] > 0
        at_work = np.where(there[:, None], priced.at_work[rows], -np.inf).max(axis=2)
        room = prices[:, None] * (self.budget[rows] - self.growth * at_work)
        total = work_s - room - of_host[:, None] * self.host_bytes
        once = layout.chunks[0, :, :-1] @ (alone["forward_s"] + alone["backward_s"] + alone["weight_s"])[:-1]
        waits_s = np.concatenate([np.zeros((1, len(rows))), np.cumsum(once[:-1], axis=0)])
        waits_s = waits_s + priced.step_s[rows] @ layout.device_counts[0, :-1]
        best: Array = (waits_s + total.max(axis=0)).max(axis=0)
        return best

    def _samples(self) -> Array:
        """Micro-batches in flight at which minima are taken; in between, those of the next fewer."""
        return np.unique(np.clip(np.ceil(self.pp * np.array(_SAMPLES)), 1.0, max(2.0 * self.pp - 1.0, 1.0)))

    def _prices(self) -> Array:
        """Of a byte on the device and on the host, (2, prices, rows)."""
        cost = self.micro_batches[:, None] * self.seconds + self.step
        device = np.array(_PRICES)[:, None] * (cost.min(axis=0) @ self.layers / self.pp / self.budget)
        alone = np.stack([device, np.zeros_like(device)])
        if self.centre is None:
            return alone
        near = np.repeat(np.array(_AROUND), len(_HOST_PRICES))[:, None] * self.centre
        return np.concatenate(
            [alone, np.stack([near, near * np.tile(_HOST_PRICES, len(_AROUND))[:, None]])], axis=1
        )

    def _least(self, cost: Array, prices: Array, samples: Array) -> Array:
        """The smallest cost with memory at a price, (prices, samples, rows, kinds)."""
        found = np.empty((prices.shape[1], len(samples), *cost.shape[1:]))
        priced, both, hosts = np.empty_like(cost), np.empty_like(cost), self.hosts
        for number, flights in enumerate(samples):
            held = self.blocks[2] + self.growth * flights * self.blocks[3]
            away = self.blocks[5] + flights * self.blocks[6] if hosts else None
            last: Array | None = None
            for at, (device, host) in enumerate(prices.transpose(1, 0, 2)):
                if last is None or not np.array_equal(device, last):  # several prices on the host share one
                    np.multiply(device[:, None], held, out=priced)
                    priced += cost
                    last = device
                if away is None or not host.any():
                    priced.min(axis=0, out=found[at, number])
                    continue
                np.multiply(host[:, None], away, out=both)
                both += priced
                both.min(axis=0, out=found[at, number])
        return found
