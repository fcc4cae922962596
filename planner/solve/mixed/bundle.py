"""All ways to cut a stage of one class at once: lower bounds of its seconds by the layers that it holds.

Memory is priced: for every price ``λ ≥ 0`` per byte, a stage takes at least ``Σ over its blocks of min_s (cost_s + λ·held_s) −
λ·room`` (weak duality), which is a line over the layers; the bound is the largest over some prices and over mixtures of the four
sums of :class:`~planner.solve.layerwise.devices.DeviceCosts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from planner.ledger import Array
from planner.solve.layerwise.counts import SLACK
from planner.solve.layerwise.strategies import Mesh
from planner.specs.problem import Problem
from planner.uncertainty.memory_limit import room_bytes

__all__ = ["Bundle"]

_PRICES = (
    0.0,
    *np.geomspace(0.004, 2.0, 15).tolist(),
)  # in seconds of all layers' work per byte of a stage's room

_EXPOSED = (0.0, 1 / 3, 2 / 3, 1.0)
"""Shares of what work leaves of gradients, or of weights; no more of it is exposed. Mixtures of exposing it and hiding it bound
strategies that are good at either."""


class Bundle:
    """The members of a class that are priced, side by side.

    Args:
        problem: the job on their group.
        meshes: their strategies.
        stack: kind of every layer.
    """

    def __init__(self, problem: Problem, meshes: Sequence[Mesh], stack: Sequence[int]) -> None:
        self.stack = list(stack)
        most = max(len(mesh.branches) for mesh in meshes)

        def side_by_side(values: Sequence[Array], fill: float) -> Array:
            """(members, strategies, kinds), or with more axes before the strategies."""
            short = [[(0, 0)] * (v.ndim - 2) + [(0, most - v.shape[-2]), (0, 0)] for v in values]
            return np.stack(
                [np.pad(v, pad, constant_values=fill) for v, pad in zip(values, short, strict=True)]
            )

        self.growth = 1.0 + problem.stack.fragmentation.value
        self.micro_batches = float(meshes[0].micro_batches)
        sums = [_costs(mesh)[..., :-1] for mesh in meshes]
        # (members, strategies, kinds) of a micro-batch, and (members, sums, strategies, kinds) of what follows the last one.
        self.work = side_by_side([x[-1] / self.micro_batches for x in sums], np.inf)
        self.update = side_by_side([x[:-1] - x[-1] for x in sums], 0.0)
        self.always = side_by_side([mesh["always_bytes"][:, :-1] for mesh in meshes], 0.0)
        self.saved = side_by_side([mesh["saved_bytes"][:, :-1] for mesh in meshes], 0.0)
        transient = side_by_side(
            [(mesh["block_bytes"] + mesh["recomputed_bytes"])[:, :-1] for mesh in meshes], np.inf
        )
        framework, each = problem.stack.framework_bytes.value, problem.stack.communicator_bytes.value
        idle = np.array([framework + each * mesh.communicators for mesh in meshes])
        least = transient.min(axis=1)[:, sorted(set(self.stack))].min(axis=1)
        # Wider by what differences of sums round off: a stage that fills its memory to the byte is none that holds too much.
        self.room = room_bytes(problem, idle) * (1.0 + SLACK) - idle - self.growth * least
        self._least_held: dict[tuple[float, tuple[int, ...]], Array] = {}
        self._lines: dict[tuple[float, tuple[int, ...], float, bool], tuple[Array, Array]] = {}
        self._numbers = np.zeros((len(self.stack) + 1, self.work.shape[2]))
        """Layers of each kind among the first 0, 1, … of them."""
        np.cumsum(np.eye(self.work.shape[2])[self.stack], axis=0, out=self._numbers[1:])

    def least(self, flights: float, ends: tuple[int, ...], passes: float, *, update: bool) -> Array:
        """The bound of any 0, 1, … neighbouring layers, of the best member: some micro-batches, and perhaps the update."""
        offset, slopes = self.lines(flights, ends, passes, update=update)
        held = self._held(flights, ends)
        layers, each = len(self.stack), []
        if len(set(self.stack)) == 1:
            slope = slopes[:, :, self.stack[0]]
            for n in range(layers + 1):
                fits = np.flatnonzero(held[:, n] <= self.room)
                each.append((offset[fits] + n * slope[fits]).max(axis=1).min(initial=np.inf))
            return np.array(each)
        sums = slopes @ self._numbers.T
        for n in range(layers + 1):
            found = (offset[:, :, None] + sums[:, :, n:] - sums[:, :, : layers + 1 - n]).max(axis=1)
            fits = held[:, n:] - held[:, : layers + 1 - n] + held[:, :1] <= self.room[:, None]
            each.append(np.where(fits, found, np.inf).min())
        return np.array(each)

    def cost(self, start: int, end: int, flights: float, ends: tuple[int, ...]) -> Array:
        """The bound of some layers in a step, of every member."""
        held = self._held(flights, ends)
        fits = held[:, end] - held[:, start] + held[:, 0] <= self.room
        found: Array = np.where(fits, self._some(start, end, flights, ends).max(axis=1), np.inf)
        return found

    def together(self, start: int, end: int, flights: float, ends: tuple[int, ...], most: int) -> list[int]:
        """Members that stand together best: the cheapest ones at the prices of memory at which the best of them costs most.

        There the linear relaxation of a stage that holds layers of any members mixes the cheapest.
        """
        cost = self._some(start, end, flights, ends)
        price = int(np.argmax(cost.min(axis=0)))
        chosen: list[int] = np.argsort(cost[:, price], kind="stable")[:most].tolist()
        return sorted(chosen)

    def _some(self, start: int, end: int, flights: float, ends: tuple[int, ...]) -> Array:
        """Every line's bound of some layers in a step, (members, lines)."""
        offset, slopes = self.lines(flights, ends, self.micro_batches, update=True)
        found: Array = offset + slopes @ (self._numbers[end] - self._numbers[start])
        return found

    def _held(self, flights: float, ends: tuple[int, ...]) -> Array:
        """(members, layers + 1): the fewest bytes of the ends and the first 0, 1, … layers."""
        key = flights, ends
        if key not in self._least_held:
            every = self.always + self.growth * flights * self.saved
            each = np.min(np.where(np.isfinite(self.work), every, np.inf), axis=1)
            columns = [each[:, list(ends)].sum(axis=1)[:, None], each[:, self.stack]]
            self._least_held[key] = np.cumsum(np.concatenate(columns, axis=1), axis=1)
        return self._least_held[key]

    def lines(
        self, flights: float, ends: tuple[int, ...], passes: float, *, update: bool
    ) -> tuple[Array, Array]:
        """(members, lines) where nothing but the ends is held, and (members, lines, kinds) of one block more."""
        key = flights, ends, passes, update
        if key not in self._lines:
            work = passes * np.min(self.work, axis=1)[:, self.stack].sum(axis=1)
            price = np.multiply.outer(work / np.maximum(self.room, 1.0), _PRICES)  # (members, prices)
            priced = self._priced(flights, passes, price, update=update)
            room = np.tile(price * self.room[:, None], (1, priced.shape[1] // price.shape[1]))
            offset = priced[:, :, list(ends)].sum(axis=2) - room
            self._lines[key] = offset, priced
        return self._lines[key]

    def _priced(self, flights: float, passes: float, price: Array, *, update: bool) -> Array:
        """The least of one block with its bytes at some prices, (members, sums · prices, kinds)."""
        members, prices = price.shape
        held = (self.always + self.growth * flights * self.saved).transpose(1, 2, 0)
        work = passes * self.work
        # Strategies first and members last: what is added and compared lies side by side.
        paid = np.ascontiguousarray(held)[:, :, None] * np.ascontiguousarray(price.T)
        sums = [work + each for each in self.update.transpose(1, 0, 2, 3)] if update else [work]
        least, total = np.empty((len(sums), self.work.shape[2], prices, members)), np.empty_like(paid)
        for cost, found in zip(sums, least, strict=True):
            np.add(np.ascontiguousarray(cost.transpose(1, 2, 0))[:, :, None], paid, out=total)
            total.min(axis=0, out=found)
        return least.transpose(3, 0, 2, 1).reshape(members, -1, self.work.shape[2])


def _costs(mesh: Mesh) -> Array:
    """(sums, strategies, kinds): a device's seconds with shares of gradients and of weights exposed; at last its work alone."""
    work = mesh.micro_batches * mesh.micro_batch_s
    beside = mesh["backward_s"] + mesh["weight_s"] + mesh["recompute_s"]
    gradients = mesh["gradients_step_s"] - beside
    weights = mesh["weights_step_s"] - mesh["forward_s"]
    serial = work + mesh["main_step_s"]
    return np.stack([*(serial + x * gradients + y * weights for x, y in product(_EXPOSED, repeat=2)), work])
