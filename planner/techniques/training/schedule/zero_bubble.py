"""Zero Bubble H1 and H2: the backward is split, and weight gradients fill what was the bubble.

What it does: B computes the input gradient alone, so that the stage before can go on; W, which nobody waits for, runs
    later. H1 keeps 1F1B's warm-up and runs W once i further backwards are done on stage i; H2 warms up with 2(p−i)−1
    forwards and delays W by 2i.
Saves: time: idle (p−1)(F+B−W) within a device's own span (H1), (p−1)(F+B−2W) (H2), where 1F1B idles (p−1)(F+B+W).
Costs: memory: the operands of weight gradients wait between B and W; H2 holds 2p−1 micro-batches. H2's figure is of a
    device's own span: the next step has to start before the last device has ended this one, so norms of gradients are
    checked after the update.
Assumes: H1 steps end with a barrier, H2 steps do not (``--enable-optimizer-post-validation``, as their authors run them);
    recompute runs in B; messages between stages are latency on the edge, not work on the device.
Source: Qi et al. 2024 (arXiv:2401.10241) §2, §4, Tables 1 and 2.
"""

from __future__ import annotations

import numpy as np

from planner.schedule.order import DeviceOps, Generator, Op, Shape, one_chunk
from planner.technique import Figure, Technique
from planner.techniques import figures
from planner.techniques.training.schedule.split_backward import hold_weight_inputs


def _h1(shape: Shape, device: int) -> DeviceOps:
    return _in_turn(shape, device, warm_up=shape.p - device, lag=device)


def _h2(shape: Shape, device: int) -> DeviceOps:
    return _in_turn(shape, device, warm_up=2 * (shape.p - device) - 1, lag=2 * device)


def _in_turn(shape: Shape, device: int, warm_up: int, lag: int) -> DeviceOps:
    """``warm_up`` forwards, then in turn B, the W of ``lag`` backwards ago, F; last the weight gradients left over."""
    k = np.arange(shape.m)
    turn = np.concatenate([3 * (k - warm_up) + 2, 3 * k, 3 * (k + lag) + 1])  # of all F, all B, all W
    rank = np.argsort(turn, kind="stable")
    kind = np.repeat([Op.F, Op.B, Op.W], shape.m)[rank]
    return kind, np.full(3 * shape.m, device), np.tile(k, 3)[rank]


H1 = Generator(
    "zb_h1", _h1, lambda shape: 3, problems=one_chunk, splits_backward=True, saturates=lambda p, v, m: np.minimum(m, 2 * p)
)  # fmt: skip
H2 = Generator(
    "zb_h2", _h2, lambda shape: 3, problems=one_chunk, splits_backward=True, barrier=False,
    saturates=lambda p, v, m: np.minimum(m, 4 * p),
)  # fmt: skip

_TABLE_1 = "Qi et al. 2024 (arXiv:2401.10241), Table 1"

TECHNIQUES = (
    Technique(
        key="zero_bubble",
        name="Zero Bubble H1",
        slot="schedule",
        choices=("zb_h1",),
        source="arXiv:2401.10241",
        summary="Weight gradients fill the bubble; the memory of 1F1B",
        figures=(
            Figure(
                "idle time within a device's span, p = 8, m = 32, F, B, W = 1, 1.1, 0.9: (p − 1)(F + B − W)",
                8.4,
                1e-9,
                _TABLE_1,
                lambda order: figures.span_bubble_s(order, 8, 32, 1, 1.0, 1.1, 0.9),
            ),
        ),
        apply=hold_weight_inputs,
        apart=True,
        order=H1,
        searched=False,
        active=lambda ctx: ctx.mesh.pp > 1,
    ),
    Technique(
        key="zero_bubble_h2",
        name="Zero Bubble H2",
        slot="schedule",
        choices=("zb_h2",),
        source="arXiv:2401.10241",
        summary="No bubble for twice the activations of 1F1B",
        figures=(
            Figure(
                "idle time within a device's span, p = 8, m = 32, F, B, W = 1, 1.1, 0.9: (p − 1)(F + B − 2W)",
                2.1,
                1e-9,
                _TABLE_1,
                lambda order: figures.span_bubble_s(order, 8, 32, 1, 1.0, 1.1, 0.9),
            ),
        ),
        apply=hold_weight_inputs,
        apart=True,
        order=H2,
        searched=False,
        active=lambda ctx: ctx.mesh.pp > 1,
    ),
)
