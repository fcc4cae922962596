"""What no layer-wise plan of a mesh is faster than, for thousands of meshes at once.

The memory of all devices of a pipeline is taken together, at a price ``λ`` per byte. For every ``λ ≥ 0``

    Σ over devices of m·T + update  ≥  Σ over layers of min_s (cost_s + λ·(held_s + w·saved_s)) − λ·Σ budgets

with ``w`` the micro-batches that a layer's stage has in flight (weak duality). Which stage a layer is on is open: layers fill the
stages with the fewest in flight first, as many to each as one could hold at all. The busiest device works at least the average.

Strategies that have no tables yet stand there with what their parts say of them, which is no more than they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.costs.arrays import distinct
from planner.engine.block_table import BlockTable
from planner.ledger import Array
from planner.pipeline.layout import Layout

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
    """The least of one block under any strategy, and what bounds layouts by it.

    Attributes:
        prices: of a byte on the device and on the host, (2, prices, rows).
        work_s: its work in a step with its bytes at their prices, (prices, samples, rows, kinds).
        at_work: bytes while it is at work that have no part in that, (rows, kinds).
        step_s: serial seconds of a step, (rows, kinds).
        budget: bytes of a device, (rows).
        samples: micro-batches in flight at which minima are taken.
        growth, host_bytes: as in :class:`Relaxation`.
    """

    prices: Array
    work_s: Array
    at_work: Array
    step_s: Array
    budget: Array
    samples: Array
    growth: float
    host_bytes: float

    def take(self, index: NDArray[np.intp]) -> AtPrices:
        """Of some of the rows."""
        prices, work_s = self.prices[:, :, index], self.work_s[:, :, index]
        at_work, step_s, budget = self.at_work[index], self.step_s[index], self.budget[index]
        return self._replace(prices=prices, work_s=work_s, at_work=at_work, step_s=step_s, budget=budget)

    @staticmethod
    def joined(several: Sequence[AtPrices]) -> AtPrices:
        """Rows of several, one after the other, of one pipeline degree."""
        few = min(each.prices.shape[1] for each in several)
        return several[0]._replace(
            prices=np.concatenate([each.prices[:, :few] for each in several], axis=2),
            work_s=np.concatenate([each.work_s[:few] for each in several], axis=2),
            at_work=np.concatenate([each.at_work for each in several]),
            step_s=np.concatenate([each.step_s for each in several]),
            budget=np.concatenate([each.budget for each in several]),
        )

    def dearest_s(self, rows: NDArray[np.intp], layout: Layout, flights: Array, alone: BlockTable) -> Array:
        """What a layout's dearest device takes at least, per row: with the wait for the first micro-batch before its work and for
        the last one after it, when the first device updates.

        Args:
            rows: which.
            flights: (virtual stages, rows) micro-batches in flight.
            alone: the rows' tables without strategies.
        """
        (prices, of_host), least = self.prices[:, :, rows], self.work_s[:, :, rows]
        samples, counts = self.samples, layout.chunks[:, :, :-1]
        sample = (np.searchsorted(samples, flights, side="right") - 1).reshape(*counts.shape[:2], len(rows))
        # Blocks by micro-batches in flight: (samples, devices, rows, kinds); seconds at prices: (prices, devices, rows).
        live = np.stack(
            [np.einsum("vdr,vdk->drk", (sample == n).astype(float), counts) for n in range(len(samples))]
        )
        work_s = np.einsum("pnrk,ndrk->pdr", least, live)
        there = layout.device_counts[:, :-1] > 0
        at_work = np.where(there[:, None], self.at_work[rows], -np.inf).max(axis=2)
        room = prices[:, None] * (self.budget[rows] - self.growth * at_work)
        total = work_s - room - of_host[:, None] * self.host_bytes
        once = layout.chunks[0, :, :-1] @ (alone["forward_s"] + alone["backward_s"] + alone["weight_s"])[:-1]
        waits_s = np.concatenate([np.zeros((1, len(rows))), np.cumsum(once[:-1], axis=0)])
        waits_s = waits_s + self.step_s[rows] @ layout.device_counts[0, :-1]
        best: Array = (waits_s + total.max(axis=0)).max(axis=0)
        return best


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
    """

    blocks: Array
    layers: Array
    micro_batches: Array
    pp: int
    budget: Array
    growth: float
    host_bytes: float

    def take(self, index: NDArray[np.intp]) -> Relaxation:
        """Of some of the rows."""
        blocks, micro_batches = self.blocks.take(index, axis=2), self.micro_batches[index]
        return replace(self, blocks=blocks, micro_batches=micro_batches, budget=self.budget[index])

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
    def hosts(self) -> bool:
        """Whether some strategies keep bytes on the host."""
        return bool(self.blocks[5:].any())

    def pooled(self, below_s: float) -> tuple[Array, NDArray[np.intp], AtPrices]:
        """What a step takes at least with all devices' memory together, per row; which rows may take less than a limit; and what
        bounds their layouts.

        What a device's blocks need while they are at work is no less than what its layers do on average, nor than what an end
        needs: the larger one of the two counts, each row by itself.
        """
        # Whatever the schedule, no device has fewer micro-batches in flight than under 1F1B; and none has more layers than it
        # works on within the limit.
        flights = in_flight(self.pp, 1, self.micro_batches)
        each_s = self.micro_batches * self.seconds[:, :, :-2].min(axis=(0, 2))
        most = np.maximum(np.floor(below_s / each_s), 1.0)
        share = 1.0 / np.minimum(most, self.layers[:-2].sum())
        alone = self._prices()
        layers = self._at_prices(alone, share)
        of_layers = self._work_s(layers, flights, most)
        found: Array = of_layers.max(axis=0)
        open_ = np.flatnonzero(found < below_s)
        few, layers, of_layers = self.take(open_), layers.take(open_), of_layers[:, open_]
        alone, share, flights, most = alone[:, :, open_], share[open_], flights[:, open_], most[open_]
        ends = few._at_prices(alone, np.zeros_like(share))
        of_ends = few._work_s(ends, flights, most)
        better = of_layers.max(axis=0, initial=0.0) > of_ends.max(axis=0, initial=0.0)
        total, at_work = np.where(better, of_layers, of_ends), np.where(better[:, None], 0.0, ends.at_work)
        least = ends._replace(work_s=np.where(better[:, None], layers.work_s, ends.work_s), at_work=at_work)
        found[open_] = total.max(axis=0)
        if self.hosts and len(open_):
            centre = np.maximum(alone[0][total.argmax(axis=0), np.arange(len(open_))], alone[0][1])
            around = few._at_prices(few._around(centre), np.where(better, share, 0.0))
            found[open_] = np.maximum(found[open_], few._work_s(around, flights, most).max(axis=0))
            least = least._replace(
                prices=np.concatenate([alone, around.prices], axis=1),
                work_s=np.concatenate([least.work_s, around.work_s]),
            )
        left = found[open_] < below_s
        return found, open_[left], least.take(np.flatnonzero(left))

    def _work_s(self, priced: AtPrices, flights: Array, most: Array) -> Array:
        """What a device works at least on average at each of the prices, (prices, rows).

        Args:
            priced: the least of blocks.
            flights: (stages, rows) micro-batches in flight.
            most: (rows) layers that one stage holds at most.
        """
        kinds = len(self.layers) - 2
        samples = self._samples()
        sample = np.searchsorted(samples, np.sort(flights, axis=0), side="right") - 1
        filled = np.arange(len(sample))[:, None] * most
        # Blocks at work: the embedding's stage and the head's may have no layers, and all others have.
        least = priced.at_work[:, :kinds].min(axis=1)
        ends = priced.at_work[:, kinds:].sum(axis=1) if self.pp > 1 else priced.at_work.max(axis=1)
        room = self.pp * self.budget - self.growth * (ends + max(self.pp - 2, 0) * least)
        total: Array = -priced.prices[0] * room - priced.prices[1] * self.pp * self.host_bytes
        for kind in range(kinds):
            here = np.clip(self.layers[kind] - filled, 0.0, most)
            # Nothing is left out where stages could not hold all.
            here[-1] += self.layers[kind] - here.sum(axis=0)
            for number in range(len(samples)):
                together = np.where(sample == number, here, 0.0).sum(axis=0)
                total = total + together * priced.work_s[:, number, :, kind]
        rows = np.arange(sample.shape[1])
        # The embedding's stage has most micro-batches in flight, the head's fewest.
        for end, stage in ((kinds, -1), (kinds + 1, 0)):
            total = total + self.layers[end] * priced.work_s[:, sample[stage], rows, end]
        return total / self.pp

    def _samples(self) -> Array:
        """Micro-batches in flight at which minima are taken; in between, those of the next fewer."""
        return distinct(np.clip(np.ceil(self.pp * np.array(_SAMPLES)), 1.0, max(2.0 * self.pp - 1.0, 1.0)))

    @property
    def cost(self) -> Array:
        """Seconds of a step, (strategies, rows, kinds)."""
        cost: Array = self.micro_batches[:, None] * self.seconds + self.step
        return cost

    def _prices(self) -> Array:
        """Of a byte on the device and on the host, (2, prices, rows): the host's for nothing."""
        device = np.array(_PRICES)[:, None] * (self.cost.min(axis=0) @ self.layers / self.pp / self.budget)
        return np.stack([device, np.zeros_like(device)])

    def _around(self, centre: Array) -> Array:
        """The same around a price of a device's byte that bounds well, per row, with the host's at prices too."""
        near = np.repeat(np.array(_AROUND), len(_HOST_PRICES))[:, None] * centre
        return np.stack([near, near * np.tile(_HOST_PRICES, len(_AROUND))[:, None]])

    def _at_prices(self, prices: Array, share: Array) -> AtPrices:
        """The smallest cost with memory at some prices.

        Args:
            prices: of :meth:`_prices`.
            share: (rows) of what a layer needs while it is at work that counts as held; where it is 0, the least counts apart.
        """
        samples, layers, ends = self._samples(), slice(0, len(self.layers) - 2), slice(-2, None)
        work_s = np.empty((prices.shape[1], len(samples), *self.blocks.shape[2:]))
        self._least(prices, share, samples, layers, work_s)
        # An end is one block: as if the fewest were in flight.
        self._least(prices, np.zeros_like(share), samples[:1], ends, work_s)
        work_s[:, 1:, :, ends] = work_s[:, :1, :, ends]
        at_work = np.where(share[:, None] > 0.0, 0.0, self.blocks[4].min(axis=0))
        step_s = self.step.min(axis=0)
        return AtPrices(prices, work_s, at_work, step_s, self.budget, samples, self.growth, self.host_bytes)

    def _least(self, prices: Array, share: Array, samples: Array, kinds: slice, work_s: Array) -> None:
        """Fills in the smallest cost of some kinds of blocks, with each number of micro-batches in flight."""
        seconds, step, always, saved, at_work, host, host_saved = np.ascontiguousarray(
            self.blocks[..., kinds]
        )
        cost = self.micro_batches[:, None] * seconds + step
        always = always + self.growth * share[:, None] * at_work
        priced, both, hosts = np.empty_like(cost), np.empty_like(cost), self.hosts
        for number, flights in enumerate(samples):
            held = always + self.growth * flights * saved
            away = host + flights * host_saved if hosts else None
            last: Array | None = None
            for at, (device, on_host) in enumerate(prices.transpose(1, 0, 2)):
                if last is None or not np.array_equal(device, last):  # several prices on the host share one
                    np.multiply(device[:, None], held, out=priced)
                    priced += cost
                    last = device
                if away is None or not on_host.any():
                    work_s[at, number, :, kinds] = priced.min(axis=0)
                    continue
                np.multiply(on_host[:, None], away, out=both)
                both += priced
                work_s[at, number, :, kinds] = both.min(axis=0)
