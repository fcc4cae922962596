"""An order compiled for evaluation: rounds of independent operations, with the repeating part folded.

Round by round, every device whose next operation has its input runs it; operations of one round do not depend
on each other, so numpy prices them together. Where the cut between two rounds repeats (every device has moved
on by the same number of operations, and the lists, inputs and messages under way are the same up to later
micro-batches) the rounds in between are one *segment* with a repeat count. This is verified on the arrays, so
the segments are the same computation as the whole order, whatever the schedule.

Only messages between devices are dependencies here. Within a device the order implies the rest: a forward
before its own backward, a backward before its weight gradient.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from planner.schedule.order import Ints, Op, Order

__all__ = ["Program", "Segment", "compile_order", "messages", "operation_counts"]

# A fold of fewer periods saves nothing over running them.
MIN_REPEATS = 3

_Place = np.int32  # of an operation in an order: hundreds of thousands where a batch is large


class Segment(NamedTuple):
    """Rounds that run ``repeats`` times.

    Times live in one buffer: first the carried-in state (each device's clock, then the end times of messages
    under way), then the end time of each operation in round order.

    Attributes:
        n_carry: length of the state, the same going in and (where ``repeats > 1``) coming out.
        opcode: (n,) row ``kind·n_virtual + stage`` of the duration table.
        hop: (n,) row of the hop table; its last row is zero.
        rounds: first and one-past-last operation of each round, and the two arrays of buffer positions it
            waits for: the device's previous operation and the message's sender.
        carry_out: buffer positions of the next segment's state.
    """

    repeats: int
    n_carry: int
    opcode: Ints
    hop: Ints
    rounds: tuple[tuple[int, int, Ints, Ints], ...]
    carry_out: Ints


class Program(NamedTuple):
    """Segments in order, and per device the buffer position (in the first segment) of its first operation."""

    segments: tuple[Segment, ...]
    first_op: Ints
    first_opcode: Ints


@lru_cache(maxsize=64)
def compile_order(order: Order) -> Program:
    """Folds ``order`` into segments.

    Raises:
        ValueError: the order deadlocks: every device waits for another.
    """
    graph = _Graph.of(order)
    p, n = order.kind.shape
    pos = np.zeros(p, dtype=np.int64)
    builder = _Builder(order, graph, pos)
    rounds: list[tuple[Ints, Ints]] = []
    seen: dict[tuple[bytes, int], tuple[int, Ints]] = {}
    # After its last operation a device waits for ever.
    sender = np.pad(graph.sender, ((0, 0), (0, 1))).ravel()
    sent = np.pad(graph.sent, ((0, 0), (0, 1)), constant_values=n).ravel()
    row = np.arange(p) * (n + 1)
    folded = (MIN_REPEATS - 1) * order.period_ops  # operations at least after a period that is to repeat
    while True:
        last = int(pos[-1])
        if order.period_ops and last + folded <= n:
            cut = ((pos - last).tobytes(), last % order.period_ops)
            if cut in seen:
                at, start = seen[cut]
                repeats = graph.repeats(start, pos)
                if repeats >= MIN_REPEATS:
                    period = pos - start
                    builder.add(rounds[:at], start)
                    builder.add(rounds[at:], pos, repeats)
                    pos = start + repeats * period
                    builder.skip_to(pos)
                    rounds, seen = [], {}
                    continue
            seen[cut] = (len(rounds), pos)
        following = row + pos
        ready = pos[sender[following]] > sent[following]
        (active,) = ready.nonzero()
        if not len(active):
            break
        rounds.append((active, pos[active]))
        pos = pos + ready
    if (pos < n).any():
        raise ValueError(f"order {order.schedule} deadlocks for {order.shape}")
    builder.add(rounds, pos)
    return Program(tuple(builder.segments), builder.first_op, _opcode(order)[:, 0])


@lru_cache(maxsize=64)
def operation_counts(order: Order) -> Ints:
    """How often each device runs each operation: (p, 3·n_virtual), columns as in :attr:`Segment.opcode`."""
    p, columns = order.kind.shape[0], 3 * order.n_virtual
    cells = _opcode(order) + columns * np.arange(p)[:, None]
    return np.bincount(cells.ravel(), minlength=p * columns).reshape(p, columns)


def _opcode(order: Order) -> Ints:
    return order.kind * _Place(order.n_virtual) + order.stage


class _Graph(NamedTuple):
    """Who sends what an operation waits for, and how far each device's list repeats.

    Attributes:
        sender, sent: (p, n) device and position of the message's sender; the device itself and −1 where there
            is none.
        hop: (p, n) row of the hop table.
        zone_end: (p, n) operations [i, zone_end[i]) all equal the ones a period later, up to one micro-batch
            shift.
        shift: (p, n) that shift.
    """

    sender: Ints
    sent: Ints
    hop: Ints
    zone_end: Ints
    shift: Ints
    period_ops: int

    @classmethod
    def of(cls, order: Order) -> _Graph:
        sender, sent, hop = messages(order)
        p, n = order.kind.shape
        period = order.period_ops
        zone_end = np.tile(np.arange(n, dtype=_Place), (p, 1))
        shift = np.zeros((p, n), dtype=_Place)
        if 0 < period < n:
            now, later = np.s_[:, : n - period], np.s_[:, period:]
            same = (order.kind[now] == order.kind[later]) & (order.stage[now] == order.stage[later])
            same &= np.where(sent[now] < 0, sent[later] < 0, sent[later] - sent[now] == period)
            shift[now] = order.micro_batch[later] - order.micro_batch[now]
            on = same.copy()  # operation i and its successor are in one zone
            on[:, :-1] &= same[:, 1:] & (shift[:, : n - period - 1] == shift[:, 1 : n - period])
            on[:, -1] = False
            last = np.where(on, n, np.arange(n - period))
            last = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]
            zone_end[now] = np.where(same, last + 1, np.arange(n - period))
        return cls(sender, sent, hop, zone_end, shift, period)

    def repeats(self, start: Ints, stop: Ints) -> int:
        """How often the operations from cut ``start`` to cut ``stop`` repeat, this time included; 0 if
        never."""
        device = np.arange(len(start))
        length = int(stop[0] - start[0])
        if (start < 1).any() or (stop - start != length).any() or length % self.period_ops:
            return 0
        shift = self.shift[device, start]
        zone_end = self.zone_end[device, start] + self.period_ops
        if (shift != shift[0]).any() or int((zone_end - start).min()) // length < MIN_REPEATS:
            return 0
        who, where = self.under_way(start)
        room = np.concatenate([zone_end - start, zone_end[who] - 1 - where])
        repeats = int(room.min()) // length
        if repeats < MIN_REPEATS:
            return 0
        later_who, later_where = self.under_way(start + repeats * length)
        same = np.array_equal(who, later_who) and np.array_equal(where + repeats * length, later_where)
        return repeats if same else 0

    def under_way(self, cut: Ints) -> tuple[Ints, Ints]:
        """Receivers, as (device, position), of the messages sent before ``cut`` and read after it."""
        position = np.arange(self.sent.shape[1])
        pending = (position >= cut[:, None]) & (self.sent >= 0) & (self.sent < cut[self.sender])
        device, where = np.nonzero(pending)
        return device, where


def messages(order: Order) -> tuple[Ints, Ints, Ints]:
    """Sender's device and position (the device itself and −1 where there is none), and row of the hop table, of each operation's
    input from another device: (p, n) each."""
    p, n = order.kind.shape
    n_virtual, stage, kind = order.n_virtual, order.stage.astype(_Place), order.kind
    position = np.full((3, n_virtual, order.shape.m), -1, dtype=_Place)
    position[kind, stage, order.micro_batch] = np.arange(n)
    downstream = np.full(n_virtual, -1, dtype=_Place)
    fed = np.flatnonzero(order.upstream >= 0)
    downstream[order.upstream[fed]] = fed
    source = np.where(
        kind == Op.F, order.upstream.astype(_Place)[stage], np.where(kind == Op.B, downstream[stage], -1)
    )
    own = np.broadcast_to(np.arange(p, dtype=_Place)[:, None], (p, n))
    sender = np.where(source >= 0, order.device_of_stage.astype(_Place)[source], own)
    remote = sender != own
    sent = np.where(remote, position[kind, source, order.micro_batch], -1)
    if order.leaves_after is not None:
        sent = sent + np.where(remote, order.leaves_after[sender, sent], 0)
    hop = np.where(remote, np.where(kind == Op.F, source, stage), n_virtual)
    assert (order.device_of_stage[stage] == own).all(), "an operation runs where its stage lives"
    assert (sent[remote] >= 0).all(), "every message has a sender"
    backward = kind == Op.B
    assert (position[Op.F][stage[backward], order.micro_batch[backward]] < np.nonzero(backward)[1]).all()
    return sender, sent, hop


class _Builder:
    """Turns rounds into segments, cut after cut, keeping the layout of the state that they pass on."""

    def __init__(self, order: Order, graph: _Graph, start: Ints) -> None:
        self.graph, self.cut = graph, start
        self.opcode = _opcode(order)
        self.at = np.full(order.kind.shape, -1, dtype=_Place)  # buffer position of this segment's operations
        self.waiting: tuple[Ints, Ints] = (np.empty(0, np.int64), np.empty(0, np.int64))
        self.segments: list[Segment] = []
        self.first_op: Ints = start

    def add(self, rounds: list[tuple[Ints, Ints]], stop: Ints, repeats: int = 1) -> None:
        """Appends the segment of ``rounds``, which end at cut ``stop``; nothing where there are none."""
        if not rounds:
            return
        p = len(self.cut)
        n_carry = p + len(self.waiting[0])
        device = np.concatenate([r[0] for r in rounds])
        where = np.concatenate([r[1] for r in rounds])
        self.at[device, where] = n_carry + np.arange(len(device))
        receivers = zip(self.waiting[0].tolist(), self.waiting[1].tolist(), strict=True)
        slot = {receiver: p + i for i, receiver in enumerate(receivers)}
        previous = np.where(where > self.cut[device], self.at[device, np.maximum(where - 1, 0)], device)
        message = self._message_at(device, where, slot, previous)
        waiting = self.graph.under_way(stop)
        clocks = np.where(stop > self.cut, self.at[np.arange(p), np.maximum(stop - 1, 0)], np.arange(p))
        carry_out = np.concatenate([clocks, self._message_at(*waiting, slot, None)])
        ends = np.cumsum([0, *(len(r[0]) for r in rounds)]).tolist()
        spans = tuple((a, b, previous[a:b], message[a:b]) for a, b in pairwise(ends))
        opcode, hop = self.opcode[device, where], self.graph.hop[device, where]
        if not self.segments:
            self.first_op = self.at[:, 0].copy()
        self.segments.append(Segment(repeats, n_carry, opcode, hop, spans, carry_out))
        self.cut, self.waiting = stop, waiting

    def skip_to(self, cut: Ints) -> None:
        """Moves on over the repeats of the last segment: the same state, at a later cut."""
        self.cut, self.waiting = cut, self.graph.under_way(cut)

    def _message_at(
        self, device: Ints, where: Ints, slot: dict[tuple[int, int], int], otherwise: Ints | None
    ) -> Ints:
        """Buffer position of the message each operation waits for: sent in this segment, or carried in."""
        sender, sent = self.graph.sender[device, where], self.graph.sent[device, where]
        result = self.at[sender, sent]
        if otherwise is not None:
            result = np.where(sent >= 0, result, otherwise)
        carried = np.flatnonzero((sent >= 0) & (sent < self.cut[sender]))
        for i in carried.tolist():
            result[i] = slot[int(device[i]), int(where[i])]
        return result
