"""Which states keep the latencies that were promised, and which promise is missed by most."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.ledger import Array
from planner.serving.aggregated import Steady
from planner.specs.serve_problem import ServeProblem


def limits_kept(problem: ServeProblem, state: Steady) -> tuple[NDArray[np.bool_], NDArray[np.str_], Array]:
    """Rows that keep every limit; the limit that is missed by most, and found over allowed of it."""
    traffic = problem.traffic
    quantile = None if traffic.percentile is None else traffic.percentile / 100.0
    ttft = state.ttft_s if quantile is None else state.ttft_at(quantile)
    tpot = state.tpot_s if quantile is None else state.tpot_at(quantile)
    ratios = np.zeros((3, len(ttft)))
    if traffic.ttft_s is not None:
        ratios[0] = ttft / traffic.ttft_s
    if traffic.tpot_s is not None and traffic.osl > 1:
        ratios[1] = tpot / traffic.tpot_s
    if traffic.e2e_s is not None:
        ratios[2] = (ttft + (traffic.osl - 1.0) * tpot) / traffic.e2e_s
    worst = ratios.argmax(axis=0)
    most = ratios.max(axis=0)
    return most <= 1.0, np.array(["ttft", "tpot", "e2e"])[worst], most
