"""ByteScale's hybrid data parallelism: a sequence gets as many ranks as it needs to fit, any number, and the others none of it.

What it does: one axis of all ranks in place of data and context parallelism; a sequence of s tokens is shared by ⌈s/C⌉ ranks of
    capacity C, short ones stay on one; ``planner solve sequences --degrees 1,2,3,…``.
Saves: exchange for sequences that fit on a rank, and the wait for ranks whose sequences are short.
Costs: groups of any size, which change from step to step.
Assumes: as FlexSP, whose integer program deals the sequences; groups of every size are candidates.
Source: Ge et al. 2025 (ByteScale, arXiv:2502.21231) §4.
"""

from __future__ import annotations

from typing import Any

from planner.technique import Figure, Technique
from planner.techniques.solvers import solver

_RANKS = 8
_LONG, _SHORT = 5, 3  # capacities of the long sequence; short ones
_EXCHANGE = 0.01  # of a short sequence's time, per further rank of its group


def _mesh(problem: Any) -> Any:
    """Context parallelism of one degree for all: the smallest power of two that holds the longest sequence."""
    longest = problem.memory_bytes[-1]
    return [d for d, held in zip(problem.degrees, longest, strict=True) if held <= 1.0 and d & (d - 1) == 0][
        :1
    ]


def _largest(subject: Any) -> float:
    """Ranks of the sequence of five ranks' capacity, beside three short ones on eight ranks."""
    import numpy as np

    from planner.solve.combinatorial.sequences import SequenceProblem

    degrees = tuple(range(1, _RANKS + 1))
    lengths = (1, _LONG)
    shared = np.array([[length / degree for degree in degrees] for length in lengths])
    time_s = shared + _EXCHANGE * (np.array(degrees) - 1.0)
    problem = SequenceProblem(lengths, (_SHORT, 1), degrees, time_s, shared, _RANKS, budget_bytes=1.0)
    return float(max(subject(problem)))


TECHNIQUE = Technique(
    key="bytescale_hdp",
    name="ByteScale (hybrid data parallelism)",
    slot=None,
    kind="solver",
    source="arXiv:2502.21231",
    summary="As many ranks for a sequence as it needs",
    figures=(
        Figure(
            "ranks of a sequence of five ranks' capacity: D(s) = ⌈s/C⌉",
            5.0,
            1e-9,
            "Ge et al. 2025 (arXiv:2502.21231), section 4.1: the number of ranks of a sequence is ⌈s/C⌉",
            _largest,
        ),
    ),
    solve=solver("sequences.assign_sequences", "degrees"),
    naive=_mesh,
)
