"""The answer of a layer-wise search: its best plan, and the uniform ones beside it, each with what is proved of it."""

from __future__ import annotations

from dataclasses import replace

from planner.plans.assemble import assemble, model_flop
from planner.plans.plan import Plan, SearchResult
from planner.solve.account import Account
from planner.solve.layerwise.settle import Candidate
from planner.solve.uniform import UniformSearch
from planner.specs.problem import Problem

__all__ = ["joined", "proved_plans"]


def joined(first: SearchResult, rest: SearchResult) -> SearchResult:
    """Plans that were found first, and those of the rows that layer-wise bounds left open; all others are excluded by these."""
    plans = {(*plan.mesh.items(), *plan.knobs.items()): plan for plan in (*first.plans, *rest.plans)}
    ranked = sorted(plans.values(), key=lambda plan: plan.estimate.step_time_s)
    before, after = first.search, rest.search
    scored, repriced = before.scored + after.scored, before.repriced + after.repriced
    excluded = before.candidates - scored - sum(before.rejected.values())
    report = replace(
        before, scored=scored, repriced=repriced, excluded_by_bound={"layer by layer": excluded},
        wall_s=before.wall_s + after.wall_s,
    )  # fmt: skip
    return SearchResult(tuple(ranked), report, first.pareto)


def proved_plans(
    problem: Problem, best: Candidate | None, account: Account, uniform: SearchResult | None, top: int
) -> tuple[Plan, ...]:
    """The layer-wise plan, if there is one, before the uniform ones; each with what is proved of it."""
    plans: list[Plan] = []
    if best is not None:
        plans.append(_assembled(problem, best))
    plans += [] if uniform is None else uniform.plans
    return tuple(replace(plan, optimality=account.proved(plan.estimate.step_time_s)) for plan in plans[:top])


def _assembled(problem: Problem, best: Candidate) -> Plan:
    """The candidate as a plan, priced anew from ledgers of its own."""
    uniform = UniformSearch(problem, 1, lambda batch: [])
    recipe = {
        **dict(best.mesh.recipe.items()),
        **best.assignment.strategies[0],
        "schedule": best.deal.schedule,
    }
    knobs = uniform.space.knobs(recipe)
    flop = model_flop(problem.model, problem.workload)
    return assemble(
        problem, recipe, knobs, best.mesh.row, best.layout, None, None, flop, best.assignment
    ).plan
