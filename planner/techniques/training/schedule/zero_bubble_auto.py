"""Automatic zero bubble: an order within a limit of activations, made for the durations of F, B and W.

What it does: a device warms up with as many forwards as fit before its first backward's input arrives; then one F and one B in
    turn, a W wherever the device would wait, or where the limit asks for the memory that a W frees. Whether a forward may delay
    the first backward, whether a device lets its next forward wait for the backward below, and whether small gaps stay gaps is
    tried both ways; the order whose longest span is shortest is taken.
Saves: the bubble, as far as the limit allows: H1's within the activations of 1F1B (p micro-batches), less than H2's within twice
    as much (2p), as weight gradients wait for as long as their operands, which are less than activations, have room.
Costs: memory up to the limit; the next step begins before the last device has ended this one, as in H2.
Assumes: equal stages, and an order made for the durations of one of the authors' profiles (6.2 billion parameters): a plan whose
    durations differ keeps the order, which mostly is the one that its own would make, or takes up to 1.5 % more of its step for
    it (weight gradients a third as long as input gradients, to as long); operands of a weight gradient are 0.45 of what a forward
    saves, as the authors' code has them; recompute runs in B; messages are latency on the edge.
Source: Qi et al. 2024 (arXiv:2401.10241) §3.1, Tables 5 and 9.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

from planner.schedule.board import stretched
from planner.schedule.order import DeviceOps, Generator, Op, Shape, one_chunk
from planner.technique import Figure, Technique
from planner.techniques import figures
from planner.techniques.training.schedule.split_backward import hold_weight_inputs

_WAITS = 0.45  # of a micro-batch's activations: what its weight gradient needs once its backward is done


class Durations(NamedTuple):
    """What an order is made for: F, B and W of a stage, and a message from one stage to the next."""

    forward_s: float
    backward_s: float
    weight_s: float
    hop_s: float

    @property
    def of(self) -> tuple[float, float, float]:
        """By operation."""
        return self.forward_s, self.backward_s, self.weight_s


NOMINAL = Durations(29.718e-3, 29.444e-3, 19.927e-3, 0.527e-3)  # Table 9: 6.2B, 8 stages, 24 micro-batches


class _Device:
    """Where a device stands: how many of each operation it has run, until when, and how long it has waited since its first."""

    def __init__(self, limit: float, durations: Durations) -> None:
        self.limit, self.durations = limit, durations
        self.clock_s = self.waited_s = 0.0
        self.ran: list[int] = []
        self.count = [0, 0, 0]

    def run(self, op: Op, ready_s: float = 0.0) -> float:
        """Runs the next operation of a kind once its input is there; returns when it ends."""
        start_s = max(self.clock_s, ready_s)
        self.waited_s += (start_s - self.clock_s) if self.count[Op.F] else 0.0
        self.clock_s = start_s + self.durations.of[op]
        self.count[op] += 1
        self.ran.append(op)
        return self.clock_s

    @property
    def held(self) -> float:
        """Activations, in micro-batches."""
        f, b, w = self.count
        return (f - b) + _WAITS * (b - w)

    @property
    def weight_waits(self) -> bool:
        """Whether there is a weight gradient to run."""
        return self.count[Op.W] < self.count[Op.B]

    def make_room(self) -> None:
        """Runs weight gradients until another forward fits."""
        while self.held + 1.0 > self.limit and self.weight_waits:
            self.run(Op.W)

    def fill(self, until_s: float, worst_s: float, spare: bool) -> None:
        """Runs weight gradients while it would wait.

        One that is longer than the gap delays what comes next: where the gap would leave it no later than the device that has
        waited most, it runs only if nothing is to be ``spare``.
        """
        while self.weight_waits and self.clock_s + self.durations.weight_s <= until_s:
            self.run(Op.W)
        gap_s = until_s - self.clock_s
        if self.weight_waits and gap_s > 0.0 and (gap_s > worst_s - self.waited_s or not spare):
            self.run(Op.W)


class _Pipeline:
    """A pipeline whose order is made, micro-batch after micro-batch."""

    def __init__(
        self, p: int, m: int, limit: float, durations: Durations, options: tuple[bool, bool, bool]
    ) -> None:
        self.m, self.durations = m, durations
        self.delay, self.hold, self.spare = options
        self.devices = [_Device(limit, durations) for _ in range(p)]
        self.end_s: dict[tuple[int, int, int], float] = {}

    def run(self) -> _Pipeline:
        """Lets all devices run all operations."""
        self._warm_up()
        for k in range(1, self.m):
            self._forwards()
            for d in reversed(range(len(self.devices))):
                self._run(d, Op.B)
                if d == 0 and self.devices[0].count[Op.F] == self.m and k < self.m - 1:
                    self._drain(0)
        for d in range(len(self.devices)):
            self._drain(d)
        return self

    @property
    def span_s(self) -> float:
        """The longest time from a device's first operation to its last."""
        work_s = self.m * sum(self.durations.of)
        return work_s + max(device.waited_s for device in self.devices)

    def _drain(self, d: int) -> None:
        while self.devices[d].weight_waits:
            self.devices[d].run(Op.W)

    def _ready_s(self, d: int, op: Op) -> float:
        """When the input of a device's next operation is there."""
        beside = d - 1 if op == Op.F else d + 1
        sent = self.end_s.get((op, beside, self.devices[d].count[op]))
        return 0.0 if sent is None else sent + self.durations.hop_s

    def _run(self, d: int, op: Op) -> None:
        device, k = self.devices[d], self.devices[d].count[op]
        ready_s = self._ready_s(d, op)
        if op == Op.F:
            device.make_room()
        device.fill(ready_s, max(other.waited_s for other in self.devices), self.spare)
        self.end_s[op, d, k] = device.run(op, ready_s)

    def _warm_up(self) -> None:
        """The first micro-batch, and as many forwards beside it as fit before its backward comes back."""
        p, forward_s = len(self.devices), self.durations.forward_s
        for d in range(p):
            self._run(d, Op.F)
        back_s = self.devices[-1].clock_s
        more = [0] * p
        for d in reversed(range(p - 1)):
            back_s += self.durations.backward_s + self.durations.hop_s
            clock_s = self.devices[d].clock_s
            while more[d] + 2 <= min(self.m, self.devices[d].limit):
                if clock_s >= back_s or (not self.delay and clock_s + forward_s > back_s):
                    break
                more[d] += 1
                clock_s += forward_s
            back_s = max(back_s, clock_s)
        for d in range(1, p):
            more[d] = max(0, min(more[d], more[d - 1] - 1))
        for d, n in enumerate(more):
            for _ in range(n):
                self._run(d, Op.F)
        for d in reversed(range(p)):
            self._run(d, Op.B)

    def _forwards(self) -> None:
        """One forward on every device, unless it is better to wait for a backward."""
        p = len(self.devices)
        wanted = [device.count[Op.F] < self.m and not self._holds(d) for d, device in enumerate(self.devices)]
        for d in reversed(range(p - 1)):
            ahead = self.devices[d].count[Op.F] > self.devices[d + 1].count[Op.F]
            wanted[d] = wanted[d] and (
                wanted[d + 1] or self.devices[d + 1].count[Op.F] == self.m or not ahead
            )
        for d in range(p):
            if wanted[d]:
                self._run(d, Op.F)

    def _holds(self, d: int) -> bool:
        """Whether a device that is two forwards ahead of the next one lets its forward wait."""
        if not self.hold or d + 1 == len(self.devices):
            return False
        device, below = self.devices[d], self.devices[d + 1]
        if device.count[Op.F] < below.count[Op.F] + 2:
            return False
        times = self.durations
        back_s = below.clock_s + times.forward_s + times.backward_s + times.hop_s
        if device.clock_s >= back_s:
            return True
        worst_s = max(other.waited_s for other in self.devices)
        late = device.clock_s + times.forward_s > back_s
        return late and back_s - device.clock_s <= worst_s - device.waited_s


