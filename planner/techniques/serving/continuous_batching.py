"""Iteration-level batching: requests join and leave between any two iterations.

What it does: nothing to the ledger; prompts of new requests share an iteration with the decodes of all others, and memory is
    reserved for the whole of a request (paged memory is another choice).
Saves: the slots and the waiting of a static batch: a request that ends makes room at once.
Costs: every decode of an iteration waits for the prompts in it.
Assumes: decisions are taken between iterations only.
Source: Yu et al. 2022 (Orca, OSDI).
"""

from __future__ import annotations

from planner.technique import Figure, Technique


def _response(policy: str) -> float:
    """Mean response over mean size at load ½ of iterations as long as their batch; one request at a time without a policy."""
    import numpy as np

    from planner.load.iteration_time import Affine
    from planner.load.requests import Lengths, draw
    from planner.load.scheduler import Scheduler, scheduler
    from planner.load.simulator import simulate

    rules = scheduler(policy, max_requests=10**9) if policy else Scheduler(max_requests=1)
    jobs = draw(Lengths(1, 200), 20_000, rate_per_s=2.5, seed=1)
    run = simulate(jobs, Affine(1e-9, 1e-3, 0.0, 1e-3), rules)
    return float(np.mean(run.finish_s - run.requests.arrival_s) / 0.2)


TECHNIQUE = Technique(
    key="continuous_batching",
    name="Orca: iteration-level scheduling + selective batching",
    slot=None,
    job="serving",
    source="OSDI 2022",
    summary="Requests join and leave every iteration: fixed point, chain and simulation",
    figures=(
        Figure(
            "mean response of processor sharing at load ½, in service times: 1/(1 − ρ)",
            2.0,
            0.03,
            "Kleinrock 1976 (Queueing Systems, vol. 2, section 4.4): what batching every iteration comes to",
            _response,
        ),
    ),
    order="orca",
)
