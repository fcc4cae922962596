"""The one plan that a user names, priced in full: degrees and choices that are left open are at their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from planner.errors import InvalidPlan
from planner.errors import Problem as Fault
from planner.operators.baseline import block_order
from planner.pipeline.assignment import completed, group_of, read_assignment
from planner.pipeline.layout import Layout
from planner.pipeline.place import of_group
from planner.pipeline.transition import meets
from planner.plans.assemble import Assembly, assemble
from planner.plans.plan import Plan
from planner.solve.branches import Faults
from planner.solve.space import DEGREES, NOT_DEALT, Choice, Space
from planner.solve.uniform import UniformSearch
from planner.specs.problem import Problem
from planner.technique import ADDITIVE_SLOTS, SLOTS, off

__all__ = ["defaults", "estimate", "examine"]

_OF_A_STAGE = (*DEGREES, "virtual_stages", "pipeline_layout", "recompute_layers")


def estimate(problem: Problem) -> Plan:
    """Prices the one plan that ``problem.fixed`` names.

    Degrees that are not fixed are 1, dp is what remains; other knobs take the stack's choice, or their defaults
    (:func:`defaults`).

    Raises:
        InvalidPlan: the plan breaks a composition rule.
        SpecError: a knob is unknown.
    """
    return examine(problem).plan


def examine(problem: Problem) -> Assembly:
    """:func:`estimate`, with the ledgers and the shares behind the plan."""
    if problem.layerwise is not None and problem.layerwise.get("places"):
        return _examine_placed(problem, problem.layerwise)
    uniform = UniformSearch(_named(problem), 1, lambda batch: [s.bound_s for s in batch])
    space = uniform.space
    recipe: dict[str, Choice] = {slot: space.choices[slot][0] for slot in SLOTS}
    knobs = space.knobs(recipe)
    rows = space.rows.take(np.arange(1))
    ctx = rows.context(problem, knobs)
    faults: Faults = uniform.faults(recipe, ctx)
    for choice in recipe.values():
        if choice.technique is not None:
            for check in choice.technique.valid(ctx):
                faults.check(check.reason, check.ok)
    row = {name: float(values[0]) for name, values in rows.values.items()}
    assignment = None if problem.layerwise is None else read_assignment(problem.layerwise, problem)
    if assignment is not None:  # which says where every layer is
        faults.reasons = [reason for reason in faults.reasons if reason != NOT_DEALT]
    if faults.reasons:
        shown = ", ".join(f"{name}={value:g}" for name, value in row.items())
        raise InvalidPlan(
            [Fault(f"plan ({shown})", reason, "a plan that keeps this rule") for reason in faults.reasons]
        )
    if assignment is not None:
        layout = assignment.layout(uniform.order, int(row["pp"]))
        return assemble(problem, recipe, knobs, row, layout, None, assignment=assignment)
    layout = uniform.layouts(recipe["schedule"], int(row["pp"]))[0]
    layers = _layers(space.fixed, recipe, layout)
    return assemble(problem, recipe, knobs, row, layout, layers)


def _examine_placed(problem: Problem, layerwise: Mapping[str, Any]) -> Assembly:
    """The plan whose stages run on node groups that differ."""
    named = {name: value for name, value in _named(problem).fixed.items() if name not in _OF_A_STAGE}
    space = Space(
        replace(of_group(problem, group_of(layerwise["places"][0], problem)), fixed=named, forbidden=())
    )
    common = {slot: space.choices[slot][0].value for slot in SLOTS if slot not in ADDITIVE_SLOTS}
    assignment = read_assignment(completed(layerwise, problem, common), problem)
    stages = assignment.stage_places()
    first = stages[0][0]
    schedule = {"schedule": space.choices["schedule"][0]}
    reasons: list[str] = []
    for place in assignment.places:
        ctx = place.context(space.knobs({**place.recipe, **schedule}))
        rules = [c.technique.valid(ctx) for c in (*place.recipe.values(), *schedule.values()) if c.technique]
        reasons += [check.reason for checks in rules for check in checks if not np.all(check.ok)]
        if place.micro_batches != first.micro_batches:
            reasons.append(
                f"{place.micro_batches:g} and {first.micro_batches:g} micro-batches in one pipeline"
            )
    for one, other in (pair for places in stages for pair in pairwise(places)):
        if not meets(one, other):
            reasons.append("neighbouring layers of one stage whose degrees do not refine each other")
    if reasons:
        expected = "a plan that keeps this rule"
        raise InvalidPlan([Fault("plan", reason, expected) for reason in dict.fromkeys(reasons)])
    recipe = {**first.recipe, **assignment.strategies[0], **schedule}
    layout = assignment.layout(block_order(problem.model), len(stages))
    return assemble(problem, recipe, space.knobs(recipe), first.row, layout, None, assignment=assignment)


def defaults(fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs of a named plan that the user left open.

    Sequence parallelism wherever tp > 1, ZeRO stage 1 (the distributed optimizer), no recompute, no offload, no overlap of
    tensor-parallel communication, 1F1B (interleaved when ``virtual_stages`` > 1), micro-batches of one sequence.
    """
    tp, v = _whole(fixed, "tp"), _whole(fixed, "virtual_stages")
    chunks = {} if "schedule" in fixed else {"virtual_stages": v}
    chosen: dict[str, Any] = {
        slot: off(slot)
        for slot in SLOTS
        if slot.endswith("_offload") or slot in ("recompute", "tensor_overlap", "zero_group")
    }
    chosen.update(
        {
            "tp": tp, "cp": 1, "pp": 1, "ep": 1, "etp": 1, "micro_batch_size": 1, **chunks,
            "zero_stage": 1, "context": "p2p", "sequence_parallel": "true" if tp > 1 else "false",
            "schedule": "interleaved" if v > 1 else "1f1b",
        }
    )  # fmt: skip
    return chosen


def _whole(fixed: Mapping[str, Any], name: str) -> int:
    """A fixed degree; 1 where it is open, or no whole number (which the space refuses)."""
    try:
        return int(str(fixed.get(name, 1)))
    except ValueError:
        return 1


def _named(problem: Problem) -> Problem:
    """The problem with every open knob at its default."""
    chosen, own = defaults(problem.fixed), dict(problem.stack.knobs)
    if chosen["sequence_parallel"] == off("sequence_parallel"):  # no ranks to cut a sequence over
        own.pop("sequence_parallel", None)
    fixed = {**chosen, **own, **problem.fixed}
    whole = fixed["sequence_parallel"] == off("sequence_parallel") and _whole(fixed, "tp") > 1
    if not (whole and _whole(fixed, "pp") > 1) and "pipeline" not in problem.fixed:
        fixed.pop("pipeline", None)  # how stages send what all tensor ranks hold whole
    return replace(problem, fixed=fixed, forbidden=())


def _layers(fixed: Mapping[str, Any], recipe: Mapping[str, Choice], layout: Layout) -> int | None:
    if recipe["recompute"].value != "block":
        return None
    return min(int(fixed.get("recompute_layers", 1)), layout.layers)
