"""What an order keeps in memory: live activations per device, and their peak in bytes.

A device runs its list serially, so its peak is over its own list and needs no times. An activation lives from
the start of its forward to the end of its backward; where the backward is split, what the weight gradient
still needs lives to the end of ``W``.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from planner.schedule.order import Ints, Op, Order

__all__ = ["in_flight", "peak_bytes"]


def in_flight(order: Order, release: Op | None = None) -> Ints:
    """Largest number of live activations (chunk × micro-batch) on each device, (p,).

    ``release`` is the operation whose end frees an activation: by default ``W`` where the backward is split,
    else ``B``.

    >>> from planner.schedule.order import make_order
    >>> in_flight(make_order("1f1b", 4, 8)).tolist(), in_flight(make_order("gpipe", 4, 8)).tolist()
    ([4, 3, 2, 1], [8, 8, 8, 8])
    """
    if release is None:
        release = Op.W if order.splits_backward else Op.B
    allocated = np.cumsum(order.kind == Op.F, axis=1)
    freed = np.cumsum(order.kind == release, axis=1) - (order.kind == release)
    peak: Ints = (allocated - freed).max(axis=1)
    return peak


def peak_bytes(
    order: Order,
    activation_bytes: npt.ArrayLike,
    *,
    weight_input_bytes: npt.ArrayLike | None = None,
    forward_transient_bytes: npt.ArrayLike = 0.0,
    backward_transient_bytes: npt.ArrayLike = 0.0,
) -> npt.NDArray[np.float64]:
    """Peak bytes of activations and transients on each device over its list, (p, *batch).

    Args:
        order: the order that the device runs.
        activation_bytes: (n_virtual, *batch) kept by a stage for one micro-batch, from F to B.
        weight_input_bytes: (n_virtual, *batch) the part that lives on to W; all of it by default. Unused
            where the order does not split the backward.
        forward_transient_bytes, backward_transient_bytes: (n_virtual, *batch) or broadcastable: extra bytes
            that exist only while the stage's F, or its B, runs.

    >>> from planner.schedule.order import make_order
    >>> peak_bytes(make_order("1f1b", 2, 4), [10.0, 20.0], backward_transient_bytes=[3.0, 5.0]).tolist()
    [23.0, 25.0]
    """
    kept = np.asarray(activation_bytes, dtype=float)
    on_to_w = kept if weight_input_bytes is None else np.asarray(weight_input_bytes, dtype=float)
    transients = [np.asarray(x, dtype=float) for x in (forward_transient_bytes, backward_transient_bytes)]
    shape = np.broadcast_shapes(kept.shape, on_to_w.shape, *(x.shape for x in transients))
    size = int(np.prod(shape[1:]))
    table = [np.broadcast_to(x, shape).reshape(shape[0], size) for x in (kept, on_to_w, *transients)]
    transient = np.concatenate([*table[2:], np.zeros((shape[0], size))])  # no transient of W
    peaks = []
    for stages, kept_count, w_count, opcode in _configurations(order):
        live = kept_count @ table[0][stages] + w_count @ table[1][stages] + transient[opcode]
        peaks.append(live.max(axis=0))
    return np.stack(peaks).reshape(len(peaks), *shape[1:])


@lru_cache(maxsize=64)
def _configurations(order: Order) -> tuple[tuple[Ints, Ints, Ints, Ints], ...]:
    """Per device what it holds at its operations: its stages, live counts (n, stages) before B and before W,
    opcode.

    An operation that holds just what the one a period earlier held is left out.
    """
    result = []
    for device, (kind, stage) in enumerate(zip(order.kind, order.stage, strict=True)):
        stages = np.flatnonzero(order.device_of_stage == device)
        own = stage[:, None] == stages
        started, done, wrote = (np.cumsum(own & (kind == op)[:, None], axis=0) for op in Op)
        done, wrote = (count - (own & (kind == op)[:, None]) for op, count in ((Op.B, done), (Op.W, wrote)))
        before_w = done - wrote if order.splits_backward else np.zeros_like(done)
        opcode = kind * np.int64(order.n_virtual) + stage
        row = np.concatenate([started - done, before_w, opcode[:, None]], axis=1)
        new = np.ones(len(row), dtype=bool)
        if 0 < order.period_ops < len(row):
            new[order.period_ops :] = (row[order.period_ops :] != row[: -order.period_ops]).any(axis=1)
        result.append((stages, (started - done)[new], before_w[new], opcode[new]))
    return tuple(result)
