"""Runs whose sequences grow: a plan for every length, and the time of them all.

Every phase has as many tokens per step; its best plan is searched. Where the plans of neighbouring phases differ in where
weights and states lie, these are stored and loaded again, so that the best plan of another phase may serve better: the choice
is a shortest path over the phases' best plans, each searched again at every length with its placement fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from planner.costs.economics import phases_run_s
from planner.costs.optimizer import optimizer_state_bytes
from planner.costs.precision import dtype_bytes
from planner.costs.reliability import resumed_s
from planner.errors import Infeasible, SpecError
from planner.errors import Problem as Fault
from planner.plans.plan import Plan
from planner.solve.train import search
from planner.specs.parameters import parameter_count
from planner.specs.problem import Problem

__all__ = ["Curriculum", "Phase", "plan_curriculum"]

_PLACING = (
    "zero_stage",
    "zero_group",
    "virtual_stages",
    "pipeline_layout",
)  # knobs that say where weights and states lie


@dataclass(frozen=True, slots=True)
class Phase:
    """Tokens of one length, under one plan: ``run_s`` of them, and ``switch_s`` before, where the plan is another one."""

    seq_len: int
    tokens: float
    plan: Plan
    run_s: float
    switch_s: float


@dataclass(frozen=True, slots=True)
class Curriculum:
    """The phases, and the time of all tokens: with them, and at the last phase's length throughout."""

    phases: tuple[Phase, ...]
    run_s: float
    at_last_length_s: float


def plan_curriculum(
    problem: Problem,
    lengths: Mapping[int, float],
    tokens_per_step: float,
    store_bytes_per_s: float,
    restart_s: float,
) -> Curriculum:
    """Plans for the phases of a run.

    Args:
        problem: what is trained, and where; length and batch are the phases'.
        lengths: tokens of every length, in the order in which they are trained on.
        tokens_per_step: of every phase.
        store_bytes_per_s: what a device stores and loads per second, where plans change.
        restart_s: to start again under another plan.

    Raises:
        SpecError: a step holds less than one sequence, or a choice is unknown.
        Infeasible: a phase has no plan.
    """
    phases = [_phase(problem, length, tokens_per_step) for length in lengths]
    best = [search(phase, top=1).best for phase in phases]
    priced = [[_under(phase, plan) for plan in best] for phase in phases]
    step_s = np.array([[np.inf if p is None else p.estimate.step_time_s for p in row] for row in priced])
    tokens = np.array(list(lengths.values()))
    per_step = np.array([phase.workload.tokens_per_step for phase in phases], dtype=float)
    run_s = tokens[:, None] / per_step[:, None] * step_s
    switch_s = restart_s + float(
        resumed_s(_state_bytes(problem), problem.cluster.devices, problem.cluster.devices, store_bytes_per_s)
    )
    changed = np.array([[_choices(one) != _choices(other) for other in best] for one in best])
    chosen = _shortest(run_s, changed * switch_s)
    switches = [0.0] + [float(changed[one, other]) * switch_s for one, other in pairwise(chosen)]
    found = tuple(
        Phase(length, float(tokens[i]), plan, float(run_s[i, chosen[i]]), switches[i])
        for i, length in enumerate(lengths)
        if (plan := priced[i][chosen[i]]) is not None
    )
    rates = per_step / step_s[np.arange(len(found)), chosen]
    at_last = float(tokens.sum() / per_step[-1] * step_s[-1, -1])
    return Curriculum(found, float(phases_run_s(tokens, rates, np.array(switches))), at_last)


def _phase(problem: Problem, length: int, tokens_per_step: float) -> Problem:
    batch = int(tokens_per_step // length)
    if batch < 1:
        found = f"{tokens_per_step:g} for sequences of {length:,} tokens"
        raise SpecError(Fault("--tokens-per-step", found, "at least one sequence per step"))
    return replace(problem, workload=replace(problem.workload, global_batch_size=batch, seq_len=length))


def _under(phase: Problem, plan: Plan) -> Plan | None:
    """The best plan of a phase that leaves weights and states where another plan has them; None without any."""
    if plan.workload["seq_len"] == phase.workload.seq_len:
        return plan
    try:
        return search(
            replace(phase, fixed={**phase.fixed, **_choices(plan)}, allowed=plan.permissions), top=1
        ).best
    except (Infeasible, SpecError):
        return None


def _choices(plan: Plan) -> dict[str, object]:
    """Where weights and states lie: what has to change for another plan to follow."""
    return {**plan.mesh, **{name: plan.knobs[name] for name in _PLACING if name in plan.knobs}}


def _state_bytes(problem: Problem) -> float:
    """Weights and states of all parameters, in fp32."""
    each = float(optimizer_state_bytes(problem.workload.optimizer, master_bytes=dtype_bytes("fp32")))
    return each * parameter_count(problem.model)


def _shortest(run_s: NDArray[np.float64], switch_s: NDArray[np.float64]) -> list[int]:
    """The plan of every phase on the shortest path: (phases, plans) seconds of work, (plans, plans) between two phases."""
    total = run_s[0]
    before: list[NDArray[np.intp]] = []
    for row in run_s[1:]:
        arrive = total[:, None] + switch_s
        before.append(arrive.argmin(axis=0))
        total = arrive.min(axis=0) + row
    path = [int(total.argmin())]
    for choice in reversed(before):
        path.append(int(choice[path[-1]]))
    return path[::-1]
