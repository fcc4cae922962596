"""Prompts and generation in pools of their own.

What it does: prefill replicas run prompts and hand keys and values to decode replicas; each pool has its own mesh and number of
    replicas, and the two are matched in rate.
Saves: prompts do not delay generation, and each phase gets the layout that suits it.
Costs: keys and values travel; a prompt waits in a queue of its own; two copies of the weights.
Assumes: Poisson arrivals, prompts of one length (M/D/1); a layer's cache travels while the next layer runs.
Second hand: the lengths of the conversations that its simulator's best placement is for; with their means, and the constants of
    an engine of 2023, the search finds the same placement within a seventh of the same rate (tests/paper).
Source: Zhong et al. 2024 (DistServe, OSDI) section 3.1; Patel et al. 2024 (Splitwise, ISCA) section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.costs.serving import queue_load
from planner.technique import Figure, Knob, Technique


def _rate(subject: Callable[..., float]) -> float:
    """Requests per second of a prefill replica at which the mean time to the first token is 1.5 of a prompt's."""
    return float(subject(0.5, 1.0))


TECHNIQUE = Technique(
    key="distserve",
    name="DistServe: disaggregated prefill/decode, goodput placement",
    slot=None,
    job="serving",
    source="OSDI 2024",
    summary="Prompts and generation in pools of their own",
    knobs=(Knob("mode", "one pool, or one per phase", ("aggregated", "disaggregated")),),
    figures=(
        Figure(
            "rate R at which the mean time to the first token D + R D^2 / (2 (1 - R D)) is 1.5 for D = 1",
            0.5,
            1e-9,
            "Zhong et al. 2024 (DistServe, OSDI), equation 1",
            _rate,
        ),
    ),
    compose=queue_load,
)
