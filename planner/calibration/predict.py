"""Seconds of measured kernels and messages under a device's or a cluster's constants: the engine's own prices, rows at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.calibration.constants import changed
from planner.calibration.measurements import Attention, Measurement, Message, Product, Stream, Work
from planner.costs.attention_kernel import FLASH_BACKWARD_PASSES, causal_fraction
from planner.costs.precision import dtype_bytes
from planner.engine.kernels import Kernels
from planner.engine.pricer import Pricer
from planner.ledger import Axes, Collective, Group
from planner.specs.cluster import Cluster
from planner.specs.device import Device
from planner.specs.stack import load_stack

__all__ = ["kernels_s", "messages_s"]

Array: TypeAlias = NDArray[np.float64]
_FP32_BYTES = 4.0


def kernels_s(measurements: Sequence[Measurement]) -> Callable[[Device], Array]:
    """A function from a device to the seconds of each measurement, in order; messages are not among them."""
    batches = _batches(measurements)

    def predict(device: Device) -> Array:
        found = np.empty(len(measurements))
        priced = {alone: Kernels(device, alone=alone) for alone in (False, True)}
        for (kind, alone, dtype, backward), (rows, columns) in batches.items():
            found[rows] = _SECONDS[kind](priced[alone], columns, dtype, backward)
        return found

    return predict


def messages_s(measurements: Sequence[Measurement]) -> Callable[[Cluster], Array]:
    """A function from a cluster to the seconds of each message, in order.

    Ranks of a group lie as far apart as puts ``per_node`` of them in each node.
    """
    works = [m.work for m in measurements if isinstance(m.work, Message)]
    assert len(works) == len(measurements), "messages only"
    kinds = sorted({work.kind for work in works})
    rows = {kind: np.flatnonzero([work.kind == kind for work in works]) for kind in kinds}
    stack = changed(
        replace(load_stack(), on={}), {"collective_slowdown": 1.0}
    )  # the link's own time, no framework's

    def predict(cluster: Cluster) -> Array:
        found = np.empty(len(works))
        pricer = Pricer(cluster, stack)
        here = cluster.groups[0].devices_per_node
        for kind, index in rows.items():
            mine = [works[i] for i in index]
            stride = np.array(
                [max(here // work.per_node, 1) if work.ranks > work.per_node else 1 for work in mine]
            )
            group = Group(kind, np.array([work.ranks for work in mine]), stride)
            item = Collective(what=kind, block="", kind=kind, group=group, size="n")
            axes = Axes({"n": np.array([work.n_bytes for work in mine]) / _FP32_BYTES})
            found[index] = pricer.prices([item], axes)[0]
        return found

    return predict


def _batches(measurements: Sequence[Measurement]) -> dict[Any, tuple[NDArray[np.intp], dict[str, Array]]]:
    """Rows that one call prices: of one kind, context, dtype and direction; their sizes as columns."""
    rows: dict[Hashable, list[int]] = defaultdict(list)
    for index, measurement in enumerate(measurements):
        work = measurement.work
        key = (type(work), measurement.alone, getattr(work, "dtype", ""), getattr(work, "backward", False))
        rows[key].append(index)
    return {
        key: (np.array(index), _columns([measurements[i].work for i in index])) for key, index in rows.items()
    }


def _columns(works: Sequence[Work]) -> dict[str, Array]:
    names = [name for name in type(works[0]).__slots__ if name != "dtype"]
    return {name: np.array([float(getattr(work, name)) for work in works]) for name in names}


def _products_s(kernels: Kernels, sizes: dict[str, Array], dtype: str, backward: bool) -> Any:
    width = dtype_bytes(dtype)
    rate = kernels.product_flop_per_s(dtype)
    return kernels.matmul_s(sizes["m"], sizes["n"], sizes["k"], sizes["groups"], rate, width, width)


def _attention_s(kernels: Kernels, sizes: dict[str, Array], dtype: str, backward: bool) -> Any:
    queries, keys = sizes["queries"], sizes["keys"]
    window = np.where(sizes["window"] > 0.0, sizes["window"], np.inf)
    visible = np.where(
        sizes["causal"] > 0.0, causal_fraction(queries, keys, window), np.minimum(window / keys, 1.0)
    )
    return kernels.attention_s(
        sizes["batch"], sizes["heads"], sizes["kv_heads"], queries, keys, sizes["head_dim"], sizes["head_dim"],
        kernels.attention_flop_per_s(dtype, backward=backward), visible=visible,
        passes=FLASH_BACKWARD_PASSES if backward else 1.0, bytes_per_element=dtype_bytes(dtype),
    )  # fmt: skip


def _streams_s(kernels: Kernels, sizes: dict[str, Array], dtype: str, backward: bool) -> Any:
    return kernels.stream_s(sizes["n_bytes"])


_SECONDS = {Product: _products_s, Attention: _attention_s, Stream: _streams_s}