@lru_cache(maxsize=64)
def _lists(p: int, m: int, limit: float, durations: Durations) -> list[DeviceOps]:
    """All devices' lists; those of a long step are those of a shorter one, stretched."""
    enough = 8 * p
    if m > enough:
        longer = [stretched(ops, len(Op), m - enough) for ops in _lists(p, enough, limit, durations)]
        found = [ops for ops in longer if ops is not None]
        if len(found) == p:
            return found
    tried = (_Pipeline(p, m, limit, durations, options).run() for options in _OPTIONS)
    best = min(tried, key=lambda pipeline: round(pipeline.span_s / durations.forward_s, 9))
    return [_listed(device, stage) for stage, device in enumerate(best.devices)]


_OPTIONS = [(delay, hold, spare) for delay, hold, spare in product((False, True), repeat=3)]


def _listed(device: _Device, stage: int) -> DeviceOps:
    kind = np.array(device.ran)
    micro_batch = np.empty(len(kind), dtype=np.int64)
    for op in Op:
        micro_batch[kind == op] = np.arange(np.count_nonzero(kind == op))
    return kind, np.full(len(kind), stage), micro_batch


def automatic(name: str, pipelines: float, durations: Durations = NOMINAL) -> Generator:
    """The order for some durations whose devices hold at most ``pipelines`` times p micro-batches of activations."""

    def device_ops(shape: Shape, device: int) -> DeviceOps:
        return _lists(shape.p, shape.m, max(pipelines * shape.p, 1.0), durations)[device]

    return Generator(
        name, device_ops, lambda shape: len(Op), problems=one_chunk, splits_backward=True, barrier=False,
        saturates=lambda p, v, m: np.minimum(m, 8 * p),
    )  # fmt: skip


