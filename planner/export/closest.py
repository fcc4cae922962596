"""The plan nearest to a given one that a launcher can run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from planner.errors import Infeasible, InvalidPlan, SpecError
from planner.export.launchers import launcher as find_launcher
from planner.plans.plan import Plan
from planner.solve.replay import replay
from planner.solve.space import DEGREES
from planner.solve.train import search
from planner.technique import ADDITIVE_SLOTS, SLOTS, Detail, Launcher, discover

__all__ = ["Closest", "closest_plan"]

_KEPT = ("precision", "optimizer")


@dataclass(frozen=True, slots=True)
class Closest:
    """A plan, and the knobs in which it differs: name → (was, is)."""

    plan: Plan
    changes: Mapping[str, tuple[Any, Any]]


def closest_plan(plan: Plan, launcher: str) -> Closest | None:
    """The plan that a launcher can run and that gives up least of another one.

    Choices are given up in rounds until some plan is left, and the fastest of the round is taken: those that the launcher
    has no word for; then any one more; then all that is sharded, recomputed and scheduled; then kernels; then the mesh.

    Args:
        plan: a plan that the launcher refuses.
        launcher: key of :data:`planner.export.launchers.LAUNCHERS`.

    Returns:
        None where the launcher runs no plan for the job.

    Raises:
        SpecError: the plan names a model, a cluster or a stack that cannot be found.
    """
    ability, problem = find_launcher(launcher), replay(plan)
    kept_stages = ability.takes_stages(plan.stages, plan.mesh["pp"])
    for rounds in _rounds(problem.fixed, ability, kept_stages):
        found: Plan | None = None
        for kept in rounds:
            try:
                best = search(replace(problem, fixed=kept, launcher=ability), top=1).best
            except (Infeasible, InvalidPlan, SpecError):
                continue
            if found is None or best.estimate.step_time_s < found.estimate.step_time_s:
                found = best
        if found is not None:
            return Closest(found, _changes(plan, found))
    return None


def _rounds(fixed: Mapping[str, Any], launcher: Launcher, stages: bool) -> Iterator[list[dict[str, Any]]]:
    """Choices that are kept, fewer in every round, and in how many ways; of layouts, whether ``stages`` are kept."""
    dealt = ("virtual_stages", *(["pipeline_layout"] if stages else ()))
    slots = {name: slot for name, slot in _slots_of_details().items() if name in fixed}
    sayable = {
        name: value
        for name, value in fixed.items()
        if launcher.allows(name, str(value)) or name in DEGREES or name in ("gradient_dtype", *dealt, *slots)
    }
    yield [_with_details(sayable, slots)]
    single = [{n: v for n, v in sayable.items() if n != slot} for slot in SLOTS if slot in sayable]
    yield [_with_details(kept, slots) for kept in single]
    branch = {n: v for n, v in sayable.items() if n not in (*ADDITIVE_SLOTS, *dealt)}
    yield [_with_details(branch, slots)]
    yield [{n: v for n, v in sayable.items() if n in (*DEGREES, *_KEPT)}]
    yield [{n: v for n, v in fixed.items() if n in _KEPT}]


def _with_details(kept: Mapping[str, Any], slots: Mapping[str, str | None]) -> dict[str, Any]:
    """What is kept, without details of choices that are not, and without the stages of an open schedule."""
    lost = {name for name, slot in slots.items() if slot not in kept}
    lost |= set() if "schedule" in kept else {"virtual_stages", "pipeline_layout"}
    return {name: value for name, value in kept.items() if name not in lost}


def _slots_of_details() -> dict[str, str | None]:
    """Name of a detail → the slot of whose choice it says more."""
    techniques = discover("training").values()
    return {knob.name: t.slot for t in techniques for knob in t.knobs if isinstance(knob, Detail)}


def _changes(plan: Plan, found: Plan) -> dict[str, tuple[Any, Any]]:
    """By name, what a plan has and what the other one has; what layers have in different ways is told with all its values."""
    before = {**plan.mesh, **plan.knobs, **_by_layer(plan.layerwise)}
    after = {**found.mesh, **found.knobs, **_by_layer(found.layerwise)}
    names = dict.fromkeys([*before, *after])
    return {
        name: (before.get(name, "-"), after.get(name, "-"))
        for name in names
        if str(before.get(name, "-")).lower() != str(after.get(name, "-")).lower()
    }


def _by_layer(layerwise: Mapping[str, Any] | None) -> dict[str, str]:
    """Choices and degrees in which the layers of a plan differ, with all the values that they take.

    >>> _by_layer({"strategies": [{"recompute": "none"}, {"recompute": "full"}, {"recompute": "none"}]})
    {'recompute': 'none or full by layer'}
    """
    if layerwise is None:
        return {}
    places = layerwise.get("places", ())
    several = [*layerwise["strategies"]], [{**place["choices"], **place["mesh"]} for place in places]
    return {
        name: f"{' or '.join(values)} by layer"
        for each in several
        for name in (each[0] if each else ())
        if len(values := list(dict.fromkeys(str(one[name]) for one in each))) > 1
    }
