"""ReaLHF: every call of a step of reinforcement learning from feedback on devices and in a layout of its own.

What it does: chooses for every call (generate, read, train) a block of devices and a layout; weights are moved between the
    layouts of the same model, and frozen models may rest on the host; ``planner solve rlhf``.
Saves: layouts that suit training and generation alike suit neither; models of half the devices each train side by side.
Costs: a move of weights over the network wherever a trained model's calls differ in layout.
Assumes: blocks are aligned halves, quarters, ... of the devices; calls are issued in one order; prompts and answers are equally
    long.
Source: Mei et al. 2024 (ReaLHF, arXiv:2406.14088) §4, §5.
"""

from __future__ import annotations

from typing import Any

from planner.technique import Figure, Technique
from planner.techniques.solvers import solver

# Pinedo's jobs in an order in which each comes after those that it waits for: seconds, and what it waits for.
_JOBS: dict[int, tuple[int, tuple[int, ...]]] = {
    1: (8, ()), 4: (2, ()), 5: (3, (4,)), 6: (2, (4,)), 7: (2, (6,)), 2: (7, (1,)), 3: (7, (1, 5)), 8: (8, (5, 7)),
    9: (8, (5, 7)), 10: (15, (2, 3)),
}  # fmt: skip
_SOURCE = "github.com/tpaviot/ProcessScheduler @83f0c14, docs/pinedo.md: example 2.3.2 of Pinedo's Scheduling"


def _as_they_come(problem: Any) -> float:
    """A device that is free takes the first call that may run."""
    free, ends = [0.0] * problem.devices, [float("inf")] * len(problem.calls)
    waiting = list(range(len(problem.calls)))
    while waiting:
        device = min(range(problem.devices), key=lambda d: free[d])
        now = free[device]
        ready = [i for i in waiting if all(ends[j] <= now for j in problem.calls[i].after)]
        if not ready:
            free[device] = min(end for end in ends if end > now)
            continue
        ends[ready[0]] = free[device] = now + problem.calls[ready[0]].options[0].time_s
        waiting.remove(ready[0])
    return max(ends)


def _makespan(subject: Any, machines: int, shorter_s: float) -> float:
    """Seconds of the ten jobs, each on one device and some seconds shorter."""
    from planner.solve.combinatorial.calls import Call, CallProblem, Option

    order = list(_JOBS)
    calls = tuple(
        Call(
            str(job), str(job), tuple(Option(d, 1, "", seconds - shorter_s) for d in range(machines)),
            tuple(order.index(other) for other in after),
        )
        for job, (seconds, after) in _JOBS.items()
    )  # fmt: skip
    return float(subject(CallProblem(calls, machines)))


TECHNIQUE = Technique(
    key="realhf",
    name="ReaLHF (a plan per call)",
    slot=None,
    kind="solver",
    source="arXiv:2406.14088",
    summary="Devices and a layout for every call of an RLHF step",
    figures=(
        Figure(
            "makespan of ten jobs with precedence on three machines, where one that never waits takes 36",
            30.0,
            1e-9,
            _SOURCE,
            lambda subject: _makespan(subject, 3, 0.0),
        ),
        Figure(
            "the same on two machines, every job a unit shorter, where one that never waits takes 32",
            27.0,
            1e-9,
            _SOURCE,
            lambda subject: _makespan(subject, 2, 1.0),
        ),
    ),
    solve=solver("calls.plan_calls", "time_s"),
    naive=_as_they_come,
)