def _bubble_rate(order: Generator | str, p: int, m: int, of: Durations) -> float:
    """Share of the longest span that a device waits, with messages; without an order, of one micro-batch after the other."""
    work_s = m * sum(of.of)
    if not order:
        return 1.0 - 1.0 / p
    from planner.schedule.engine import simulate
    from planner.schedule.order import make_order

    line = simulate(make_order(order, p, m), *([seconds] * p for seconds in of.of), hop_s=of.hop_s)
    span_s = float((line.last_end_s - line.first_start_s).max())
    return 1.0 - work_s / span_s


_TABLE_5 = "Qi et al. 2024 (arXiv:2401.10241), Tables 5 and 9"
_NAMES = {"zb_1p": 1.0, "zb_1.5p": 1.5, "zb_2p": 2.0}
_RATES = {"zb_1p": 0.1323, "zb_2p": 0.0029}


def _technique(choice: str) -> Technique:
    limit = _NAMES[choice]
    held = "" if limit == 1.0 else f"{limit:g} times "
    rate = Figure(
        "bubble rate of the 6.2B model on 8 stages, 24 micro-batches, at its profiled durations",
        _RATES.get(choice, 0.0), 0.02, _TABLE_5, lambda order: _bubble_rate(order, 8, 24, NOMINAL),
    )  # fmt: skip
    most = Figure(
        "micro-batches between F and B on the fullest of 8 devices: the limit of 1.5 p",
        12.0, 1e-9, "Qi et al. 2024 (arXiv:2401.10241), section 5.4: schedules under a series of memory limits",
        lambda order: figures.in_flight_to_backward(order, 8, 24),
    )  # fmt: skip
    return Technique(
        key=choice,
        name=f"Automatic zero bubble within {held}1F1B's activations",
        slot="schedule",
        choices=(choice,),
        source="arXiv:2401.10241",
        summary="An order made for unlike durations of F, B and W, within a limit of activations",
        figures=(rate if choice in _RATES else most,),
        apply=hold_weight_inputs,
        apart=True,
        order=automatic(choice, limit),
        searched=False,
        active=lambda ctx: ctx.mesh.pp > 1,
    )


TECHNIQUES = tuple(_technique(choice) for choice in _NAMES)
