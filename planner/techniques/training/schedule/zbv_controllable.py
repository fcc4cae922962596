"""ZB-V, V-Half, V-Min: two chunks per device in a V, and memory chosen by how far apart a micro-batch's passes are.

What it does: device r holds stages r and 2p−1−r, so that the last stage lies where the first does. All micro-batches run
    the same building block, six slots apart; its steps from device to device decide how long activations live.
Saves: memory, evenly on all devices: the activations of 1F1B's first device (ZB-V), half of them (V-Half), a third
    (V-Min).
Costs: messages twice; the operands of weight gradients wait between B and W; where forward, input and weight gradient
    take unlike time, slots no longer meet and idle time appears (most of all in V-Min).
Assumes: V-Half and V-Min steps end with a barrier, ZB-V steps do not, as their authors run them; recompute runs in B.
Source: Qi et al. 2024 (arXiv:2405.15362) §3; github.com/sail-sg/zero-bubble-pipeline-parallelism, README.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

from planner.schedule.board import Board, Pass, play, stretched
from planner.schedule.order import DeviceOps, Generator, Ints, Op, Placement, Shape
from planner.technique import Figure, Technique
from planner.techniques import figures
from planner.techniques.training.schedule.split_backward import hold_weight_inputs

_SLOTS = 6  # F, B and W of two chunks: the interval between micro-batches


@lru_cache(maxsize=64)
def building_block(p: int, steps: tuple[int, int, int, int]) -> Ints:
    """Slots of one micro-batch's passes on every device, (6, p): F of chunks 0 and 1, B of 1 and 0, W of 1 and 0.

    ``steps`` are the slots from a device to the next in each of the four sweeps (forward down, up; backward down, up). A
    micro-batch's activations live ``(2p)·(down + up)`` slots on a device, over both chunks. Between sweeps lie as few slots as
    keep all six passes of every device apart, modulo the interval.

    >>> building_block(2, (1, 1, 1, 1))[:4].tolist()
    [[0, 1], [3, 2], [4, 5], [7, 6]]
    """
    device = np.arange(p)
    found = [_sweeps(device, steps, turns) for turns in product(range(1, _SLOTS + 1), repeat=3)]
    fitting = [sweeps for sweeps in found if _apart(sweeps)]
    sweeps = min(fitting, key=lambda block: int(block.max()))
    weights = []
    taken = sweeps
    for backward in sweeps[2:]:
        after = [backward + 1 + wait for wait in range(_SLOTS)]
        slot = np.stack(after)[
            np.argmax([~np.any((taken - s) % _SLOTS == 0, axis=0) for s in after], axis=0), device
        ]
        weights.append(slot)
        taken = np.concatenate([taken, slot[None]])
    return np.concatenate([sweeps, np.stack(weights)])


def _sweeps(device: Ints, steps: tuple[int, int, int, int], turns: tuple[int, ...]) -> Ints:
    last = device[-1]
    down = steps[0] * device
    up = down[-1] + turns[0] + steps[1] * (last - device)
    back = up[0] + turns[1] + steps[2] * device
    home = back[-1] + turns[2] + steps[3] * (last - device)
    return np.stack([down, up, back, home])


def _apart(sweeps: Ints) -> bool:
    slots = np.sort(sweeps % _SLOTS, axis=0)
    return bool(np.all(np.diff(slots, axis=0) > 0))


class _Block(NamedTuple):
    """The building block's sweeps, and whether forwards may run ahead of it into idle time, as far as memory allows."""

    steps: tuple[int, int, int, int]
    eager: bool

    def device_ops(self, shape: Shape, device: int) -> DeviceOps:
        """One device's list."""
        return _lists(shape.p, shape.m, self)[device]


@lru_cache(maxsize=64)
def _lists(p: int, m: int, block: _Block) -> list[DeviceOps]:
    """All devices' lists; those of a long step are those of a shorter one, stretched."""
    enough = 6 * p
    if m > enough:
        short = _played(p, enough, block)
        longer = [stretched(short.device_ops(device), _SLOTS, m - enough) for device in range(p)]
        found = [ops for ops in longer if ops is not None]
        if len(found) == p:
            return found
    board = _played(p, m, block)
    return [board.device_ops(device) for device in range(p)]


@lru_cache(maxsize=64)
def _played(p: int, m: int, block: _Block) -> Board:
    """Forwards and backwards in the block's order; weight gradients slide into idle time, or make room for a forward."""
    slots = building_block(p, block.steps)
    board = Board(p, m, 2, placement=Placement(folded=True))
    devices = [_Device(slots[:, device], board.stages(device), m, block.eager) for device in range(p)]
    held = max(device.most_held for device in devices)

    def choose(board: Board, device: int) -> tuple[float, Pass] | None:
        return devices[device].next(board, device, held)

    return play(board, choose)


