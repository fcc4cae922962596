"""The Pareto front of step time and memory: the best plan under a falling memory budget.

Each point is the exact answer of a search whose budget lies a step below the peak of the point before it (the
ε-constraint method, Haimes et al. 1971): no uniform plan with its peak or less is faster.
"""

from __future__ import annotations

from dataclasses import replace

from planner.errors import Infeasible
from planner.plans.plan import Plan
from planner.solve.train import search
from planner.specs.problem import Problem

__all__ = ["pareto_front"]

_STEP = 0.85  # each budget, relative to the peak of the plan before it
_POINTS = 6


def pareto_front(problem: Problem, best: Plan, points: int = _POINTS) -> tuple[Plan, ...]:
    """The best plan, then the best plan under each smaller budget, until nothing fits or there are enough.

    Args:
        problem: as it was searched.
        best: its best plan.
        points: how many plans at most.
    """
    front = [best]
    total_bytes = float(problem.cluster.device.memory_bytes)
    while len(front) < points:
        budget_bytes = _STEP * front[-1].estimate.memory_bytes["peak"]
        try:
            front.append(search(replace(problem, reserve=1.0 - budget_bytes / total_bytes), top=1).best)
        except Infeasible:
            break
    return tuple(front)
