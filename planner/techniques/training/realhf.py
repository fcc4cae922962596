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

_SECONDS = (3, 2, 2, 2, 4, 4, 4, 4, 9)
_AFTER: dict[int, tuple[int, ...]] = {8: (0,), 4: (3,), 5: (3,), 6: (3,), 7: (3,)}
_MACHINES = 4


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


def _makespan(subject: Any) -> float:
    """Seconds of nine calls of one device each."""
    from planner.solve.combinatorial.calls import Call, CallProblem, Option

    calls = tuple(
        Call(str(i), str(i), tuple(Option(d, 1, "", float(s)) for d in range(_MACHINES)), _AFTER.get(i, ()))
        for i, s in enumerate(_SECONDS)
    )
    return float(subject(CallProblem(calls, _MACHINES)))


TECHNIQUE = Technique(
    key="realhf",
    name="ReaLHF (a plan per call)",
    slot=None,
    kind="solver",
    source="arXiv:2406.14088",
    summary="Devices and a layout for every call of an RLHF step",
    figures=(
        Figure(
            "makespan of nine jobs with precedence on four machines, where taking them as they come needs 15",
            12.0,
            1e-9,
            "Graham 1969 (doi:10.1137/0117039), the anomaly of one machine more: 12 on three machines is the longest path",
            _makespan,
            second_hand=True,
        ),
    ),
    solve=solver("calls.plan_calls", "time_s"),
    naive=_as_they_come,
)
