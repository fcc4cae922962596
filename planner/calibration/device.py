"""Calibrates a device: efficiencies of its kernels, and how fast its own links carry collectives inside one node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.calibration.constants import changed, constants_of
from planner.calibration.measurements import Measurement, Message
from planner.calibration.predict import kernels_s, messages_s
from planner.calibration.robust_fit import Fit, fit
from planner.errors import Problem, SpecError
from planner.specs.cluster_file import build_cluster
from planner.specs.device import Device, Transport

__all__ = ["KERNEL_CONSTANTS", "family_weights", "fit_kernels", "fit_links", "transport_constants"]

Array: TypeAlias = NDArray[np.float64]

KERNEL_CONSTANTS = (
    ("efficiency.matmul", 0.01, 1.0),
    ("efficiency.memory", 0.01, 1.0),
    ("launch_s", 1e-8, 1e-3),
    ("efficiency.attention", 0.01, 1.0),
    ("efficiency.attention_backward", 0.01, 1.0),
    ("efficiency.l2_speedup", 1.0, 20.0),
    ("efficiency.overlap_loss", 1e-3, 1.0),
    ("efficiency.split_s", 1e-12, 1e-5),
    ("efficiency.matmul_8bit", 0.01, 1.0),
    ("efficiency.attention_8bit", 0.01, 1.0),
    ("efficiency.softmax_flop", 1e-2, 200.0),
    ("efficiency.attention_tile_s", 1e-10, 1e-3),
    ("efficiency.attention_straggler", 1e-3, 10.0),
    ("efficiency.matmul_burst", 1.0, 3.0),
)
"""What kernels determine of a device, the most telling first, each with its bounds; tile sizes are the library's and are kept."""

_FRACTIONS = (0.01, 1.0)
_LATENCIES_S = (1e-8, 1e-2)
_RATES_BYTES_PER_S = (1e6, 1e13)


def fit_kernels(device: Device, measurements: Sequence[Measurement], *, folds: int = 5) -> tuple[Device, Fit]:
    """The device with the constants that the measured kernels determine, and the fit.

    Raises:
        SpecError: no kernel is among the measurements.
    """
    kernels = [m for m in measurements if not isinstance(m.work, Message)]
    if not kernels:
        raise SpecError(Problem("measurements", "no kernels", "products, attention or streams"))
    seconds = kernels_s(kernels)
    found = fit(
        lambda values: seconds(changed(device, values)),
        [m.seconds for m in kernels],
        constants_of(device, KERNEL_CONSTANTS),
        [m.group for m in kernels],
        folds=folds,
        weights=family_weights(kernels),
    )
    return changed(device, {c.name: c.value for c in found.fitted}), found


def fit_links(device: Device, measurements: Sequence[Measurement], *, folds: int = 5) -> tuple[Device, Fit]:
    """The device with the constants of its scale-up link that collectives within one node determine, and the fit.

    Raises:
        SpecError: no collective stays within a node.
    """
    inside = [m for m in measurements if isinstance(m.work, Message) and m.work.per_node == m.work.ranks]
    if not inside:
        raise SpecError(Problem("measurements", "no collective within one node", "collectives of one node"))
    seconds = messages_s(inside)
    per_node = max(m.work.ranks for m in inside if isinstance(m.work, Message))
    whole = max(per_node, device.devices_per_node)
    bounds = transport_constants("scale_up", device.scale_up.transport)
    found = fit(
        lambda values: seconds(build_cluster(changed(device, values), 1, whole)),
        [m.seconds for m in inside],
        constants_of(device, bounds),
        [m.group for m in inside],
        folds=folds,
        weights=family_weights(inside),
    )
    return changed(device, {c.name: c.value for c in found.fitted}), found


def transport_constants(path: str, transport: Transport | None) -> tuple[tuple[str, float, float], ...]:
    """Paths and bounds of a link's constants: rate and latency, then how the library drives it, where that is known."""
    own = tuple(
        (f"{path}.transport.{field.name}", *_bounds(field.name))
        for field in fields(Transport)
        if transport is not None and getattr(transport, field.name) is not None
    )
    return ((f"{path}.efficiency", *_FRACTIONS), (f"{path}.latency_s", *_LATENCIES_S), *own)


def family_weights(measurements: Sequence[Measurement]) -> Array:
    """Weights by which a family of n rows counts as √n, so that the many do not outvote the few."""
    counts = Counter(m.family for m in measurements)
    return np.array([counts[m.family] ** -0.5 for m in measurements])


def _bounds(name: str) -> tuple[float, float]:
    if name.endswith("bytes_per_s"):
        return _RATES_BYTES_PER_S
    return _LATENCIES_S if name.endswith("_s") else (1e-3, 1.0)
