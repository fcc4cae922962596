"""Static batching: what waits is taken as one batch, and the next one waits until all of it has ended.

What it does: nothing to the ledger; requests are admitted only when nothing runs, padded to the longest, and end together.
Saves: weights are read once for all of a batch.
Costs: slots idle until the longest output ends (1/H_b of them work for b exponential outputs); arrivals wait for a batch.
Assumes: a batch is not held back to grow; it starts when the one before it has ended.
Source: Y. Inoue 2021 (arXiv:1912.06322); as the baseline of Orca (Yu et al. 2022, OSDI).
"""

from __future__ import annotations

from planner.technique import Figure, Knob, Technique


def _response_s(policy: str) -> float:
    """Mean response at 5 jobs per second in batches of ``0.1b + 1`` seconds; one by one where there is no policy."""
    from planner.load.iteration_time import Affine
    from planner.load.requests import Lengths, draw
    from planner.load.results import summarize
    from planner.load.scheduler import scheduler
    from planner.load.simulator import simulate

    rules = scheduler(policy or "vllm", max_requests=10**9 if policy else 1)
    jobs = draw(Lengths(1, 1), 20_000, rate_per_s=5.0, seed=1)
    found = summarize(simulate(jobs, Affine(1.0, per_prefill_token_s=0.1), rules), 0.1)
    assert found.ttft_s is not None
    return found.ttft_s.mean


TECHNIQUE = Technique(
    key="static_batching",
    name="Request-level (static) batching",
    slot=None,
    job="serving",
    source="arXiv:1912.06322",
    summary="Batches form and end as a whole: a mode of its own (Inoue's response), and simulated",
    knobs=(
        Knob(
            "mode", "requests join a batch as they come, or batches end as a whole", ("aggregated", "static")
        ),
    ),
    figures=(
        Figure(
            "mean response in seconds, 5 jobs/s in batches of 0.1b + 1 s: the closed form",
            3.167,
            0.02,
            "Inoue 2021 (arXiv:1912.06322), Theorem 2: min(φ0, φ1)",
            _response_s,
        ),
    ),
    order="static",
)
