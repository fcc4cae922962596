"""Classes of requests: whoever is more urgent is admitted first.

What it does: nothing to the ledger; of those that wait, the most urgent class enters the batch, and where the cache runs out the
    least urgent request gives way (``priority`` of a trace, ``order = "priority"`` of a pool's file).
Saves: waiting, for those whose class comes first.
Costs: as much waiting for the others: work conserves it. Requests that gave way compute their cache again, or swap it.
Assumes: a class is known on arrival; ``simulate`` alone has classes, the search has one.
Source: Cobham 1954 (Operations Research 2(1)); Kleinrock 1976 (Queueing Systems, vol. 2, section 3.3); vLLM
    ``--scheduling-policy priority``.
"""

from __future__ import annotations

from planner.technique import Figure, Technique


def _waits(order: str) -> float:
    """Mean wait of the second of two equal classes over that of the first, one request at a time, at load ½."""
    from dataclasses import replace

    import numpy as np

    from planner.load.iteration_time import Affine
    from planner.load.requests import Lengths, draw
    from planner.load.scheduler import Scheduler
    from planner.load.simulator import simulate

    jobs = draw(Lengths(1, 1), 60_000, rate_per_s=0.5, seed=1)
    jobs = replace(jobs, priority=np.random.default_rng(2).integers(0, 2, len(jobs)))
    rules = Scheduler(max_requests=1, order="priority" if order else "arrival")
    run = simulate(jobs, Affine(0.0, 0.0, 0.0, 1.0), rules)
    wait_s = run.finish_s - run.requests.arrival_s - 1.0
    first, second = (float(np.mean(wait_s[run.requests.priority == index])) for index in (0, 1))
    return second / first


TECHNIQUE = Technique(
    key="priority_slo_classes",
    name="SLO classes, deadline and fair scheduling",
    slot=None,
    job="serving",
    source="Operations Research 2(1), 1954; OSDI 2024 (VTC; Llumnix)",
    summary="The most urgent first, by simulation; deadlines and fair shares are not modelled",
    figures=(
        Figure(
            "wait of the second of two equal classes over that of the first at load ½: 1/(1 − ρ)",
            2.0,
            0.03,
            "Kleinrock 1976 (Queueing Systems, vol. 2, section 3.3), Cobham's waits: W0/((1 − σ₁)(1 − σ₂)) over W0/(1 − σ₁)",
            _waits,
        ),
    ),
    order="priority",
)
