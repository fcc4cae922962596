"""Orders that are played out rather than written down: devices choose what to run next, as time goes on.

Some schedules are rules about time ("a backward as soon as there is one, a weight gradient where nothing else is ready").
A :class:`Board` keeps the time of every device and pass under nominal durations; :func:`play` lets the devices move,
earliest first, and what each has run is its list. Only the order counts: real durations are the engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from planner.schedule.order import LOOPED, DeviceOps, Ints, Op, Placement

__all__ = ["Board", "Move", "Pass", "play", "stretched"]

Pass: TypeAlias = tuple[int, int, int]
"""A pass of one micro-batch through one virtual stage: (operation, stage, micro-batch)."""
Move: TypeAlias = tuple[float, Pass]


class Board:
    """Where the devices of a pipeline stand.

    Attributes:
        p, m, v: devices, micro-batches, chunks per device.
        seconds: nominal duration of F, B and W of one chunk.
        placement: where virtual stages live.
        end_s: when each pass that has run ended.
        clock_s: when each device is free.
        live: chunks that each device holds, from F to W (to B where W is no operation of its own).
        ran: what each device has run.
    """

    def __init__(
        self, p: int, m: int, v: int, seconds: tuple[float, float, float] = (1.0, 1.0, 1.0), placement: Placement = LOOPED
    ) -> None:  # fmt: skip
        self.p, self.m, self.v, self.seconds, self.placement = p, m, v, seconds, placement
        self.end_s: dict[Pass, float] = {}
        self.clock_s, self.live = [0.0] * p, [0] * p
        self.ran: list[list[Pass]] = [[] for _ in range(p)]
        self.device_of_stage: Ints = placement.device_of_stage(p, v)
        self._upstream: list[int] = placement.upstream(p, v).tolist()
        self._downstream = [-1] * (p * v)
        for stage, before in enumerate(self._upstream):
            if before >= 0:
                self._downstream[before] = stage

    def stages(self, device: int) -> list[int]:
        """The virtual stages of a device."""
        found: list[int] = np.flatnonzero(self.device_of_stage == device).tolist()
        return found

    def ready_s(self, move: Pass) -> float | None:
        """When a pass has its input; None while that is not known. Its own stage is taken to run passes in order."""
        kind, stage, micro_batch = move
        if kind == Op.F:
            before = self._upstream[stage]
            return self.end_s.get((Op.F, before, micro_batch)) if before >= 0 else 0.0
        if kind == Op.B:
            after = self._downstream[stage]
            own = self.end_s.get((Op.F, stage, micro_batch))
            if after < 0 or own is None:
                return own
            return self.end_s.get((Op.B, after, micro_batch))
        return self.end_s.get((Op.B, stage, micro_batch))

    def device_ops(self, device: int) -> DeviceOps:
        """What a device has run, as an order's list."""
        kind, stage, micro_batch = np.array(self.ran[device], dtype=np.int64).T
        return kind, stage, micro_batch

    def neighbours(self, stage: int) -> list[int]:
        """The devices that send to a stage or receive from it."""
        beside = (self._upstream[stage], self._downstream[stage])
        return [int(self.device_of_stage[other]) for other in beside if other >= 0]

    def start_s(self, device: int, move: Pass) -> float | None:
        """When a device could start a pass."""
        ready = self.ready_s(move)
        return None if ready is None else max(ready, self.clock_s[device])

    def run(self, device: int, move: Move, *, frees: Op) -> None:
        """Runs a pass; ``frees`` is the operation that ends an activation's life."""
        start_s, passed = move
        kind = passed[0]
        self.clock_s[device] = self.end_s[passed] = start_s + self.seconds[kind]
        self.live[device] += (kind == Op.F) - (kind == frees)
        self.ran[device].append(passed)


def play(board: Board, choose: Callable[[Board, int], Move | None], *, frees: Op = Op.W) -> Board:
    """Lets the devices move until none wants to: of all moves that ``choose`` offers, the earliest goes first.

    What a device offers may depend on what it has run itself and on when its own passes are ready, so that only those whom a
    pass concerns are asked again.
    """
    moves = {device: move for device in range(board.p) if (move := choose(board, device)) is not None}
    while moves:
        device = min(moves, key=lambda d: (moves[d][0], d))
        stage = moves[device][1][1]
        board.run(device, moves[device], frees=frees)
        for concerned in {device, *board.neighbours(stage)}:
            move = choose(board, concerned)
            if move is None:
                moves.pop(concerned, None)
            else:
                moves[concerned] = move
    return board


def stretched(ops: DeviceOps, period: int, more: int) -> DeviceOps | None:
    """A device's list for ``more`` micro-batches: the ``period`` operations that its middle repeats, more often.

    None where the middle does not repeat.

    >>> f_and_b = np.array([0, 0, 1, 0, 1, 0, 1, 1]), np.zeros(8, int), np.array([0, 1, 0, 2, 1, 3, 2, 3])
    >>> kind, _, micro_batch = stretched(f_and_b, 2, 1)
    >>> kind.tolist(), micro_batch.tolist()
    ([0, 0, 1, 0, 1, 0, 1, 0, 1, 1], [0, 1, 0, 2, 1, 3, 2, 4, 3, 4])
    """
    kind, stage, micro_batch = ops
    middle = len(kind) // 2
    now, before = np.s_[middle : middle + period], np.s_[middle - period : middle]
    alike = np.array_equal(kind[now], kind[before]) and np.array_equal(stage[now], stage[before])
    if not alike or np.any(micro_batch[now] - micro_batch[before] != 1):
        return None
    later = np.repeat(np.arange(1, more + 1), period)
    tail = np.s_[middle:]
    return (
        np.concatenate([kind[:middle], np.tile(kind[before], more), kind[tail]]),
        np.concatenate([stage[:middle], np.tile(stage[before], more), stage[tail]]),
        np.concatenate(
            [micro_batch[:middle], np.tile(micro_batch[before], more) + later, micro_batch[tail] + more]
        ),
    )
