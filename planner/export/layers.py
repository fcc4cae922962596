"""Choices of single layers: as launchers' configurations list them, and as a plan's ``layerwise`` field does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from planner.plan import Plan
from planner.technique import ADDITIVE_SLOTS, off

__all__ = ["layerwise_of", "meshes_of_ends", "meshes_of_layers", "of_ends", "of_layers"]


def of_layers(plan: Plan, slot: str) -> list[str]:
    """A slot's value of every layer, in the model's order."""
    if plan.layerwise is None:
        return [str(plan.knobs[slot]).lower()] * sum(plan.stages)
    values = [str(strategy[slot]) for strategy in plan.layerwise["strategies"]]
    return [values[s] for runs in plan.layerwise["stages"] for s, n in runs for _ in range(n)]


def of_ends(plan: Plan, slot: str) -> tuple[str, str]:
    """A slot's value of the embedding and of the head."""
    if plan.layerwise is None:
        value = str(plan.knobs[slot]).lower()
        return value, value
    values = [str(strategy[slot]) for strategy in plan.layerwise["strategies"]]
    return values[plan.layerwise["embedding"]], values[plan.layerwise["head"]]


def meshes_of_layers(plan: Plan) -> list[Mapping[str, int]]:
    """Degrees of every layer, in the model's order."""
    if plan.layerwise is None or not plan.places:
        return [plan.mesh] * sum(plan.stages)
    runs = (run for stage in plan.layerwise["stages"] for run in stage)
    return [_mesh(plan, s) for s, n in runs for _ in range(n)]


def meshes_of_ends(plan: Plan) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Degrees of the embedding and of the head."""
    if plan.layerwise is None or not plan.places:
        return plan.mesh, plan.mesh
    return _mesh(plan, plan.layerwise["embedding"]), _mesh(plan, plan.layerwise["head"])


def _mesh(plan: Plan, strategy: int) -> Mapping[str, int]:
    assert plan.layerwise is not None
    mesh: Mapping[str, int] = plan.places[plan.layerwise["at"][strategy]]["mesh"]
    return mesh


def layerwise_of(
    fixed: Mapping[str, Any],
    layers: Sequence[Mapping[str, str]],
    stages: Sequence[int],
    ends: Mapping[str, str],
) -> dict[str, Any]:
    """The ``layerwise`` field of a plan.

    Args:
        fixed: knobs; those of additive slots are what layers do not say themselves.
        layers: of every layer, what it chooses itself, by slot.
        stages: layers of every virtual stage.
        ends: what embedding and head choose.

    >>> found = layerwise_of({"zero_stage": "1"}, [{"recompute": "full"}, {"recompute": "none"}], [1, 1], {"recompute": "none"})
    >>> found["stages"], found["embedding"], [strategy["recompute"] for strategy in found["strategies"]]
    ([[[0, 1]], [[1, 1]]], 1, ['full', 'none'])
    """
    common = {slot: str(fixed.get(slot, off(slot))) for slot in ADDITIVE_SLOTS if slot != "schedule"}
    each = [tuple({**common, **own}.items()) for own in layers]
    end = tuple({**common, **ends}.items())
    strategies = list(dict.fromkeys([*each, end]))
    number = {strategy: index for index, strategy in enumerate(strategies)}
    runs, start = [], 0
    for size in stages:
        mine = [number[strategy] for strategy in each[start : start + size]]
        runs.append([[s, len(list(alike))] for s, alike in groupby(mine)])
        start += size
    return {
        "strategies": [dict(strategy) for strategy in strategies], "stages": runs,
        "embedding": number[end], "head": number[end],
    }  # fmt: skip
