"""Traffic and time of model states that live in host memory or on disk.

Sources: J. Ren et al., "ZeRO-Offload", arXiv:2101.06840; S. Rajbhandari et al., "ZeRO-Infinity",
arXiv:2104.07857, section 4; A. Maurya et al., "Deep Optimizer States", arXiv:2410.21316.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from planner.costs.arrays import Real

__all__ = [
    "arithmetic_intensity",
    "gathered_host_bytes_per_s",
    "host_adam_s",
    "interleaved_update_stride",
    "offload_efficiency",
    "offload_required_bytes_per_s",
    "zero_offload_bytes",
    "zero_offload_step_s",
]


def zero_offload_bytes(parameters: Real, shards: Real = 1.0, bytes_per_element: Real = 2.0) -> Real:
    """Bytes over a rank's host link per step, each way: ``2Ψ/d``; gradients down, updated parameters up.

    >>> zero_offload_bytes(10e9, 8) / 1e9
    2.5
    """
    return 1.0 * bytes_per_element * parameters / shards


def host_adam_s(
    parameters: Real, memory_bytes_per_s: Real, shards: Real = 1.0, touched_bytes: Real = 28.0
) -> Real:
    """Seconds of the optimizer step on the host, memory-bound: ``28Ψ/(d·W)``.

    ``memory_bytes_per_s`` is the host bandwidth that one rank gets; ``touched_bytes`` per parameter is FP32
    Adam's: four values read, three written.

    >>> host_adam_s(10e9, 100e9)
    2.8
    """
    return 1.0 * touched_bytes * parameters / (shards * memory_bytes_per_s)


def zero_offload_step_s(
    compute_s: Real, down_s: Real, update_s: Real, up_s: Real, *, delayed: bool = False
) -> Real:
    """Seconds of a step: ``max(compute, gradients down) + update + parameters up``.

    With the delayed (one step stale) parameter update the host works beside the next step's compute:
    ``max(compute, down + update + up)``.

    >>> float(zero_offload_step_s(4.0, 1.0, 2.8, 1.0))
    7.8
    >>> float(zero_offload_step_s(4.0, 1.0, 2.8, 1.0, delayed=True))
    4.8
    """
    if delayed:
        return np.maximum(compute_s, down_s + update_s + up_s)
    return np.maximum(compute_s, down_s) + update_s + up_s


def arithmetic_intensity(
    state: Literal["parameters", "optimizer", "activations"],
    *,
    tokens: Real = 1.0,
    hidden: Real = 1.0,
    layers_per_checkpoint: Real = 1.0,
) -> Real:
    """FLOP per byte moved of a training step with full recomputation (ZeRO-Infinity, section 4).

    Parameters and gradients ``s·b``, optimizer states ``s·b/4``, activation checkpoints ``24·h·ci``;
    ``tokens`` is ``s·b`` on a device.

    >>> arithmetic_intensity("optimizer", tokens=2048), arithmetic_intensity("activations", hidden=2048)
    (512.0, 49152.0)
    """
    if state == "parameters":
        return 1.0 * tokens
    return 0.25 * tokens if state == "optimizer" else 24.0 * hidden * layers_per_checkpoint


def offload_efficiency(intensity: Real, bytes_per_s: Real, peak_flop_per_s: Real) -> Real:
    """Fraction of peak when transfers do not overlap compute: ``ait·bw/(ait·bw + peak)``.

    >>> offload_efficiency(1024, 70e9, 71.68e12)
    0.5
    """
    return 1.0 * intensity * bytes_per_s / (intensity * bytes_per_s + peak_flop_per_s)


def offload_required_bytes_per_s(efficiency: Real, intensity: Real, peak_flop_per_s: Real) -> Real:
    """Bandwidth that reaches an efficiency: ``peak·E/(ait·(1 − E))``.

    :func:`offload_efficiency` solved for it. Range: ``0 <= efficiency < 1``.

    >>> round(offload_required_bytes_per_s(0.9, 512, 70e12) / 1e12, 2)  # optimizer states, 2048 tokens
    1.23
    """
    return peak_flop_per_s * efficiency / (intensity * (1.0 - efficiency))


def gathered_host_bytes_per_s(ranks: Real, host_link_bytes_per_s: Real, collective_bytes_per_s: Real) -> Real:
    """Rate of parameters when each rank loads its shard and all gather: ``min(N·W_host, W_collective)``.

    >>> float(gathered_host_bytes_per_s(16, 12e9, 70e9)) / 1e9
    70.0
    """
    return np.minimum(1.0 * ranks * host_link_bytes_per_s, collective_bytes_per_s)


def interleaved_update_stride(host_s: Real, device_s: Real, transfer_s: Real) -> Real:
    """Every how many subgroups one is updated on the device: ``1 + (T_tr + T_gpu)/T_cpu``.

    Host and device then finish together. Times of one subgroup: on the host, on the device, moving its states
    both ways.

    >>> interleaved_update_stride(1.0, 0.1, 1.9)
    3.0
    """
    return 1.0 + (transfer_s + device_s) / host_s
