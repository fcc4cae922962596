"""Breadth-first looping: every chunk runs all micro-batches before the device turns to the next one.

What it does: device r holds chunks r, r+p, …; all forwards, chunk after chunk, then all backwards, last chunk first.
    Depth-first looping, a few micro-batches at a time, is the schedule ``interleaved``.
Saves: the bubble, divided by v, with fewer than p micro-batches too; with sharded weights, a chunk's are gathered once.
Costs: messages × v; activations of all micro-batches, as in GPipe.
Assumes: messages between stages are latency on the edge, not work on the device.
Source: Lamy-Poirier 2023 (arXiv:2211.05953) §4.
"""

from __future__ import annotations

import numpy as np

from planner.schedule.order import DeviceOps, Generator, Op, Shape
from planner.technique import Figure, Technique
from planner.techniques import figures


def _device_ops(shape: Shape, device: int) -> DeviceOps:
    chunk, k = np.divmod(np.arange(shape.m * shape.v), shape.m)
    stage = chunk * shape.p + device
    kind = np.repeat([Op.F, Op.B], len(k))
    return kind, np.concatenate([stage, stage[::-1]]), np.concatenate([k, k])


ORDER = Generator("breadth_first", _device_ops, lambda shape: 0, chunks=lambda most: range(2, most + 1))

TECHNIQUE = Technique(
    key="breadth_first",
    name="Breadth-first pipeline",
    slot="schedule",
    choices=("breadth_first",),
    source="arXiv:2211.05953",
    summary="Several chunks per device, each with all micro-batches in turn",
    figures=(
        Figure(
            "slots of the first device, idle ones included: 8 devices, 4 chunks, 8 micro-batches, T_B = T_F",
            78.0,
            1e-9,
            "github.com/pytorch/pytorch @00722e6, distributed/pipelining/schedules.py: ScheduleLoopedBFS, the list of rank 0",
            lambda order: 4 * figures.makespan_s(order, 8, 8, 4, 1.0, 1.0),
        ),
    ),
    order=ORDER,
    searched=False,
    active=lambda ctx: ctx.mesh.pp > 1,
)
