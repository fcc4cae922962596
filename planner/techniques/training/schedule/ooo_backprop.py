"""Out-of-order backpropagation: input gradients hurry ahead through all stages, weight gradients follow.

What it does: all forwards, then all input gradients, then all weight gradients, which no stage waits for.
Saves: (p−1)·W of GPipe's bubble (p−1)(F+B+W).
Costs: activations of all micro-batches, and the operands of all their weight gradients.
Assumes: steps end with a barrier; messages between stages are latency on the edge, not work on the device.
Source: Oh et al. 2022 (EuroSys, doi:10.1145/3492321.3519563) §5.2, gradient fast-forwarding.
"""

from __future__ import annotations

import numpy as np

from planner.schedule.order import DeviceOps, Generator, Op, Shape, one_chunk
from planner.technique import Figure, Technique
from planner.techniques import figures
from planner.techniques.training.schedule.split_backward import hold_weight_inputs


def _device_ops(shape: Shape, device: int) -> DeviceOps:
    k = np.arange(shape.m)
    kind = np.repeat([Op.F, Op.B, Op.W], shape.m)
    return kind, np.full(3 * shape.m, device), np.concatenate([k, k[::-1], k[::-1]])


ORDER = Generator("ooo", _device_ops, lambda shape: 1, problems=one_chunk, splits_backward=True)

TECHNIQUE = Technique(
    key="ooo_backprop",
    name="Out-of-order backpropagation",
    slot="schedule",
    choices=("ooo",),
    source="doi:10.1145/3492321.3519563",
    summary="Input gradients first, weight gradients where nothing waits",
    figures=(
        Figure(
            "idle time of 8 stages, F = B = W = 1: (p − 1)(F + B), weight gradients being off the path between stages",
            14.0,
            1e-9,
            "Oh et al. 2022 (doi:10.1145/3492321.3519563), section 5.2: weight gradients leave the critical path",
            lambda order: figures.bubble_s(order, 8, 16, 1, 1.0, 1.0, 1.0),
        ),
    ),
    apply=hold_weight_inputs,
    apart=True,
    order=ORDER,
    searched=False,
    active=lambda ctx: ctx.mesh.pp > 1,
)
