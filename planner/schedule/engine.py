"""The pipeline engine: the exact makespan of an order, for many candidates at once.

An operation starts when its device is free and its input has arrived; so all times follow from one
longest-path pass over the order. The steady part of a schedule is a max-plus linear recursion of its state
(device clocks and messages under way). Such a map commutes with a common shift: once the state repeats up to
a shift, it does so for ever, and whole cycles are skipped. That a connected one gets there is the cyclicity
theorem (F. Baccelli et al., "Synchronization and Linearity", Wiley 1992, chapter 3); a candidate that does
not in time is simply run to the end.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from planner.schedule.order import Order
from planner.schedule.program import Segment, compile_order, operation_counts

__all__ = ["Floats", "Timeline", "simulate"]

Floats: TypeAlias = npt.NDArray[np.float64]

# Two states count as equal up to a shift when they differ by less than this fraction of the clock: some
# thousand rounding errors of the sums that lead there. The error of a skipped part is of this order too.
RECURRENCE_TOLERANCE = 1e-12
# Longest cycle looked for, in periods: that of a 1F1B cycle between two stages is their distance.
SHORTEST_CYCLE_LIMIT = 16
# Rounds between two looks for a recurrence, at first; later looks are a quarter further apart each time.
ROUNDS_BETWEEN_LOOKS = 16
# Bytes of end times to hold at once; more candidates are priced in slices.
BUFFER_BYTES = 64e6


class Timeline(NamedTuple):
    """When a step's devices work. Batch axes trail; ``p`` devices lead.

    Attributes:
        makespan_s: (*batch,) from 0 to the end of the last device's tail.
        busy_s: (p, *batch) time in operations, without head and tail.
        first_start_s, last_end_s: (p, *batch) start of the first and end of the last operation.
        bubble_s: (p, *batch) idle time within the makespan.
    """

    makespan_s: Floats
    busy_s: Floats
    first_start_s: Floats
    last_end_s: Floats
    bubble_s: Floats

    @property
    def span_bubble_s(self) -> Floats:
        """(p, *batch) idle time between a device's own first and last operation, as in arXiv:2401.10241."""
        return self.last_end_s - self.first_start_s - self.busy_s


def simulate(
    order: Order,
    forward_s: npt.ArrayLike,
    backward_s: npt.ArrayLike,
    weight_s: npt.ArrayLike | None = None,
    *,
    hop_s: npt.ArrayLike = 0.0,
    head_s: npt.ArrayLike = 0.0,
    tail_s: npt.ArrayLike = 0.0,
) -> Timeline:
    """Prices ``order`` for every candidate of the trailing batch axes.

    Args:
        order: from :func:`planner.schedule.order.make_order`.
        forward_s, backward_s, weight_s: (n_virtual, *batch) seconds of one micro-batch. Where the order does
            not split the backward, ``weight_s`` is part of it and added.
        hop_s: (*batch) or (n_virtual − 1, *batch) seconds from a stage to the next one, both ways; row ``s``
            is the edge that leaves stage ``s``. It delays the receiver and occupies nobody; none is paid
            within a device. A (n_virtual − 1, …) array is told from a batch by having as many axes as the
            durations.
        head_s, tail_s: (p, *batch) or broadcastable: work of a device before its first and after its last
            operation (parameter gather; gradient reduce-scatter and optimizer).

    Raises:
        ValueError: the order splits the backward and ``weight_s`` is missing, or the shapes do not fit.

    >>> from planner.schedule.order import make_order
    >>> line = simulate(make_order("1f1b", 4, 8), [1.0] * 4, [2.0] * 4)
    >>> float(line.makespan_s), line.bubble_s.tolist()  # (8 + 3)·3, and (4 − 1)·3 on every device
    (33.0, [9.0, 9.0, 9.0, 9.0])
    """
    if order.splits_backward and weight_s is None:
        raise ValueError(f"order {order.schedule} splits the backward; weight_s is missing")
    durations = [np.asarray(0.0 if x is None else x, dtype=float) for x in (forward_s, backward_s, weight_s)]
    rank = max(x.ndim for x in durations)  # axes of a quantity per stage; one with fewer has batch axes alone
    hop, head, tail = (np.asarray(x, dtype=float) for x in (hop_s, head_s, tail_s))
    given = [*durations, hop, head, tail]
    batch = np.broadcast_shapes(*(x.shape[1:] if x.ndim == rank else x.shape for x in given))
    p, size = order.shape.p, math.prod(batch)

    def per(rows: int, x: Floats) -> Floats:
        return np.broadcast_to(x, (rows, *batch)).reshape(rows, size)

    forward, backward, weight = (per(order.n_virtual, x) for x in durations)
    if not order.splits_backward:
        backward = backward + weight
    duration = np.concatenate([forward, backward, weight])
    delay = np.concatenate([per(order.n_virtual - 1, hop), np.zeros((2, size))])
    first, last = _spans(order, duration, delay, per(p, head))
    makespan = (last + per(p, tail)).max(axis=0)
    busy = operation_counts(order) @ duration
    bubble = makespan - busy - per(p, head) - per(p, tail)
    return Timeline(makespan.reshape(batch), *(x.reshape(p, *batch) for x in (busy, first, last, bubble)))


