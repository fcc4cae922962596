"""Pipeline orders: which forward, backward and weight-gradient a device runs, one after another.

A generator yields one device's list as three arrays (kind, virtual stage, micro-batch); :func:`make_order`
stacks the devices and adds what the engine needs to know: where a virtual stage lives and which stage feeds
it. A new schedule is one generator and one entry of :data:`ORDERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from planner.errors import InvalidPlan, Problem, did_you_mean

__all__ = [
    "ORDERS",
    "DeviceOps",
    "Generator",
    "Ints",
    "Op",
    "Order",
    "Shape",
    "make_order",
    "micro_batch_group",
]

Ints: TypeAlias = npt.NDArray[np.signedinteger[Any]]
DeviceOps: TypeAlias = tuple[Ints, Ints, Ints]


class Op(IntEnum):
    """What a device runs: forward, backward, weight gradient.

    ``B`` is the full backward, or the input gradient alone where the schedule splits it off from ``W``.
    """

    F = 0
    B = 1
    W = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a pipeline: ``p`` devices, ``m`` micro-batches, ``v`` chunks per device, ``group``
    micro-batches that a chunk runs before the device turns to its next chunk (interleaved orders only)."""

    p: int
    m: int
    v: int
    group: int


@dataclass(frozen=True, eq=False, slots=True)
class Order:
    """Every device's operations in the order it runs them.

    Attributes:
        kind, stage, micro_batch: (p, n) arrays; row ``r`` is device ``r``'s list.
        device_of_stage: (n_virtual,) the device that holds a virtual stage.
        upstream: (n_virtual,) the stage whose output a stage reads, −1 for the first.
        period_ops: operations of a device after which its steady list repeats with later micro-batches, 0 if
            it never does. A hint: the engine verifies it before using it.
        splits_backward: weight gradients are operations of their own.
    """

    schedule: str
    shape: Shape
    kind: Ints
    stage: Ints
    micro_batch: Ints
    device_of_stage: Ints
    upstream: Ints
    period_ops: int
    splits_backward: bool

    @property
    def n_virtual(self) -> int:
        """Number of virtual stages."""
        return len(self.device_of_stage)


@dataclass(frozen=True, slots=True)
class Generator:
    """A schedule: its order per device, its period, and the sizes it accepts."""

    device_ops: Callable[[Shape, int], DeviceOps]
    period_ops: Callable[[Shape], int]
    problems: Callable[[Shape], list[Problem]]
    splits_backward: bool = False


@lru_cache(maxsize=128)
def make_order(schedule: str, p: int, m: int, v: int = 1, group: int | None = None) -> Order:
    """The order of ``schedule`` for ``p`` devices, ``m`` micro-batches and ``v`` chunks per device.

    ``group`` is Megatron's micro-batch group size per virtual stage, :func:`micro_batch_group` by default.
    Virtual stage ``c·p + r`` is chunk ``c`` of device ``r``.

    Raises:
        InvalidPlan: the schedule is unknown, or it does not exist for these sizes.

    >>> order = make_order("1f1b", 2, 3)
    >>> [f"{Op(k).name}{b}" for k, b in zip(order.kind[0], order.micro_batch[0])]
    ['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
    """
    if schedule not in ORDERS:
        hint = did_you_mean(schedule, ORDERS)
        raise InvalidPlan(Problem("schedule", schedule, f"one of {', '.join(sorted(ORDERS))}", hint))
    generator, shape = ORDERS[schedule], Shape(p, m, v, micro_batch_group(p, m) if group is None else group)
    sizes = {"pp": p, "micro_batches": m, "virtual_stages": v}
    problems = [Problem(name, str(size), "at least 1") for name, size in sizes.items() if size < 1]
    problems = problems or generator.problems(shape)
    if problems:
        raise InvalidPlan(problems)
    kind, stage, micro_batch = zip(*(generator.device_ops(shape, device) for device in range(p)), strict=True)
    n_virtual = p * v
    return Order(
        schedule=schedule,
        shape=shape,
        kind=np.stack(kind).astype(np.int8),
        stage=np.stack(stage).astype(np.int16),
        micro_batch=np.stack(micro_batch).astype(np.int32),
        device_of_stage=np.arange(n_virtual) % p,
        upstream=np.arange(n_virtual) - 1,
        period_ops=generator.period_ops(shape),
        splits_backward=generator.splits_backward,
    )


def micro_batch_group(p: int, m: int) -> int:
    """How many micro-batches a chunk runs in a row where nobody says: ``p``, or else as few as Megatron-LM accepts.

    The last group has to be whole, or no shorter than ``p`` (``megatron/core/pipeline_parallel/schedules.py``); with fewer
    than ``p`` micro-batches nothing is accepted.

    >>> micro_batch_group(4, 8), micro_batch_group(4, 5), micro_batch_group(6, 16), micro_batch_group(6, 1000)
    (4, 5, 8, 7)
    """
    return next((n for n in range(max(p, 1), m + 1) if m % n == 0 or m % n >= p), p)


