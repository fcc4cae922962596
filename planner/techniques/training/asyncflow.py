"""AsyncFlow: answers to the next prompts are generated while earlier ones are trained on, on devices of their own.

What it does: up to n further steps are under way (``planner solve rlhf --staleness n --allow staleness``), so that calls wait for
    devices and not for each other; how many devices generate and how many train follows.
Saves: the wait along the step's longest path; generation on fewer devices, where it uses them better.
Costs: answers are those of weights up to n steps old.
Assumes: a steady state, whose period is the busiest device's work or the longest path over the steps under way; weights arrive
    between two steps, at the time that their move takes.
Source: Han et al. 2025 (AsyncFlow, arXiv:2507.01663) §4.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from planner.technique import Technique
from planner.techniques import figures
from planner.techniques.solvers import solver

_DEVICES = 3
_PLAN = solver("calls.plan_calls", "time_s")


def _one_at_a_time(problem: Any) -> float:
    return float(_PLAN(replace(problem, staleness=0)))


def _period(subject: Any) -> float:
    """Seconds per step of seven calls, each of which reads what the one before has written."""
    from planner.solve.combinatorial.calls import Call, CallProblem, Option

    calls = tuple(
        Call(
            str(i), str(i), tuple(Option(d, 1, "", float(s)) for d in range(_DEVICES)), (i - 1,) if i else ()
        )
        for i, s in enumerate(figures.graham_jobs(_DEVICES))
    )
    return float(subject(CallProblem(calls, _DEVICES, staleness=len(calls))))


TECHNIQUE = Technique(
    key="asyncflow",
    name="AsyncFlow (steps that overlap)",
    slot=None,
    kind="solver",
    source="arXiv:2507.01663",
    summary="Generation beside the training of earlier answers, and how many devices for each",
    needs=("staleness",),
    figures=(figures.graham_figure("period of steps that do not wait for each other", _DEVICES, _period),),
    solve=_PLAN,
    naive=_one_at_a_time,
)
