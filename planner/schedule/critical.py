"""The path that decides how long a step takes: which operations it passes, and how often.

Whatever the seconds of the operations are, every path through an order's dependencies bounds the step from below. The path that
is critical under some seconds is so a bound under all others: a sum of seconds with known counts, which is easy to minimise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import numpy.typing as npt

from planner.schedule.order import Op, Order
from planner.schedule.program import messages

__all__ = ["Path", "critical_path", "interleaved_paths"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """How often a path passes each operation: ``counts`` (3, n_virtual) of forward, backward and weight gradient; the ``hops``
    between devices, and the ``device`` on which it ends."""

    counts: Floats
    hops: float
    device: int

    def seconds(self, durations: npt.ArrayLike, hop_s: float, tail_s: npt.ArrayLike) -> float:
        """Its length under some seconds, (3, n_virtual), and what follows a device's last operation, (p,)."""
        tail = float(np.asarray(tail_s, dtype=float)[self.device])
        return float(np.sum(self.counts * np.asarray(durations, dtype=float))) + self.hops * hop_s + tail


def critical_path(order: Order, seconds: npt.ArrayLike, hop_s: float, tail_s: npt.ArrayLike) -> Path:
    """A longest path through an order's operations and what follows them.

    Args:
        order: what every device runs.
        seconds: (3, n_virtual) of forward, backward and weight gradient.
        hop_s: seconds from a device to the next one.
        tail_s: (p,) seconds after a device's last operation.

    >>> from planner.schedule.order import make_order
    >>> path = critical_path(make_order("1f1b", 2, 3), [[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]], 0.0, [0.0, 0.0])
    >>> path.counts[:2].tolist()  # down, all of the second stage's work, and back up
    [[1.0, 3.0], [1.0, 3.0]]
    """
    graph = _Graph.of(order)
    duration = np.asarray(seconds, dtype=float).ravel()[graph.operation].tolist()
    delay = (graph.hops * hop_s).tolist()
    end = [0.0] * (len(duration) + 1)  # the last one stands for what has no input
    late = [False] * len(duration)
    for at, before, sender in graph.sequence:
        start, arrival = end[before], end[sender] + delay[at]
        if arrival > start:
            start, late[at] = arrival, True
        end[at] = start + duration[at]
    device = int(np.argmax(np.array(end)[graph.last] + np.asarray(tail_s, dtype=float)))
    passed, hops, at = [], 0.0, graph.last[device]
    while at >= 0:
        passed.append(at)
        if late[at]:
            hops += graph.hops[at]
            at = graph.senders[at]
        else:
            at = graph.before[at]
    counts = np.bincount(graph.operation[passed], minlength=len(Op) * order.n_virtual)
    return Path(counts.reshape(len(Op), order.n_virtual).astype(float), float(hops), device)


@lru_cache(maxsize=256)
def interleaved_paths(p: int, v: int, m: int) -> tuple[Path, ...]:
    """Paths through interleaved 1F1B that need no order: those of :func:`planner.costs.pipeline_bounds.bound_interleaved_s`.

    One micro-batch up and down; and all work of every device ``r``, after its ramp of first forwards or instead of its warm-up
    the way of the first micro-batch up to its first backward, and the mirror image at the end.

    >>> from planner.schedule.engine import simulate
    >>> from planner.schedule.order import make_order
    >>> forward, backward = [1.0, 2.0, 1.5, 1.0], [2.0, 3.0, 2.5, 2.0]
    >>> took = float(simulate(make_order("interleaved", 2, 4, 2), forward, backward).makespan_s)
    >>> seconds = [forward, backward, [0.0] * 4]
    >>> max(path.seconds(seconds, 0.0, [0.0, 0.0]) for path in interleaved_paths(2, 2, 4)) <= took
    True
    """
    found = [Path(_shaped(np.ones((2, v, p))), 2.0 * (p * v - 1), 0)]
    for r in range(p):
        beyond = p - 1 - r
        extra = 2 * beyond + 1
        warm_up = np.full(v, float(p))
        warm_up[-1] = min(p, extra)
        warm_up[0] += max(extra - p, 0)
        known = m % p == 0 and m * v - (v - 1) * p >= extra + 1
        for around in product((False, True), repeat=2) if known else ((False, False),):
            counts, hops = np.zeros((2, v, p)), 0.0
            counts[:, :, r] = m
            for phase, instead in enumerate(around):
                if instead:
                    counts[phase, :, r] -= warm_up
                    counts[phase] += 1.0
                    counts[1 - phase, -1, r + 1 :] += 1.0
                    hops += p * v - 1 + beyond
                else:
                    counts[phase, 0, :r] += 1.0
                    hops += r
            found.append(Path(_shaped(counts), hops, 0))
    return tuple(found)


# -- details ---------------------------------------------------------------------------------------------------------


def _shaped(counts: Floats) -> Floats:
    """Counts of forward and backward per chunk and device as those of a path, without weight gradients."""
    flat = counts.reshape(2, -1)
    return np.concatenate([flat, np.zeros_like(flat[:1])])


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    """An order's operations, device after device, and what each waits for (−1: nothing).

    Attributes:
        operation: row of the seconds.
        hops: 1 where the input comes from another device.
        before, senders: the device's operation before, and the one that sends the input.
        sequence: (operation, before, sender), every operation after what it waits for.
        last: every device's last operation.
    """

    operation: npt.NDArray[np.int64]
    hops: Floats
    before: list[int]
    senders: list[int]
    sequence: list[tuple[int, int, int]]
    last: list[int]

    @staticmethod
    @lru_cache(maxsize=16)
    def of(order: Order) -> _Graph:
        sender, sent, hop = messages(order)
        p, n = order.kind.shape
        operation = (order.kind * np.int64(order.n_virtual) + order.stage).ravel()
        index = np.arange(p * n).reshape(p, n)
        before = np.where(index % n > 0, index - 1, -1).ravel().tolist()
        senders = np.where(sent >= 0, sender * n + sent, -1).ravel().tolist()
        hops = ((sent >= 0) & (hop < order.n_virtual)).ravel().astype(float)
        return _Graph(operation, hops, before, senders, _sequence(senders, p, n), index[:, -1].tolist())


def _sequence(senders: list[int], p: int, n: int) -> list[tuple[int, int, int]]:
    """Operations in an order that keeps all dependencies: every device runs on until it waits."""
    done = [False] * (p * n) + [True]
    at = [device * n for device in range(p)]
    found: list[tuple[int, int, int]] = []
    while len(found) < p * n:
        moved = len(found)
        for device in range(p):
            i, stop = at[device], (device + 1) * n
            while i < stop and done[senders[i]]:
                done[i] = True
                found.append((i, i - 1 if i > device * n else -1, senders[i]))
                i += 1
            at[device] = i
        assert len(found) > moved, "the order deadlocks"
    return found
