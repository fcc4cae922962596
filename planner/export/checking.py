"""Is a configuration right, and is it any good: rules that it breaks, what it wastes, and what the best plan would gain.

The gain is told knob by knob: of the choices in which the best plan differs, the one that helps most is made first, then the next
one, until the best plan is reached. Choices that are not possible one by one are made together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from planner.errors import InvalidPlan, SpecError
from planner.export.caught import caught_by
from planner.export.launched import LaunchedRun
from planner.export.launchers import launcher as find_launcher
from planner.export.steps import Price, way
from planner.export.target import Target
from planner.plans.plan import Plan
from planner.solve.named import estimate
from planner.specs.problem import Problem

__all__ = ["Change", "Finding", "findings", "path_to"]

_TOGETHER: Mapping[str, tuple[str, ...]] = {
    "tp": ("sequence_parallel", "tensor_overlap"),
    "cp": ("context",),
    "pp": ("schedule", "virtual_stages", "pipeline_layout"),
    "ep": ("etp",),
    "recompute": ("recompute_layers", "recompute_modules"),
    "zero_group": ("zero_group_ranks",),
}
"""Knobs that mean little without another one: where both differ, they change together."""
_WORTH_A_WORD = 0.10  # of the step; smaller parts are not worth a warning


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a configuration.

    Attributes:
        level: ``error`` (it will not run, or not as meant) or ``warning`` (it wastes time or memory).
        what: one sentence.
        caught_by: the layer of the launcher that would have caught it; empty where none would, or it is not known.
    """

    level: str
    what: str
    caught_by: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """One step of the way to the best plan: knobs (name → (was, is)), and the step time before and after it."""

    knobs: Mapping[str, tuple[Any, Any]]
    before_s: float
    after_s: float
    fits: bool


def findings(problem: Problem, run: LaunchedRun) -> tuple[list[Finding], Plan | None]:
    """What is wrong or wasteful, errors first, and the plan; None where it cannot be priced.

    Args:
        problem: the problem whose only plan the configuration is.
        run: what was read from the configuration.
    """
    undealt = _undealt(problem)
    if undealt:
        return [Finding("error", undealt, caught_by(run.launcher, undealt))], None
    try:
        plan = estimate(problem)
    except InvalidPlan as error:
        reasons = [fault.found for fault in error.problems]
        return [Finding("error", reason, caught_by(run.launcher, reason)) for reason in reasons], None
    # Files that say nothing about kernels are not judged on them.
    judged = {name for name in problem.fixed if name in plan.knobs}
    refused = Target.of(plan, problem.model, problem.cluster).refused(find_launcher(run.launcher))
    found = [
        Finding("error", fault.found, caught_by(run.launcher, fault.found))
        for fault in refused
        if not fault.found.startswith("cannot express") or fault.found.split()[2].partition("=")[0] in judged
    ]
    found += _memory(plan)
    found += [Finding("warning", sentence) for sentence in run.wasteful]
    found += list(_shares(plan))
    return found, plan


def path_to(problem: Problem, plan: Plan, best: Plan) -> list[Change]:
    """Steps from a plan to the best one, the most helpful choice first; their gains add up to the whole.

    Args:
        problem: the problem whose only plan ``plan`` is.
        plan, best: where the way starts and ends.
    """
    current, goal = _choices(plan), _choices(best)

    def price(choices: Mapping[str, Any]) -> Price | None:
        fixed = {name: value for name, value in choices.items() if value is not None}
        try:
            found = estimate(replace(problem, fixed=fixed, launcher=None, layerwise=None)).estimate
        except (InvalidPlan, SpecError):
            return None
        return found.step_time_s, found.fits

    start, end = ((p.estimate.step_time_s, p.estimate.fits) for p in (plan, best))
    steps = way(current, goal, list(_groups(current, goal)), price, start, end)
    return [Change(step.knobs, step.before, step.after, step.fits) for step in steps]


# -- what is wrong -----------------------------------------------------------------------------------------------------


def _undealt(problem: Problem) -> str:
    """Why devices or sequences cannot be dealt; empty where they can."""
    tp, cp, pp, size = (int(problem.fixed.get(name, 1)) for name in ("tp", "cp", "pp", "micro_batch_size"))
    devices, batch = problem.cluster.devices, problem.workload.global_batch_size
    replicas, left = divmod(devices, tp * cp * pp)
    if left or not replicas:
        return f"devices do not divide among tp · cp · pp = {tp * cp * pp}: there are {devices:,}"
    if batch % (replicas * size):
        return f"a global batch of {batch:,} is no whole number of micro-batches of {size} on {replicas:,} replicas"
    return ""


def _memory(plan: Plan) -> Iterator[Finding]:
    estimate_ = plan.estimate
    peak, budget = estimate_.memory_bytes["peak"] / 2**30, estimate_.memory_budget_bytes / 2**30
    if peak > budget:
        yield Finding(
            "error",
            f"does not fit: a peak of {peak:.1f} GiB of {budget:.1f} GiB is predicted",
            "the allocator, in the first steps",
        )
    elif not estimate_.fits:
        yield Finding(
            "error",
            f"does not fit: {estimate_.host_bytes / 2**30:.0f} GiB of host memory and "
            f"{estimate_.nvme_bytes / 2**30:.0f} GiB of NVMe per device",
            "the host's kernel, or its file system",
        )
    elif (estimate_.oom_probability or 0.0) > _WORTH_A_WORD:
        yield Finding(
            "warning", f"may not fit: {estimate_.oom_probability:.0%} risk of running out of memory"
        )


_SHARES: Mapping[str, str] = {
    "pipeline_bubble": "of the step is the pipeline's bubble: more micro-batches or virtual stages shrink it",
    "recompute": "of the step is recomputation",
    "tensor_parallel": "of the step is exposed tensor-parallel traffic",
    "data_parallel": "of the step is exposed data-parallel traffic",
    "context_parallel": "of the step is exposed context-parallel traffic",
    "expert_parallel": "of the step is exposed expert traffic",
}


def _shares(plan: Plan) -> Iterator[Finding]:
    """Parts of the step that do not train."""
    for name, sentence in _SHARES.items():
        share = plan.estimate.breakdown_s.get(name, 0.0) / plan.estimate.step_time_s
        if share > _WORTH_A_WORD:
            yield Finding("warning", f"{share:.0%} {sentence}.")


# -- the way to the best plan ------------------------------------------------------------------------------------------


def _choices(plan: Plan) -> dict[str, str]:
    """Every choice of a plan as text; dp is what remains."""
    kept = {name: value for name, value in {**plan.mesh, **plan.knobs}.items() if name != "dp"}
    return {name: str(value).lower() for name, value in kept.items()}


def _groups(current: Mapping[str, str], goal: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    """Knobs that differ; those that mean nothing alone together with the one that they detail."""
    differing = [name for name in {**current, **goal} if current.get(name) != goal.get(name)]
    owner = {detail: name for name, details in _TOGETHER.items() for detail in details}
    seen: dict[str, list[str]] = {}
    for name in differing:
        seen.setdefault(owner.get(name, name), []).append(name)
    for name, names in seen.items():
        yield tuple(dict.fromkeys([name, *names])) if name in differing else tuple(names)
