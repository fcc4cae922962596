"""Pipeline orders: which forward, backward and weight-gradient a device runs, one after another.

A :class:`Generator` is a schedule: it yields one device's list as three arrays (kind, virtual stage, micro-batch), says where
virtual stages live, and what the composer has to know beyond that. :func:`make_order` stacks the devices and adds what the engine
needs. The orders that everything else is compared with are here, by name (:data:`ORDERS`); every other schedule brings its
generator in its technique's file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from planner.costs.pipeline_bounds import bound_1f1b_s, bound_interleaved_s
from planner.errors import InvalidPlan, Problem, did_you_mean

__all__ = [
    "LOOPED",
    "ORDERS",
    "DeviceOps",
    "Generator",
    "Ints",
    "Op",
    "Order",
    "Placement",
    "Rule",
    "Shape",
    "alternate",
    "generator_of",
    "make_order",
    "micro_batch_group",
    "one_chunk",
    "repeated",
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


class Shape(NamedTuple):
    """The size of a pipeline: ``p`` devices, ``m`` micro-batches, ``v`` chunks per device, ``group``
    micro-batches that a chunk runs before the device turns to its next chunk (interleaved orders only)."""

    p: int
    m: int
    v: int
    group: int


class Placement(NamedTuple):
    """Where virtual stages live: stage ``c·p + j`` is chunk ``c`` of device ``j``, or, where ``folded``, of device ``p − 1 − j``
    for every other chunk, so that the pipeline turns back at its ends.

    ``copies`` pipelines run side by side, each with weights of its own: stages ``[k·n, (k + 1)·n)`` are pipeline ``k``, and a
    micro-batch passes one of them. With ``shared_ends``, every stage holds an equal part of the embedding and of the head.

    >>> Placement(folded=True).device_of_stage(3, 2).tolist(), Placement(folded=True, copies=2).upstream(3, 2).tolist()
    ([0, 1, 2, 2, 1, 0], [-1, 0, 1, -1, 3, 4])
    """

    folded: bool = False
    copies: int = 1
    shared_ends: bool = False

    def device_of_stage(self, p: int, v: int) -> Ints:
        """(p·v,) the device that holds a virtual stage."""
        chunk, device = np.divmod(np.arange(p * v), p)
        return np.where((chunk % 2 == 1) & self.folded, p - 1 - device, device)

    def upstream(self, p: int, v: int) -> Ints:
        """(p·v,) the stage whose output a stage reads, −1 for a pipeline's first."""
        stage = np.arange(p * v)
        return np.where(stage % (p * v // self.copies) == 0, -1, stage - 1)

    def by_chunk(self, stages: npt.NDArray[Any], p: int) -> npt.NDArray[Any]:
        """A table over virtual stages (p·v, …) as one over chunks and devices (v, p, …)."""
        chunks = stages.reshape(-1, p, *stages.shape[1:])
        if not self.folded:
            return chunks
        chunks = chunks.copy()
        chunks[1::2] = chunks[1::2, ::-1]
        return chunks

    def depth(self, p: int) -> Ints:
        """(p,) stages that a micro-batch passes before it first reaches a device."""
        device = np.arange(p)
        return np.minimum(device, p - 1 - device) if self.copies > 1 else device


LOOPED = Placement()


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
        leaves_after: (p, n) how many operations later what an operation sends leaves the device, where several run as one;
            None where everything leaves at once.
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
    leaves_after: Ints | None = None

    @property
    def n_virtual(self) -> int:
        """Number of virtual stages."""
        return len(self.device_of_stage)


class Rule(NamedTuple):
    """What a schedule asks of devices and micro-batches: ``holds(p, m)``, over arrays too."""

    where: str
    expected: str
    holds: Callable[[Any, Any], Any]


@dataclass(frozen=True, eq=False, slots=True)
class Generator:
    """A schedule: its order per device, and what the composer has to know of it.

    Attributes:
        name: of the schedule.
        device_ops: one device's list.
        period_ops: see :attr:`Order.period_ops`.
        rules: the devices and micro-batches that it accepts.
        problems: rules beyond these, with what to try.
        chunks: chunk counts per device, given the most that there are layers for.
        placement: where virtual stages live.
        splits_backward: weight gradients are operations of their own.
        leaves_after: one device's row of :attr:`Order.leaves_after`.
        barrier: all devices wait for each other between two steps. Without, a device goes on with the next step at once, and a
            step takes the period of many.
        flushes: all micro-batches of a step end before those of the next begin. An order that does not is asynchronous.
        alike_in_order: of neighbouring devices with equal chunks, the first holds most and the last waits longest; else every
            device is looked at.
        in_flight: micro-batches held by (p, m, device), where one chunk per device makes a formula of it.
        saturates: as few micro-batches as hold as much as many do, of (p, v, m).
        bound_s: lower bound of the step of unequal stages with hops, of (forward, backward, m, hop, lengths) by runs of equal
            stages, as in :mod:`planner.costs.pipeline_bounds`.
    """

    name: str
    device_ops: Callable[[Shape, int], DeviceOps]
    period_ops: Callable[[Shape], int]
    rules: tuple[Rule, ...] = ()
    problems: Callable[[Shape], list[Problem]] = lambda shape: []
    chunks: Callable[[int], Sequence[int]] = lambda most: (1,)
    placement: Placement = LOOPED
    splits_backward: bool = False
    leaves_after: Callable[[Shape, int], Ints] | None = None
    barrier: bool = True
    flushes: bool = True
    alike_in_order: bool = False
    in_flight: Callable[[Any, Any, Any], Any] | None = None
    saturates: Callable[[Any, Any, Any], Any] = lambda p, v, m: m
    bound_s: Callable[..., Any] | None = None

    def broken(self, shape: Shape) -> list[Problem]:
        """Everything that keeps the schedule from existing for a shape."""
        found = {"pp": shape.p, "micro_batches": shape.m}
        broken = [r for r in self.rules if not r.holds(shape.p, shape.m)]
        faults = [
            Problem(rule.where, str(found[rule.where]), f"{rule.expected} for {self.name}") for rule in broken
        ]
        return faults + self.problems(shape)


def generator_of(schedule: Generator | str) -> Generator:
    """The generator itself, or the one that :data:`ORDERS` has under a name.

    Raises:
        InvalidPlan: there is none.
    """
    if isinstance(schedule, Generator):
        return schedule
    if schedule not in ORDERS:
        hint = did_you_mean(schedule, ORDERS)
        raise InvalidPlan(Problem("schedule", schedule, f"one of {', '.join(sorted(ORDERS))}", hint))
    return ORDERS[schedule]


@lru_cache(maxsize=128)
def make_order(schedule: Generator | str, p: int, m: int, v: int = 1, group: int | None = None) -> Order:
    """The order of ``schedule`` for ``p`` devices, ``m`` micro-batches and ``v`` chunks per device.

    ``group`` is Megatron's micro-batch group size per virtual stage, :func:`micro_batch_group` by default.

    Raises:
        InvalidPlan: the schedule is unknown, or it does not exist for these sizes.

    >>> order = make_order("1f1b", 2, 3)
    >>> [f"{Op(k).name}{b}" for k, b in zip(order.kind[0], order.micro_batch[0])]
    ['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
    """
    generator = generator_of(schedule)
    shape = Shape(p, m, v, micro_batch_group(p, m) if group is None else group)
    sizes = {"pp": p, "micro_batches": m, "virtual_stages": v}
    problems = [Problem(name, str(size), "at least 1") for name, size in sizes.items() if size < 1]
    problems = problems or generator.broken(shape)
    if problems:
        raise InvalidPlan(problems)
    kind, stage, micro_batch = zip(*(generator.device_ops(shape, device) for device in range(p)), strict=True)
    later = generator.leaves_after
    return Order(
        schedule=generator.name,
        shape=shape,
        kind=np.stack(kind).astype(np.int8),
        stage=np.stack(stage).astype(np.int16),
        micro_batch=np.stack(micro_batch).astype(np.int32),
        device_of_stage=generator.placement.device_of_stage(p, v),
        upstream=generator.placement.upstream(p, v),
        period_ops=generator.period_ops(shape),
        splits_backward=generator.splits_backward,
        leaves_after=None if later is None else np.stack([later(shape, device) for device in range(p)]),
    )


@lru_cache(maxsize=32)
def repeated(schedule: Generator | str, p: int, m: int, v: int, steps: int) -> Order:
    """Several steps of a schedule without a barrier in between; of one without a flush, one long step.

    >>> repeated("1f1b", 2, 2, 1, 2).micro_batch[0].tolist()
    [0, 1, 0, 1, 2, 3, 2, 3]
    """
    generator = generator_of(schedule)
    if not generator.flushes:
        return make_order(generator, p, m * steps, v)
    one = make_order(generator, p, m, v)
    later = np.repeat(np.arange(steps), one.kind.shape[1]) * m
    return replace(
        one, shape=one.shape._replace(m=m * steps), kind=np.tile(one.kind, steps), stage=np.tile(one.stage, steps),
        micro_batch=np.tile(one.micro_batch, steps) + later,
        leaves_after=None if one.leaves_after is None else np.tile(one.leaves_after, steps),
    )  # fmt: skip


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
    return alternate((stage, k), (stage, k), shape.p - 1 - device)


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
    return alternate(forward, backward, 2 * (p - 1 - device) + (v - 1) * group)


def alternate(forward: tuple[Ints, Ints], backward: tuple[Ints, Ints], warm_up: int) -> DeviceOps:
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


def one_chunk(shape: Shape) -> list[Problem]:
    """The schedule has one chunk per device."""
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


def _saturated_interleaved(p: int, v: int, m: Any) -> Any:
    """Groups longer than ``p``, and their shorter last one, are taken as they are."""
    return np.minimum(m, np.where(np.mod(m, p) == 0, 2 * p, np.inf))


ORDERS: dict[str, Generator] = {
    "gpipe": Generator(
        "gpipe", _gpipe, lambda shape: 1, problems=one_chunk, alike_in_order=True,
        in_flight=lambda p, m, device: m + 0 * device,
    ),
    "1f1b": Generator(
        "1f1b", _1f1b, lambda shape: 2, problems=one_chunk, alike_in_order=True, bound_s=bound_1f1b_s,
        in_flight=lambda p, m, device: np.minimum(m, p - device), saturates=lambda p, v, m: np.minimum(m, p),
    ),
    "interleaved": Generator(
        "interleaved", _interleaved, lambda shape: 2 * shape.group * shape.v, problems=_interleaved_problems,
        chunks=lambda most: range(2, most + 1), alike_in_order=True, bound_s=bound_interleaved_s,
        saturates=_saturated_interleaved,
    ),
}  # fmt: skip
"""The orders that others are compared with."""
