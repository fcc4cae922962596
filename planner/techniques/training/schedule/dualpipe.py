"""DualPipe and DualPipeV: forwards of one direction run beside backwards of the other, weight gradients fill what is left.

What it does: as in Chimera, two pipelines run in opposite directions (DualPipe), or one in a V through two chunks per
    device (DualPipeV, for half as many devices and one copy of the weights). Eight phases per device: forwards of the
    near direction; of both; backward, weight gradient and forward of the far one; pairs of a forward and a backward in
    turn; the mirror image of the first three, with weight gradients put off; weight gradients.
Saves: time: idle (p/2−1)(F&B + B − 3W) with the full backward B, where 1F1B idles (p−1)(F+B).
Costs: weights, gradients and states twice (DualPipe); p+1 micro-batches of activations.
Assumes: a pair takes the time of its forward and backward: what its communication overlaps beyond that is left to the
    operators. Backwards that do not put their weight gradient off pass their input gradient on before it.
Source: DeepSeek-AI 2024 (arXiv:2412.19437) §3.2.1; github.com/deepseek-ai/DualPipe, dualpipe.py, dualpipev.py, README.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import numpy as np

from planner.ledger import Ledger
from planner.schedule.order import DeviceOps, Generator, Ints, Op, Placement, Rule, Shape
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.training.schedule.bidirectional import (
    BIDIRECTIONAL,
    EVEN_DEVICES,
    EVEN_MICRO_BATCHES,
    sum_copies,
)
from planner.techniques.training.schedule.rules import accepts
from planner.techniques.training.schedule.split_backward import hold_weight_inputs


class _List:
    """A device's list while it is written. Phase 0 is the direction (or chunk) that reaches the device first, 1 the other.

    ``passes`` are (operation, stage, micro-batch, operations until its output leaves).
    """

    def __init__(self, stages: tuple[int, int], micro_batches: tuple[range, range]) -> None:
        self.stages = stages
        self.left = {(op, phase): iter(micro_batches[phase]) for op in (Op.F, Op.B) for phase in (0, 1)}
        self.passes: list[tuple[int, int, int, int]] = []
        self.put_off: deque[tuple[int, int]] = deque()

    def forward(self, phase: int, leaves_after: int = 0) -> None:
        """A forward on its own."""
        self.passes.append((Op.F, self.stages[phase], next(self.left[Op.F, phase]), leaves_after))

    def backward(self, phase: int, *, put_off: bool = False) -> None:
        """A full backward, or one whose weight gradient is put off."""
        stage, k = self.stages[phase], next(self.left[Op.B, phase])
        self.passes.append((Op.B, stage, k, int(not put_off)))
        if put_off:
            self.put_off.append((stage, k))
        else:
            self.passes.append((Op.W, stage, k, 0))

    def weight(self) -> None:
        """The weight gradient that was put off first."""
        self.passes.append((Op.W, *self.put_off.popleft(), 0))

    def pair(self, forward: int, backward: int) -> None:
        """A forward and a full backward that run as one."""
        self.forward(forward, leaves_after=2)
        self.backward(backward)


def _eight_phases(todo: _List, near: int, depth: int, each: int) -> Ints:
    """The list of device ``near`` of ``depth``, from an end of the pipeline to its turn; ``each`` micro-batches a phase."""
    inner = depth - near - 1
    for _ in range(2 * inner):
        todo.forward(0)
    for _ in range(near + 1):
        todo.forward(0)
        todo.forward(1)
    for _ in range(inner):
        todo.backward(1, put_off=True)
        todo.weight()
        todo.forward(1)
    for i in range(each - 2 * depth + near + 1):
        if (
            i == 0 and inner == 0
        ):  # the turn: its first two do not run as one, so that the forward goes on at once
            todo.forward(0)
            todo.backward(1)
        else:
            todo.pair(0, 1)
        todo.pair(1, 0)
    for _ in range(inner):
        todo.backward(1)
        todo.pair(1, 0)
    put_off = False
    for i in range(near + 1):
        half = i == (near + 1) // 2
        put_off = put_off or (half and near % 2 == 1)
        todo.backward(1, put_off=put_off)
        put_off = put_off or (half and near % 2 == 0)
        todo.backward(0, put_off=put_off)
    for _ in range(inner):
        todo.weight()
        todo.backward(0, put_off=True)
    for _ in range(near + 1):
        todo.weight()
    return np.array(todo.passes, dtype=np.int64).T


@lru_cache(maxsize=1024)
def _both_ways(shape: Shape, device: int) -> Ints:
    p, mirrored = shape.p, shape.p - 1 - device
    down, up = (device, range(0, shape.m, 2)), (p + mirrored, range(1, shape.m, 2))
    near, far = (down, up) if device < mirrored else (up, down)
    return _eight_phases(
        _List((near[0], far[0]), (near[1], far[1])), min(device, mirrored), p // 2, shape.m // 2
    )


@lru_cache(maxsize=1024)
def _in_a_v(shape: Shape, device: int) -> Ints:
    stages, every = (device, 2 * shape.p - 1 - device), range(shape.m)
    return _eight_phases(_List(stages, (every, every)), device, shape.p, shape.m)


_Rows: TypeAlias = Callable[[Shape, int], Ints]


def _generator(name: str, rows: _Rows, rules: tuple[Rule, ...], placement: Placement) -> Generator:
    def device_ops(shape: Shape, device: int) -> DeviceOps:
        kind, stage, micro_batch, _ = rows(shape, device)
        return kind, stage, micro_batch

    return Generator(
        name, device_ops, lambda shape: 6, rules=rules, chunks=lambda most: (2,) if most > 1 else (), placement=placement,
        splits_backward=True, leaves_after=lambda shape, device: rows(shape, device)[3],
        saturates=lambda p, v, m: np.minimum(m, 4 * p),
    )  # fmt: skip


_ENOUGH = Rule("micro_batches", "at least 2·pp", lambda p, m: m >= 2 * p)
BOTH_WAYS = _generator("dualpipe", _both_ways, (EVEN_DEVICES, EVEN_MICRO_BATCHES, _ENOUGH), BIDIRECTIONAL)
IN_A_V = _generator("dualpipev", _in_a_v, (_ENOUGH,), Placement(folded=True))

_README = "github.com/deepseek-ai/DualPipe, README, bubbles and memory, F = 1, B = 2, W = 1, F&B = F + B"


def _copies_and_operands(ledger: Ledger, ctx: Context) -> Ledger:
    return hold_weight_inputs(sum_copies(ledger, ctx), ctx)


TECHNIQUES = (
    Technique(
        key="dualpipe",
        name="DualPipe",
        slot="schedule",
        choices=("dualpipe",),
        source="arXiv:2412.19437",
        summary="Pairs of a forward and a backward from two directions",
        figures=(
            Figure(
                "idle time, 16 devices: (PP/2 − 1)(F&B + B − 3W)",
                14.0,
                1e-9,
                _README,
                lambda order: figures.bubble_s(order, 16, 64, 2, 1.0, 1.0, 1.0),
            ),
            Figure(
                "micro-batches held, 16 devices: PP + 1",
                17.0,
                1e-9,
                _README,
                lambda order: figures.in_flight_to_backward(order, 16, 64, 2),
            ),
        ),
        valid=accepts(BOTH_WAYS, copies=True),
        apply=_copies_and_operands,
        order=BOTH_WAYS,
        searched=False,
        active=lambda ctx: ctx.mesh.pp > 1,
    ),
    Technique(
        key="dualpipev",
        name="DualPipeV",
        slot="schedule",
        choices=("dualpipev",),
        source="arXiv:2412.19437",
        summary="DualPipe cut in half: one copy of the weights, two chunks per device in a V",
        figures=(
            Figure(
                "idle time of 8 devices, in chunks of half a device: (16/2 − 1)(F&B + B − 3W)",
                14.0,
                1e-9,
                _README,
                lambda order: 2.0 * figures.bubble_s(order, 8, 32, 2, 1.0, 1.0, 1.0),
            ),
        ),
        valid=accepts(IN_A_V),
        apply=hold_weight_inputs,
        apart=True,
        order=IN_A_V,
        searched=False,
        active=lambda ctx: ctx.mesh.pp > 1,
    ),
)
