"""Where, and how, every model call of a reinforcement-learning step runs: blocks of devices, layouts, and what moves between.

A step is a graph of calls (generate, infer, train), each on weights of some model. A call runs on a block of neighbouring devices
with one of its options; calls whose blocks overlap run one after the other. Weights that are trained under one option have to be
moved where another call of the same model runs under a different one. The time of a step is the longest path; where up to
``staleness`` further steps may be under way, it is the period of many: no less than the busiest device's work, nor than the
longest path over the steps under way.

Depth-first branch and bound over options in the order of the calls. Sources: Z. Mei et al. 2024 (ReaLHF, arXiv:2406.14088) §4;
Z. Han et al. 2025 (AsyncFlow, arXiv:2507.01663) §4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from planner.errors import Infeasible, Problem
from planner.solve.combinatorial.certificate import Certificate, Clock, certify

__all__ = ["Call", "CallPlan", "CallProblem", "Option", "on_all_devices", "plan_calls"]


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a call.

    Attributes:
        first, devices: the block: devices ``[first, first + devices)``, aligned to its size.
        layout: what distinguishes it from other options on the same block.
        time_s: of the call.
        move_s: to bring the weights into this layout from another one.
        rests_bytes: what stays on each device of the block between calls: states of what is trained, weights of what is frozen.
        peak_bytes: on each device while the call runs, ``rests_bytes`` included.
    """

    first: int
    devices: int
    layout: str
    time_s: float
    move_s: float = 0.0
    rests_bytes: float = 0.0
    peak_bytes: float = 0.0

    @property
    def place(self) -> tuple[int, int, str]:
        """Where weights lie under it, and how."""
        return self.first, self.devices, self.layout


@dataclass(frozen=True, slots=True)
class Call:
    """A call, its options, and the earlier calls (by index) whose results it reads; ``trains`` its model's weights or not."""

    name: str
    model: str
    options: tuple[Option, ...]
    after: tuple[int, ...] = ()
    trains: bool = False


@dataclass(frozen=True)
class CallProblem:
    """Calls in the order in which they are issued, the devices, what one of them holds, and how many steps may be under way."""

    calls: tuple[Call, ...]
    devices: int
    budget_bytes: float = math.inf
    staleness: int = 0

    @cached_property
    def unit(self) -> int:
        """Devices that are in the same blocks throughout."""
        return math.gcd(self.devices, *(option.devices for call in self.calls for option in call.options))


@dataclass(frozen=True, slots=True)
class CallPlan:
    """An option for every call: when it starts and ends (a move of weights included), and the time of a step.

    ``moves`` are the calls whose weights come from elsewhere; ``idle`` is the share of device time without work.
    """

    options: tuple[Option, ...]
    start_s: tuple[float, ...]
    end_s: tuple[float, ...]
    moves: tuple[bool, ...]
    time_s: float
    idle: float
    certificate: Certificate


def plan_calls(problem: CallProblem, *, time_limit_s: float | None = None) -> CallPlan:
    """The options under which a step takes least.

    Args:
        problem: calls and devices.
        time_limit_s: after which the best plan so far is returned with its gap.

    Raises:
        Infeasible: no choice of options fits into the devices' memory.

    Two models of one device's work each, on two devices, each with its own:

    >>> block = lambda first, n: Option(first, n, "", 2.0 / n)
    >>> both = (block(0, 2), block(0, 1), block(1, 1))
    >>> plan_calls(CallProblem((Call("a", "a", both), Call("b", "b", both)), 2)).time_s
    2.0
    """
    search = _Search(problem, Clock(time_limit_s))
    search.descend(0)
    if search.best is None:
        raise Infeasible(
            Problem(
                "memory",
                "no choice of blocks for the calls fits into the devices",
                "states of all models and the call at work within it",
                "Use more devices, or smaller models.",
            )
        )
    done = _schedule(problem, search.best)
    work = sum(o.devices * (e - s) for o, s, e in zip(search.best, done[0], done[1], strict=True))
    bound = search.best_s if search.finished else search.bound()
    certificate = certify(
        search.best_s,
        bound,
        "branch and bound over the calls' options",
        search.clock,
        {"visited": search.visited},
    )
    return CallPlan(
        search.best, *done[:2], _moves(problem, search.best), search.best_s, 1.0 - work / (problem.devices * search.best_s),
        certificate,
    )  # fmt: skip


def on_all_devices(problem: CallProblem, *, time_limit_s: float | None = None) -> CallPlan:
    """The same where every call runs on all devices, one step at a time.

    Raises:
        Infeasible: that does not fit.
    """
    calls = tuple(
        replace(call, options=tuple(o for o in call.options if o.devices == problem.devices))
        for call in problem.calls
    )
    return plan_calls(replace(problem, calls=calls, staleness=0), time_limit_s=time_limit_s)