class _Device:
    """What one device has still to run: forwards and backwards in the block's order, and weight gradients that wait."""

    def __init__(self, slots: Ints, stages: list[int], m: int, eager: bool) -> None:
        low, high = stages
        passes = ((Op.F, low), (Op.F, high), (Op.B, high), (Op.B, low), (Op.W, high), (Op.W, low))
        timed = sorted(
            (int(slot) + _SLOTS * k, int(op), stage, k)
            for slot, (op, stage) in zip(slots, passes, strict=True)
            for k in range(m)
        )
        holds = np.cumsum([(op == Op.F) - (op == Op.W) for _, op, *_ in timed])
        self.most_held = int(holds.max())
        self.todo = [(op, stage, k) for _, op, stage, k in timed if op != Op.W]
        self.ahead = [(int(Op.F), low, k) for k in range(m if eager else 0)]
        self.waiting: deque[Pass] = deque()
        self.early: set[Pass] = set()
        self.seen = self.at = self.forwards = 0

    def next(self, board: Board, device: int, held: int) -> tuple[float, Pass] | None:
        """The next pass and its start: a weight gradient or a forward of the first chunk where the next in order has to wait.

        What starts first on any device runs first, so that a pass whose input has no time yet waits for at least one slot.
        """
        self._follow(board.ran[device])
        now = board.clock_s[device]
        weight = (now, self.waiting[0]) if self.waiting else None
        if self.at == len(self.todo):
            return weight
        following = self.todo[self.at]
        start = board.start_s(device, following)
        idle = start is None or start >= now + 1.0
        if weight and (idle or (following[0] == Op.F and board.live[device] >= held)):
            return weight
        if idle and self.forwards < len(self.ahead) and board.live[device] < held - 1:
            forward = self.ahead[self.forwards]
            early = board.start_s(device, forward)
            if forward != following and early is not None and (start is None or early + 1.0 <= start):
                return early, forward
        return None if start is None else (start, following)

    def _follow(self, ran: list[Pass]) -> None:
        """Takes note of what has run since."""
        for op, stage, k in ran[self.seen :]:
            if op == Op.W:
                self.waiting.popleft()
                continue
            if op == Op.B:
                self.waiting.append((int(Op.W), stage, k))
            if self.forwards < len(self.ahead) and (op, stage, k) == self.ahead[self.forwards]:
                self.forwards += 1
            self.early.add((op, stage, k))
        self.seen = len(ran)
        while self.at < len(self.todo) and self.todo[self.at] in self.early:
            self.at += 1


def _generator(name: str, steps: tuple[int, int, int, int], *, eager: bool, barrier: bool) -> Generator:
    return Generator(
        name, _Block(steps, eager).device_ops, lambda shape: _SLOTS, chunks=lambda most: (2,) if most > 1 else (),
        placement=Placement(folded=True), splits_backward=True, barrier=barrier,
        saturates=lambda p, v, m: np.minimum(m, 4 * p),
    )  # fmt: skip


ZBV = _generator("zbv", (4, 2, 4, 2), eager=True, barrier=False)
V_HALF = _generator("v_half", (1, 2, 1, 2), eager=False, barrier=True)
V_MIN = _generator("v_min", (1, 1, 1, 1), eager=False, barrier=True)

_README = "github.com/sail-sg/zero-bubble-pipeline-parallelism, README, comparison of schedules, F = B = W"


def _rate(order: Generator | str) -> float:
    """Bubble rate relative to 1F1B's, 16 devices and 64 micro-batches, with F = B = W."""
    return figures.bubble_s(order, 16, 64, 2, 1.0, 1.0, 1.0) / (3.0 * 15)


def _held(order: Generator | str) -> float:
    """Activations relative to 1F1B's first device, between F and B, 48 devices."""
    return figures.in_flight(order, 48, 192, 2, None) / (2.0 * 48)


TECHNIQUES = (
    Technique(
        key="zbv_controllable",
        name="ZB-V",
        slot="schedule",
        choices=("zbv",),
        source="arXiv:2401.10241",
        summary="No bubble with the activations of 1F1B, from two chunks in a V",
        figures=(
            Figure(
                "idle time of a device's span relative to 1F1B's, taken from 1",
                1.0,
                1e-9,
                _README,
                lambda order: (
                    1.0
                    - figures.span_bubble_s(order, 8, 32, 2) / figures.bubble_s("1f1b", 8, 32, 1, 1.0, 2.0)
                ),
            ),
            Figure(
                "chunks held, 8 devices: all stages of a micro-batch, as the first device of 1F1B",
                16.0,
                1e-9,
                _README,
                lambda order: figures.in_flight(order, 8, 32, 2, None),
            ),
        ),
        apply=hold_weight_inputs,
        apart=True,
        order=ZBV,
        searched=False,
        active=lambda ctx: ctx.mesh.pp > 1,
    ),
    Technique(
        key="v_half",
        name="V-Half",
        slot="schedule",
        choices=("v_half",),
        source="arXiv:2405.15362",
        summary="Half the bubble and half the activations of 1F1B",
        figures=(Figure("bubble rate relative to 1F1B: 1/2", 0.5, 0.08, _README, _rate),),
        apply=hold_weight_inputs,
        apart=True,
        order=V_HALF,
        searched=False,
        active=lambda ctx: ctx.mesh.pp > 1,
    ),
    Technique(
        key="v_min",
        name="V-Min",
        slot="schedule",
        choices=("v_min",),
        source="arXiv:2405.15362",
        summary="A third of the activations of 1F1B, two thirds of its bubble",
        figures=(Figure("bubble rate relative to 1F1B: 2/3 and an overhead", 2 / 3, 0.08, _README, _rate),),
        apply=hold_weight_inputs,
        apart=True,
        order=V_MIN,
        searched=False,
        active=lambda ctx: ctx.mesh.pp > 1,
    ),
)
