"""FlexSP: groups of several sizes side by side, each with the sequences of a step that suit it.

What it does: forms groups of devices and deals a histogram of sequences to them so that the slowest group is as fast as can be;
    ``planner solve sequences``.
Saves: short sequences stay on few ranks and pay no exchange, long ones get as many as they need.
Costs: groups change from step to step.
Assumes: a group's sequences add up; they run one after the other, or packed in one micro-batch.
Source: Wang et al. 2025 (FlexSP, arXiv:2412.01523) §4; one assignment of it is ByteScale's (arXiv:2502.21231).
"""

from __future__ import annotations

from typing import Any

from planner.technique import Figure, Technique

_SEQUENCES = {5: 2, 4: 2, 3: 3}
_GROUPS = 3


def _assign(problem: Any) -> float:
    from planner.solve.combinatorial.sequences import assign_sequences

    return assign_sequences(problem).time_s


def _longest_first(problem: Any) -> float:
    from planner.solve.combinatorial.sequences import longest_first

    dealt = longest_first(problem, problem.degrees[0])
    assert dealt is not None
    return dealt.time_s


def _makespan(subject: Any) -> float:
    """Seconds of the busiest of three equal groups."""
    import numpy as np

    from planner.solve.combinatorial.sequences import SequenceProblem

    lengths = tuple(_SEQUENCES)
    seconds = np.array([[float(length)] for length in lengths])
    problem = SequenceProblem(lengths, tuple(_SEQUENCES.values()), (1,), seconds, seconds, _GROUPS)
    return float(subject(problem))


TECHNIQUE = Technique(
    key="flexsp",
    name="FlexSP",
    slot=None,
    kind="solver",
    source="arXiv:2412.01523",
    summary="Sequences of a step to groups of several sizes",
    figures=(
        Figure(
            "makespan of jobs 5, 5, 4, 4, 3, 3, 3 on three machines, where longest-first takes 11",
            9.0,
            1e-9,
            "Graham 1969 (doi:10.1137/0117039), the example at which 4/3 − 1/(3m) is reached",
            _makespan,
        ),
    ),
    solve=_assign,
    naive=_longest_first,
)
