"""Work-conserving orders: a device that is free runs what is ready, backwards first, within what it may hold.

Earlier micro-batches go before later ones, which drains what is in flight. Weight gradients, where the schedule splits
them off, run where nothing else is ready, or where a forward waits for their memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from planner.schedule.board import Board, Move, Pass, play
from planner.schedule.order import LOOPED, DeviceOps, Op, Placement, Shape

__all__ = ["Greedy"]


class Greedy(NamedTuple):
    """A work-conserving order.

    Attributes:
        limit: chunks that a device may hold at once, of (shape, device).
        seconds: nominal durations of F, B and W.
        placement: where virtual stages live.
        splits_backward: weight gradients are operations of their own.
    """

    limit: Callable[[Shape, int], int]
    seconds: tuple[float, float, float]
    placement: Placement = LOOPED
    splits_backward: bool = False

    def device_ops(self, shape: Shape, device: int) -> DeviceOps:
        """One device's list."""
        return self.played(shape).device_ops(device)

    def played(self, shape: Shape) -> Board:
        """The board after all micro-batches."""
        return _played(shape, self)


@lru_cache(maxsize=64)
def _played(shape: Shape, rule: Greedy) -> Board:
    board = Board(shape.p, shape.m, shape.v, rule.seconds, rule.placement)
    devices = [_Device(board, device, rule.limit(shape, device), rule) for device in range(shape.p)]
    frees = Op.W if rule.splits_backward else Op.B
    return play(board, lambda board, device: devices[device].next(board, device), frees=frees)


class _Device:
    """What one device has still to run, stage by stage."""

    def __init__(self, board: Board, device: int, limit: int, rule: Greedy) -> None:
        stages = board.stages(device)
        copies = rule.placement.copies
        pipeline = {stage: stage * copies // (board.p * board.v) for stage in stages}
        self.micro_batches = {stage: range(pipeline[stage], board.m, copies) for stage in stages}
        self.lanes = {stage: [s for s in stages if pipeline[s] == pipeline[stage]] for stage in stages}
        self.ran = {(op, stage): 0 for op in (Op.F, Op.B) for stage in stages}
        self.waiting: deque[Pass] = deque()
        self.limit, self.splits, self.seen = limit, rule.splits_backward, 0

    def next(self, board: Board, device: int) -> Move | None:
        """The pass that can start first; among those that can start as soon, backwards first, then earlier micro-batches."""
        self._follow(board.ran[device])
        moves: list[tuple[float, int, int, int, Pass]] = []
        for op, stage in self.ran:
            move = self._head(op, stage)
            start = None if move is None else board.start_s(device, move)
            if move is not None and start is not None and self._fits(board.live[device], op, stage):
                moves.append((start, int(op == Op.F), move[2], -stage, move))
        best = min(moves, default=None)
        now = board.clock_s[device]
        if self.waiting and (best is None or best[0] >= now + board.seconds[Op.W]):
            return now, self.waiting[0]
        return None if best is None else (best[0], best[-1])

    def _head(self, op: Op, stage: int) -> Pass | None:
        """The next pass of a kind in a stage."""
        at, todo = self.ran[op, stage], self.micro_batches[stage]
        return (int(op), stage, todo[at]) if at < len(todo) else None

    def _fits(self, live: int, op: Op, stage: int) -> bool:
        """Whether there is room: a micro-batch enters a device only if all chunks that it has to pass there will fit."""
        lane = self.lanes[stage]
        if op == Op.B or stage != lane[0]:
            return True
        owed = sum(self.ran[Op.F, stage] - self.ran[Op.F, later] for later in lane[1:])
        return live + owed + len(lane) <= self.limit

    def _follow(self, ran: list[Pass]) -> None:
        """Takes note of what has run since."""
        for op, stage, k in ran[self.seen :]:
            if op == Op.W:
                self.waiting.popleft()
                continue
            self.ran[Op(op), stage] += 1
            if op == Op.B and self.splits:
                self.waiting.append((int(Op.W), stage, k))
        self.seen = len(ran)
