"""``planner train --lengths``: sequences of every length, packed for the plans, and dealt to groups of devices beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from planner.errors import PlannerError, SpecError
from planner.errors import Problem as Fault

if TYPE_CHECKING:
    from planner.cli.job import JobOptions
    from planner.solve.fleet import Fleet
    from planner.specs.problem import Problem

__all__ = ["dealt_sequences", "packed_job"]

_DEALING_S = 10.0


def packed_job(job: JobOptions, lengths: str | None) -> tuple[JobOptions, dict[int, int] | None]:
    """The job of packed sequences that a histogram of lengths makes, and the histogram; the job itself without one."""
    if lengths is None:
        return job, None
    from planner.cli.solve_job import read_histogram
    from planner.solve.lengths import packed
    from planner.specs.workload import TrainWorkload

    beside = {
        "--global-batch": job.global_batch,
        "--seq-len": job.seq_len,
        "--document-len": job.document_len,
    }
    faults = [
        Fault(flag, "is given beside --lengths", "one of them")
        for flag, value in beside.items()
        if value is not None
    ]
    if faults:
        raise SpecError(faults)
    histogram = read_histogram(lengths)
    whole = packed(TrainWorkload(1, 1), histogram)
    batch, seq_len, document_len = whole.global_batch_size, whole.seq_len, whole.document_len
    job = replace(job, global_batch=str(batch), seq_len=str(seq_len), document_len=str(document_len))
    return job, histogram


def dealt_sequences(fleet: Fleet, problems: list[Problem], histogram: dict[int, int]) -> dict[str, Any]:
    """The sequences of a step in groups of unlike sizes, on the best plan's cluster; or why there are none."""
    from planner.solve.lengths import deal

    problem, best = fleet.problem_of_best(problems), fleet.result.best
    try:
        dealt = deal(problem, best, histogram, _DEALING_S)
    except PlannerError as error:
        return {"refused": str(error)}
    groups = [
        {"degree": degree, "sequences": [int(n) for n in row], "time_s": seconds}
        for degree, row, seconds in zip(
            dealt.groups.degrees, dealt.groups.counts, dealt.groups.group_s, strict=True
        )
    ]
    equal = None if dealt.equal is None else {"degree": dealt.equal.degrees[0], "time_s": dealt.equal.time_s}
    return {
        "time_s": dealt.groups.time_s, "lengths": list(dealt.lengths), "groups": groups, "equal": equal,
        "certificate": dealt.groups.certificate.as_dict(),
    }  # fmt: skip
