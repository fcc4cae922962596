"""Jobs whose sequences are of unlike lengths: packed for the plans, and beside them dealt to groups of unlike sizes.

A plan cuts every sequence alike. Packed to the longest length, with attention that stays inside the documents, short ones need
nothing more than their share; but all are cut into as many pieces as the longest needs. Groups of unlike sizes side by side
(FlexSP, ByteScale) cut each as far as it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

from planner.plans.plan import Plan
from planner.solve.combinatorial.sequences import Groups, assign_sequences, one_size
from planner.solve.sequence_costs import sequence_problem
from planner.specs.problem import Problem
from planner.specs.workload import TrainWorkload

__all__ = ["Dealt", "deal", "packed"]

_GAP = 0.01
_SHARED = ("precision", "attention_kernel", "elementwise_kernel", "loss_kernel", "context")


@dataclass(frozen=True, slots=True, eq=False)
class Dealt:
    """Groups of any sizes, and the best that are all of one size; seconds are of forward and backward, without gathers.

    ``equal`` is None where no one size has room for all sequences.
    """

    lengths: tuple[int, ...]
    groups: Groups
    equal: Groups | None


def packed(workload: TrainWorkload, histogram: Mapping[int, int]) -> TrainWorkload:
    """The job with as many sequences of the longest length as hold all tokens of a step.

    The document length is what attention sees on the average of all tokens, ``Σ n·l²/Σ n·l``, so that its products are as many.

    >>> job = packed(TrainWorkload(1, 1), {4096: 128, 65536: 4})
    >>> job.global_batch_size, job.seq_len, job.document_len
    (12, 65536, 24576)
    """
    tokens = sum(length * count for length, count in histogram.items())
    longest = max(histogram)
    seen = sum(length * length * count for length, count in histogram.items()) // tokens
    return replace(
        workload, global_batch_size=ceil(tokens / longest), seq_len=longest, document_len=min(seen, longest)
    )


def deal(problem: Problem, plan: Plan, histogram: Mapping[int, int], time_limit_s: float) -> Dealt:
    """Groups of the problem's devices for the sequences of a step, with the formats and kernels of a plan.

    Raises:
        SpecError: a length suits no group.
        Infeasible: states or a sequence exceed the memory.
        SolverError: nothing is found in time.
    """
    devices = problem.cluster.devices
    degrees = [2**i for i in range(devices.bit_length()) if devices % 2**i == 0]
    knobs = {name: str(plan.knobs[name]) for name in _SHARED if name in plan.knobs}
    workload = replace(problem.workload, document_len=None)
    table = sequence_problem(
        problem.model,
        problem.cluster,
        problem.stack,
        workload,
        dict(sorted(histogram.items())),
        degrees,
        knobs,
    )
    groups = assign_sequences(table, gap=_GAP, time_limit_s=time_limit_s)
    return Dealt(table.lengths, groups, one_size(table))
