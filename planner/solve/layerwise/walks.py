"""What no strategies of a layout undercut, by paths through its schedule.

Every plan of the layout walks every path, so the sum of its devices' duals along one bounds them all. So does a mixture of paths,
each at its share: strategies that make one short make another long, and a mixture bounds both at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from planner.ledger import Array
from planner.pipeline.layout import Layout
from planner.schedule.critical import Path, critical_path, interleaved_paths
from planner.schedule.order import make_order
from planner.solve.layerwise.devices import Device, DeviceCosts, Goal
from planner.solve.layerwise.space import Deal
from planner.solve.layerwise.strategies import Mesh
from planner.solve.layerwise.waits import as_one_chunk, least_hop_s, waiting_s

__all__ = ["Paths", "Walks", "first_bounds"]

Paths: TypeAlias = dict[tuple[str, int, int, int], list[Path]]
"""Critical paths by schedule, stages, micro-batches and chunks."""

_MOST = 3  # known paths that are mixed
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_SECTIONS = 7  # to a share within three percent


class Walks:
    """Bounds of a layout on a mesh.

    Args:
        costs: of the mesh's devices.
        layout, schedule: what is bounded.
        hop_s: from a stage to the next one.
        paths: critical ones of all deals; grows.
    """

    def __init__(
        self, costs: DeviceCosts, mesh: Mesh, layout: Layout, schedule: str, hop_s: float, paths: Paths
    ) -> None:
        self.costs, self.mesh, self.layout, self.schedule, self.hop_s = costs, mesh, layout, schedule, hop_s
        self._key = schedule, mesh.pp, mesh.micro_batches, layout.virtual_stages
        self._known = paths.setdefault(self._key, [])
        self._best: Path | None = None
        self.bound_s = 0.0
        """The largest bound so far."""

    def without_order(self, below_s: float) -> float:
        """The longest of the paths that are known without the order, as closely as a limit asks for."""
        if self.schedule == "interleaved":
            self._walk(_longest(self.mesh, self.layout, self.fastest_s(), self.hop_s), below_s)
        return self.bound_s

    def critical(self, below_s: float, stages_s: Array | None = None) -> float:
        """The paths that were critical in other deals, if these do not exclude what is below a limit the one that is critical
        under some seconds of the stages (the fastest ones where none are given), and mixtures of them."""
        for path in self._known if stages_s is None else ():
            if self._walk(path, below_s) >= below_s:
                return self.bound_s
        order = make_order(*self._key)
        seconds = _with_weights(self.fastest_s() if stages_s is None else stages_s)
        path = critical_path(order, seconds, self.hop_s, np.zeros(self.mesh.pp))
        self._known.append(path)
        if self._walk(path) < below_s:
            self._mix(below_s)
        return self.bound_s

    def goals(self) -> list[Goal]:
        """What the best mixture so far passes on every device; nothing where there is none."""
        if self._best is None:
            return []
        passes = self._best.counts[:2].reshape(2, self.layout.virtual_stages, self.mesh.pp)
        found = []
        for number in range(self.mesh.pp):
            forwards, backwards = passes[:, :, number].tolist()
            found.append(Goal(tuple(forwards), tuple(backwards), after=number == self._best.device))
        return found

    def proved(self, device: Callable[[int], Device]) -> float:
        """The best mixture so far with the best whole counts of layers for it, device by device."""
        if self._best is not None:
            found = self._best.hops * self.hop_s
            for number, goal in enumerate(self.goals()):
                found += self.costs.proved_s(device(number), goal)
            self.bound_s = max(self.bound_s, found)
        return self.bound_s

    def fastest_s(self) -> Array:
        """Seconds of the virtual stages, forward and backward, as short as they may be."""
        return _fastest_s(self.mesh, self.layout, self.costs.least_s(self.layout)[0])

    # -- details -------------------------------------------------------------------------------------------------------

    def _walk(self, path: Path, below_s: float = np.inf) -> float:
        """The bound of a path, which is kept if it is the best; of no use beyond a limit."""
        hops_s = path.hops * self.hop_s
        found = self.costs.along_s(self.layout, path, below_s - hops_s) + hops_s
        if found > self.bound_s:
            self._best, self.bound_s = path, found
        return found

    def _mix(self, below_s: float) -> None:
        """Mixes other paths into the best one, one after the other, until the bound is no longer below a limit.

        The bound is concave in a share: its largest value is found by golden sections.
        """
        for other in self._known[-_MOST:]:
            base = self._best
            if base is None or other is base or other.device != base.device:
                continue
            low, high = 0.0, 1.0
            shares = [high - _GOLDEN, low + _GOLDEN]
            found = [self._walk(_mixed(base, other, share)) for share in shares]
            for _ in range(_SECTIONS):
                if self.bound_s >= below_s:
                    return
                upper = found[1] > found[0]
                low, high = (shares[0], high) if upper else (low, shares[1])
                fresh = low + _GOLDEN * (high - low) if upper else high - _GOLDEN * (high - low)
                value = self._walk(_mixed(base, other, fresh))
                shares = [shares[1], fresh] if upper else [fresh, shares[0]]
                found = [found[1], value] if upper else [value, found[0]]


def _mixed(one: Path, other: Path, share: float) -> Path:
    """Two paths that end on the same device, the other one at its share."""
    counts = (1.0 - share) * one.counts + share * other.counts
    return Path(counts, (1.0 - share) * one.hops + share * other.hops, one.device)


def first_bounds(costs: DeviceCosts, deals: Sequence[Deal], enough_s: float) -> dict[Deal, float]:
    """What deals of a mesh whose layouts are given are not faster than: by waits, and where that proves too little by paths.

    The costs are of devices whose chunks count as one.
    """
    layouts = {deal: deal.layout for deal in deals if deal.layout is not None}
    if not layouts:
        return {}
    found = dict(zip(layouts, waiting_s(costs, [*layouts.values()], enough_s).tolist(), strict=True))
    left = [
        deal
        for deal in layouts
        if deal.order == "interleaved" and max(found[deal], deal.bound_s) < enough_s and costs.mesh.pp > 1
    ]
    if left:
        along = _interleaved_s(costs, [layouts[deal] for deal in left])
        found |= {deal: max(found[deal], path_s) for deal, path_s in zip(left, along, strict=True)}
    return found


def _interleaved_s(costs: DeviceCosts, layouts: Sequence[Layout]) -> list[float]:
    """What no plan of some layouts is faster than where chunks take turns: of each, by a path that needs no order, with device
    memory alone."""
    hop_s = least_hop_s(costs)
    fastest = [_fastest_s(costs.mesh, layout, costs.least_s(as_one_chunk(layout))[0]) for layout in layouts]
    paths = [
        _longest(costs.mesh, layout, stages_s, hop_s)
        for layout, stages_s in zip(layouts, fastest, strict=True)
    ]
    along = costs.along_each_s(layouts, paths)
    return [found + path.hops * hop_s for found, path in zip(along, paths, strict=True)]


def _longest(mesh: Mesh, layout: Layout, stages_s: Array, hop_s: float) -> Path:
    """Of the paths through interleaved stages that need no order, the longest under some seconds."""
    paths = interleaved_paths(mesh.pp, layout.virtual_stages, mesh.micro_batches)
    seconds, none = _with_weights(stages_s), np.zeros(mesh.pp)
    return max(paths, key=lambda path: path.seconds(seconds, hop_s, none))


def _fastest_s(mesh: Mesh, layout: Layout, work_s: Array) -> Array:
    """Seconds of the virtual stages, forward and backward: the fastest forwards, and backwards that fill the devices' work."""
    each = mesh["forward_s"], mesh.micro_batch_s - mesh["forward_s"]
    forward, backward = (
        (layout.counts @ x.min(axis=0)).reshape(layout.virtual_stages, mesh.pp) for x in each
    )
    spare = (work_s / mesh.micro_batches - forward.sum(axis=0)) / backward.sum(axis=0)
    return np.stack([forward.ravel(), (backward * np.maximum(spare, 1.0)).ravel()])


def _with_weights(stages_s: Array) -> Array:
    """Seconds of forward and backward with those of weight gradients, which are in the backward."""
    return np.concatenate([stages_s, np.zeros((1, stages_s.shape[1]))])
