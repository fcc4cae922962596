"""Discrete-event simulation of a serving pool: every request, every iteration, any batching policy.

Between two events (an arrival that can be admitted, an end, a lack of blocks) the decoding batch does not change and its
context grows by ``n`` an iteration, so that a stretch of iterations is summed in closed form. The outcome is that of stepping
through the iterations one by one.

A pool decides at the end of an iteration only. A decode attends to its context with the new token included; a prompt's KV is
taken whole at its admission, a decode's block when it is entered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from planner.errors import Infeasible, Problem
from planner.load.engine import Batch
from planner.load.intake import Intake
from planner.load.iteration_time import IterationTime
from planner.load.pipelined import Pipeline
from planner.load.requests import Requests
from planner.load.scheduler import KvPool, Scheduler

__all__ = ["Run", "simulate"]

_REPORT_EVERY = 256


@dataclass(frozen=True, slots=True)
class Run:
    """What became of every request (arrays in order of arrival), and of the pool.

    Attributes:
        requests: as asked; in a closed loop with the arrivals that the loop made.
        first_token_s, finish_s: when the first and the last token came.
        preemptions: how often each request gave way.
        iterations: iterations run; request_iterations: the sum of requests over them.
        span_s, busy_s: from the first arrival to the last end; of that, inside iterations.
        decode_iteration_s: (3, stretches): seconds of a stretch's first and last iteration, and tokens that it decoded.
    """

    requests: Requests
    first_token_s: npt.NDArray[np.float64]
    finish_s: npt.NDArray[np.float64]
    preemptions: npt.NDArray[np.int64]
    iterations: int
    request_iterations: int
    span_s: float
    busy_s: float
    decode_iteration_s: npt.NDArray[np.float64]


def simulate(
    requests: Requests,
    iteration: IterationTime,
    scheduler: Scheduler,
    pool: KvPool | None = None,
    *,
    stages: int = 1,
    concurrency: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Run:
    """Serves all requests.

    Args:
        iteration: seconds of a batch's way through all stages.
        stages: pipeline stages, and batches under way; slots and blocks are those of all together.
        concurrency: a closed loop: so many requests are in the pool at all times, the next enters when one ends, and
            arrivals are made by the loop.
        on_progress: called with requests done and in all.

    Raises:
        Infeasible: a request is larger than the pool.
    """
    pool = pool or KvPool()
    _check_sizes(requests, pool)
    intake = Intake(requests, pool, scheduler.order == "priority", concurrency)
    if stages == 1:
        batches = [Batch(intake, iteration, scheduler)]
        advance = batches[0].advance
    else:
        pipeline = Pipeline(intake, iteration, scheduler, stages)
        batches, advance = pipeline.batches, pipeline.advance
    total, shown = len(requests), 0
    while intake.done < total:
        advance()
        if on_progress is not None and intake.done >= shown + _REPORT_EVERY:
            shown = intake.done
            on_progress(shown, total)
    return _outcome(intake, batches)


def _check_sizes(requests: Requests, pool: KvPool) -> None:
    most = int(np.max(requests.prompt_tokens + requests.output_tokens))
    usable = pool.blocks - pool.watermark_blocks
    if pool.blocks_of(most) > usable:
        raise Infeasible(
            Problem(
                "KV pool",
                f"{usable} blocks of {pool.block_tokens} tokens, the longest request needs {pool.blocks_of(most)}",
                f"a pool for {most} tokens",
                "Give the pool more memory, or cap the lengths.",
            )
        )


def _outcome(intake: Intake, batches: list[Batch]) -> Run:
    assert intake.free == intake.pool.blocks, "every block is given back"
    return Run(
        replace(intake.requests, arrival_s=np.array(intake.arrival)),
        np.array(intake.first),
        np.array(intake.finish),
        np.array(intake.gave_way),
        sum(batch.iterations for batch in batches),
        sum(batch.request_iterations for batch in batches),
        max(intake.finish) - intake.arrival[0],
        sum(batch.busy_s for batch in batches) / len(batches),
        np.concatenate([np.array(batch.log, dtype=float).reshape(-1, 3) for batch in batches]).T,
    )