def _spans(order: Order, duration: Floats, delay: Floats, head: Floats) -> tuple[Floats, Floats]:
    """First start and last end of every device, (p, size) each."""
    program = compile_order(order)
    longest = max(s.n_carry + len(s.opcode) for s in program.segments)
    step = max(1, int(BUFFER_BYTES // (8 * longest)))
    first, last = np.empty_like(head), np.empty_like(head)
    for k in range(0, head.shape[1], step):
        part = np.s_[:, k : k + step]
        state = head[part]
        for number, segment in enumerate(program.segments):
            run = _Run(segment, duration[part], delay[part])
            state = _repeat(run, state, segment.repeats, order.shape.p)
            if number == 0:
                first[part] = run.end_s[program.first_op] - duration[part][program.first_opcode]
        last[part] = state[: order.shape.p]
    return first, last


class _Run:
    """One pass over a segment's rounds: state in, state out. Durations are looked up once for all repeats."""

    def __init__(self, segment: Segment, duration: Floats, delay: Floats) -> None:
        self.segment = segment
        self.duration = duration[segment.opcode]
        self.delay = delay[segment.hop] if delay.any() else None
        self.end_s = np.empty((segment.n_carry + len(segment.opcode), duration.shape[1]))

    def __call__(self, state: Floats) -> Floats:
        end, duration, delay, n_carry = self.end_s, self.duration, self.delay, self.segment.n_carry
        end[:n_carry] = state
        for a, b, previous, message in self.segment.rounds:
            arrival = end.take(message, axis=0)
            if delay is not None:
                arrival += delay[a:b]
            np.maximum(arrival, end.take(previous, axis=0), out=arrival)
            np.add(arrival, duration[a:b], out=end[n_carry + a : n_carry + b])
        return end.take(self.segment.carry_out, axis=0)


def _repeat(run: _Run, state: Floats, repeats: int, p: int) -> Floats:
    """The state after ``repeats`` passes: passes until every candidate recurs, then a jump over the rest."""
    states = [state]
    limit = max(p, SHORTEST_CYCLE_LIMIT)
    apart = max(2, ROUNDS_BETWEEN_LOOKS // len(run.segment.rounds))
    look = apart
    for done in range(1, repeats + 1):
        states.append(run(states[-1]))
        del states[: -limit - 1]
        if done == look and done < repeats:
            cycle, growth = _recurrence(states)
            if cycle.all():
                return _jump(states, cycle, growth, repeats - done)
            look = done + max(apart, done // 4)
    return states[-1]


def _recurrence(states: list[Floats]) -> tuple[npt.NDArray[np.int64], Floats]:
    """Per candidate, the shortest cycle after which the last state repeats (0: none), and the shift over
    it."""
    now = states[-1]
    tolerance = RECURRENCE_TOLERANCE * np.abs(now).max(axis=0)
    cycle, growth = np.zeros(now.shape[1], dtype=np.int64), np.zeros(now.shape[1])
    for c in range(1, len(states)):
        before = states[-1 - c]
        ends = now[0] - before[0] - (now[-1] - before[-1])  # two components rule most cycles out
        if not ((np.abs(ends) <= tolerance) & (cycle == 0)).any():
            continue
        shift = now - before
        recurs = (np.ptp(shift, axis=0) <= tolerance) & (cycle == 0)
        cycle[recurs] = c
        growth[recurs] = shift.mean(axis=0)[recurs]
        if cycle.all():
            break
    return cycle, growth


def _jump(states: list[Floats], cycle: npt.NDArray[np.int64], growth: Floats, remaining: int) -> Floats:
    """The state ``remaining`` periods on: the one at the same phase of the last cycle, moved by whole
    cycles."""
    cycles, phase = np.divmod(remaining, cycle)
    at = len(states) - 1 - cycle + phase
    result = np.stack([states[i][:, k] for k, i in enumerate(at.tolist())], axis=1)
    return result + (cycles + 1) * growth