def _gpipe(shape: Shape, device: int) -> DeviceOps:
    """All forwards, then all backwards, last micro-batch first (Huang et al., arXiv:1811.06965, Figure
    2c)."""
    k = np.arange(shape.m)
    return np.repeat([Op.F, Op.B], shape.m), np.full(2 * shape.m, device), np.concatenate([k, k[::-1]])


def _1f1b(shape: Shape, device: int) -> DeviceOps:
    """``p − 1 − i`` forwards, then one forward and one backward in turn (Fan et al., arXiv:2007.01045)."""
    k = np.arange(shape.m)
    stage = np.full(shape.m, device)
    return _alternate((stage, k), (stage, k), shape.p - 1 - device)


def _interleaved(shape: Shape, device: int) -> DeviceOps:
    """Interleaved 1F1B: chunks take turns, a group of micro-batches each, after ``2(p−1−r) + (v−1)·group``
    forwards.

    Narayanan et al., arXiv:2104.04473, section 2.2; the group size and its ragged last group as in
    Megatron-LM, ``megatron/core/pipeline_parallel/schedules.py``.
    """
    p, m, v, group = shape.p, shape.m, shape.v, shape.group
    k = np.arange(m * v)
    first = k // (group * v) * group  # first micro-batch of the group that operation k belongs to
    width = np.minimum(group, m - first)
    chunk, offset = np.divmod(k - first * v, width)
    micro_batch = first + offset
    forward = (chunk * p + device, micro_batch)
    backward = ((v - 1 - chunk) * p + device, micro_batch)
    return _alternate(forward, backward, 2 * (p - 1 - device) + (v - 1) * group)


def _zb_h1(shape: Shape, device: int) -> DeviceOps:
    """ZB-H1: 1F1B's activations; weight gradients wait for ``i`` backwards (Qi et al., arXiv:2401.10241)."""
    return _zero_bubble(shape, device, warm_up=shape.p - device, lag=device)


def _zb_h2(shape: Shape, device: int) -> DeviceOps:
    """ZB-H2: about twice the activations; weight gradients wait for ``2i`` backwards (Qi et al.,
    arXiv:2401.10241)."""
    return _zero_bubble(shape, device, warm_up=2 * (shape.p - device) - 1, lag=2 * device)


def _alternate(forward: tuple[Ints, Ints], backward: tuple[Ints, Ints], warm_up: int) -> DeviceOps:
    """``warm_up`` forwards, then F, B in turn until the forwards run out, then the rest of the backwards."""
    total = len(forward[0])
    w = min(total, warm_up)
    k = np.arange(total)
    at_f = np.where(k < w, k, 2 * k - w)
    at_b = np.where(k + w < total, 2 * k + w + 1, total + k)
    kind, stage, micro_batch = (np.empty(2 * total, dtype=np.int64) for _ in range(3))
    for at, op, (op_stage, op_micro_batch) in ((at_f, Op.F, forward), (at_b, Op.B, backward)):
        kind[at], stage[at], micro_batch[at] = op, op_stage, op_micro_batch
    return kind, stage, micro_batch


def _zero_bubble(shape: Shape, device: int, warm_up: int, lag: int) -> DeviceOps:
    """``warm_up`` forwards, then in turn B, the W of ``lag`` backwards ago, F; last the weight gradients left
    over."""
    k = np.arange(shape.m)
    turn = np.concatenate([3 * (k - warm_up) + 2, 3 * k, 3 * (k + lag) + 1])  # of all F, all B, all W
    rank = np.argsort(turn, kind="stable")
    kind = np.repeat([Op.F, Op.B, Op.W], shape.m)[rank]
    return kind, np.full(3 * shape.m, device), np.tile(k, 3)[rank]


def _one_chunk(shape: Shape) -> list[Problem]:
    if shape.v == 1:
        return []
    return [Problem("virtual_stages", str(shape.v), "1 for this schedule", "Use schedule interleaved")]


def _interleaved_problems(shape: Shape) -> list[Problem]:
    problems = []
    if shape.v == 1:
        problems.append(Problem("virtual_stages", "1", "at least 2 for interleaved", "Use schedule 1f1b"))
    if not shape.p <= shape.group <= shape.m:
        expected = f"between pp = {shape.p} and micro_batches = {shape.m}"
        problems.append(Problem("micro_batch_group", str(shape.group), expected))
    elif 0 < shape.m % shape.group < shape.p:
        found = f"{shape.m}, which leaves a last group of {shape.m % shape.group}"
        expected = f"a multiple of the group size {shape.group}, or a rest of at least pp = {shape.p}"
        problems.append(Problem("micro_batches", found, expected))
    return problems


ORDERS: dict[str, Generator] = {
    "gpipe": Generator(_gpipe, lambda shape: 1, _one_chunk),
    "1f1b": Generator(_1f1b, lambda shape: 2, _one_chunk),
    "interleaved": Generator(_interleaved, lambda shape: 2 * shape.group * shape.v, _interleaved_problems),
    "zb-h1": Generator(_zb_h1, lambda shape: 3, _one_chunk, splits_backward=True),
    "zb-h2": Generator(_zb_h2, lambda shape: 3, _one_chunk, splits_backward=True),
}
