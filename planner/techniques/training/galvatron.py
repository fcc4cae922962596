"""Galvatron: every layer's own strategy, at the least time within the device's memory.

What it does: chooses for every layer what to recompute, shard and offload, with a price for every change between neighbours;
    ``planner train --layerwise``.
Saves: time where only some layers have to give up memory for it.
Costs: plans whose layers differ, which few launchers run.
Assumes: layers' times add up. Galvatron's dynamic programming over memory in whole units is a reference in the tests; what is
    used is exact in bytes.
Source: Miao et al. 2023 (Galvatron, VLDB, arXiv:2211.13878) §4.
"""

from __future__ import annotations

from typing import Any

from planner.technique import Figure, Technique
from planner.techniques.solvers import solver

# The instance P01 of the 0-1 knapsack problem: what is left out costs its profit, what is kept its weight.
_WEIGHTS = (23, 31, 29, 44, 53, 38, 63, 85, 89, 82)
_PROFITS = (92, 57, 49, 68, 60, 43, 67, 84, 87, 72)
_CAPACITY = 165.0


def _same_for_all(problem: Any) -> float:
    """One strategy for every layer."""
    alike = [[strategy] * len(problem.names) for strategy in range(2)]
    return float(min(problem.seconds(x) for x in alike if problem.held_bytes(x) <= problem.budget_bytes))


def _profit(subject: Any) -> float:
    """What ten layers save that keep their tensors within a memory of 165."""
    import numpy as np

    from planner.solve.combinatorial.choices import ChoiceGraph

    names = [f"layer {i}" for i in range(len(_WEIGHTS))]
    seconds = [np.array([float(p), 0.0]) for p in _PROFITS]
    held = [np.array([0.0, float(w)]) for w in _WEIGHTS]
    return sum(_PROFITS) - float(subject(ChoiceGraph(names, seconds, held, {}, _CAPACITY)))


TECHNIQUE = Technique(
    key="galvatron",
    name="Galvatron (a strategy per layer)",
    slot=None,
    kind="solver",
    source="arXiv:2211.13878",
    summary="A strategy for every layer within the device's memory",
    figures=(
        Figure(
            "largest profit of the knapsack instance P01 (ten items, capacity 165)",
            309.0,
            1e-9,
            "J. Burkardt, Florida State University, data sets KNAPSACK_01, P01",
            _profit,
        ),
    ),
    solve=solver("choices.minimise", "time_s"),
    naive=_same_for_all,
)
