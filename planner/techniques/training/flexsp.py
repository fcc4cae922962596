"""FlexSP: groups of several sizes side by side, each with the sequences of a step that suit it.

What it does: forms groups of devices and deals a histogram of sequences to them so that the slowest group is as fast as can be;
    ``planner solve sequences``.
Saves: short sequences stay on few ranks and pay no exchange, long ones get as many as they need.
Costs: groups change from step to step.
Assumes: a group's sequences add up; they run one after the other, or packed in one micro-batch.
Source: Wang et al. 2025 (FlexSP, arXiv:2412.01523) §4; one assignment of it is ByteScale's (arXiv:2502.21231).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from planner.technique import Technique
from planner.techniques import figures
from planner.techniques.solvers import solver

_GROUPS = 3


def _longest_first(problem: Any) -> float:
    from planner.solve.combinatorial.sequences import longest_first

    dealt = longest_first(problem, problem.degrees[0])
    assert dealt is not None
    return dealt.time_s


def _makespan(subject: Any) -> float:
    """Seconds of the busiest of three equal groups."""
    import numpy as np

    from planner.solve.combinatorial.sequences import SequenceProblem

    jobs = Counter(figures.graham_jobs(_GROUPS))
    seconds = np.array([[float(length)] for length in jobs])
    problem = SequenceProblem(tuple(jobs), tuple(jobs.values()), (1,), seconds, seconds, _GROUPS)
    return float(subject(problem))


TECHNIQUE = Technique(
    key="flexsp",
    name="FlexSP",
    slot=None,
    kind="solver",
    source="arXiv:2412.01523",
    summary="Sequences of a step to groups of several sizes",
    figures=(figures.graham_figure("seconds of the busiest group", _GROUPS, _makespan),),
    solve=solver("sequences.assign_sequences", "time_s"),
    naive=_longest_first,
)
