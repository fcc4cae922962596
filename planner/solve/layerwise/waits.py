"""What layouts of a mesh take at least: every device's work, with the wait for the first micro-batch and after the last one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from planner.ledger import Array
from planner.pipeline.layout import BOUNDARY, Layout, layout_of
from planner.solve.layerwise.devices import DeviceCosts

__all__ = ["as_one_chunk", "least_hop_s", "waiting_s"]


def least_hop_s(costs: DeviceCosts) -> float:
    """From a stage to the next one, under the strategy that sends least."""
    return float(costs.mesh["forward_s"][:, costs.mesh.kinds.index(BOUNDARY)].min())


def waiting_s(costs: DeviceCosts, layouts: Sequence[Layout], below_s: float) -> Array:
    """What no strategies of the mesh undercut under some layouts, (layouts,); infinite where none fit.

    The first device's update follows the last micro-batch; a device's own update, and what it exposes of its traffic, its own
    work. Layouts that deal as many blocks to every device share what that takes. Where they have other chunks than the costs
    are of, all chunks of a device count as one. Bounds that reach ``below_s`` are not tightened.
    """
    mesh, hops_s = costs.mesh, np.arange(costs.mesh.pp) * least_hop_s(costs)
    first = np.array([layout.chunks[0] for layout in layouts])
    forward, backward = (
        first @ each.min(axis=0) for each in (mesh["forward_s"], mesh.micro_batch_s - mesh["forward_s"])
    )
    ahead, behind = (np.cumsum(x, axis=1) - x + hops_s for x in (forward, backward))
    known: dict[Layout, tuple[Array, Array, float]] = {}
    each = [
        layout if costs.virtual_stages == layout.virtual_stages else as_one_chunk(layout)
        for layout in layouts
    ]
    for layout in dict.fromkeys(each):
        known[layout] = *costs.least_s(layout, below_s), costs.update_s(layout.device_counts[0])
    work, whole, update = (np.array(x) for x in zip(*(known[layout] for layout in each), strict=True))
    behind[:, 1:] += update[:, None]
    least: Array = (ahead + np.maximum(work + behind, whole)).max(axis=1)
    return least


@lru_cache(maxsize=1024)
def as_one_chunk(layout: Layout) -> Layout:
    """The same blocks on every device, in one chunk; the same object for layouts that deal as many to each."""
    return _one_chunk(layout.device_counts.shape, layout.device_counts.tobytes())


@lru_cache(maxsize=1024)
def _one_chunk(shape: tuple[int, int], counts: bytes) -> Layout:
    return layout_of(np.frombuffer(counts).reshape(shape), shape[0], 1, "one chunk")