class _Search:
    """Options for the calls one after the other; a partial choice goes where its bound does not beat the best."""

    def __init__(self, problem: CallProblem, clock: Clock) -> None:
        self.problem, self.clock = problem, clock
        self.chosen: list[Option] = []
        self.best: tuple[Option, ...] | None = None
        self.best_s, self.visited, self.finished = math.inf, 0, True
        # Least path behind every call, and least device-seconds from it on, of calls at their fastest.
        calls = problem.calls
        fastest = [min((o.time_s for o in call.options), default=math.inf) for call in calls]
        least = [min((o.time_s * o.devices for o in call.options), default=math.inf) for call in calls]
        self.tail = [0.0] * len(calls)
        for index in reversed(range(len(calls))):
            for before in calls[index].after:
                self.tail[before] = max(self.tail[before], fastest[index] + self.tail[index])
        self.fastest = fastest
        # What decides a step on its own are seconds; where steps overlap, the work of devices.
        self.ordered = [
            sorted(
                call.options, key=lambda o: (o.time_s * (o.devices if problem.staleness else 1.0), o.first)
            )
            for call in calls
        ]
        self.rest = [sum(least[index:]) for index in range(len(calls) + 1)]

    def bound(self) -> float:
        """No choice takes less."""
        calls, steps = self.problem.calls, self.problem.staleness + 1
        path = max((self.fastest[i] + self.tail[i] for i in range(len(calls))), default=0.0)
        return max(path / steps, self.rest[0] / self.problem.devices)

    def descend(self, depth: int) -> None:
        """Tries every option of the call at ``depth``, the most promising first."""
        self.visited += 1
        if self.clock.over:
            self.finished = False
            return
        if depth == len(self.problem.calls):
            value = _period(self.problem, self.chosen)
            if value < self.best_s * (1.0 - 1e-12):
                self.best, self.best_s = tuple(self.chosen), value
            return
        for option in self.ordered[depth]:
            if self._has_twin(option):
                continue
            self.chosen.append(option)
            if self._may_win(depth) and _fits(self.problem, self.chosen):
                self.descend(depth + 1)
            self.chosen.pop()

    def _has_twin(self, option: Option) -> bool:
        """Whether a block further left is as good: in the right half of a block that no chosen one lies within.

        Blocks are aligned to their size, so that those of two sizes are apart or one within the other.
        """
        size = option.devices * 2
        while size <= self.problem.devices:
            first = option.first // size * size
            within = (o for o in self.chosen if o.devices < size and first <= o.first < first + size)
            if option.first - first >= size // 2 and not any(within):
                return True
            size *= 2
        return False

    def _may_win(self, depth: int) -> bool:
        """Whether the calls so far, and the others at their fastest, may beat the best.

        Moves of calls whose model is trained later are not known yet, and left out.
        """
        _, end, busy = _schedule(self.problem, self.chosen)
        path = max(e + self.tail[i] for i, e in enumerate(end))
        work = sum(busy) * self.problem.unit + self.rest[depth + 1]
        steps = self.problem.staleness + 1
        lower = max(path / steps, max(busy), work / self.problem.devices)
        return lower < self.best_s * (1.0 - 1e-12)


def _moves(problem: CallProblem, chosen: Sequence[Option]) -> tuple[bool, ...]:
    """Which calls read weights that are trained under another option."""
    home = {
        call.model: option.place for call, option in zip(problem.calls, chosen, strict=False) if call.trains
    }
    return tuple(
        not call.trains and call.model in home and home[call.model] != option.place
        for call, option in zip(problem.calls, chosen, strict=False)
    )


def _schedule(
    problem: CallProblem, chosen: Sequence[Option]
) -> tuple[tuple[float, ...], tuple[float, ...], list[float]]:
    """Start and end of the calls chosen so far, each as soon as its block is free, and the seconds of work of every unit."""
    unit = problem.unit
    free, busy = [0.0] * (problem.devices // unit), [0.0] * (problem.devices // unit)
    starts: list[float] = []
    ends: list[float] = []
    for call, option, moved in zip(problem.calls, chosen, _moves(problem, chosen), strict=False):
        block = range(option.first // unit, (option.first + option.devices) // unit)
        seconds = option.time_s + (option.move_s if moved else 0.0)
        start = max([ends[i] for i in call.after] + [free[u] for u in block])
        for u in block:
            free[u] = start + seconds
            busy[u] += seconds
        starts.append(start)
        ends.append(start + seconds)
    return tuple(starts), tuple(ends), busy


def _period(problem: CallProblem, chosen: Sequence[Option]) -> float:
    """The time of a step, or of each of many where several are under way."""
    _, ends, busy = _schedule(problem, chosen)
    path = max(ends, default=0.0)
    if not problem.staleness:
        return path
    return max(path / (problem.staleness + 1), max(busy))


def _fits(problem: CallProblem, chosen: Sequence[Option]) -> bool:
    """Whether what rests and what the calls so far need is within every device's memory.

    A model that is trained rests where that is done; its weights are elsewhere only while a call runs there.
    """
    if not math.isfinite(problem.budget_bytes):
        return True
    trained = {call.model for call in problem.calls if call.trains}
    unit = problem.unit
    rests, peak = [0.0] * (problem.devices // unit), [0.0] * (problem.devices // unit)
    for call, option in zip(problem.calls, chosen, strict=False):
        stays = call.trains or call.model not in trained
        own = option.rests_bytes if stays else 0.0
        for u in range(option.first // unit, (option.first + option.devices) // unit):
            rests[u] += own
            peak[u] = max(peak[u], option.peak_bytes - own)
    return all(r + p <= problem.budget_bytes for r, p in zip(rests, peak, strict=True))
