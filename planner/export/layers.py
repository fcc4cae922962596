"""Choices of single layers: as launchers' configurations list them, and as a plan's ``layerwise`` field does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from planner.plans.plan import Plan
from planner.technique import ADDITIVE_SLOTS, off

__all__ = ["layerwise_of", "of_ends", "of_layers", "ways_of_ends", "ways_of_layers"]


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


def ways_of_layers(plan: Plan) -> list[Mapping[str, Any]]:
    """Degrees, micro-batch size and choices of every layer's place, in the model's order."""
    if not plan.places:
        return [{**plan.mesh, **plan.knobs}] * sum(plan.stages)
    assert plan.layerwise is not None
    ways = _ways(plan)
    return [ways[s] for runs in plan.layerwise["stages"] for s, n in runs for _ in range(n)]


def ways_of_ends(plan: Plan) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """As :func:`ways_of_layers`, of the embedding and of the head."""
    if not plan.places:
        way = {**plan.mesh, **plan.knobs}
        return way, way
    assert plan.layerwise is not None
    ways = _ways(plan)
    return ways[plan.layerwise["embedding"]], ways[plan.layerwise["head"]]


def _ways(plan: Plan) -> list[Mapping[str, Any]]:
    """By strategy."""
    assert plan.layerwise is not None
    ways = [
        {**place["mesh"], **place["choices"], "micro_batch_size": place["micro_batch_size"]}
        for place in plan.places
    ]
    return [ways[number] for number in plan.layerwise["at"]]


def layerwise_of(
    fixed: Mapping[str, Any],
    layers: Sequence[Mapping[str, str]],
    stages: Sequence[int],
    ends: Mapping[str, str],
    places: Sequence[int] = (),
) -> dict[str, Any]:
    """The ``layerwise`` field of a plan.

    Args:
        fixed: knobs; those of additive slots are what layers do not say themselves.
        layers: of every layer, what it chooses itself, by slot.
        stages: layers of every virtual stage.
        ends: what embedding and head choose.
        places: where layers are cut in different ways, the number of each one's place, and at last that of embedding and head.

    >>> found = layerwise_of({"zero_stage": "1"}, [{"recompute": "full"}, {"recompute": "none"}], [1, 1], {"recompute": "none"})
    >>> found["stages"], found["embedding"], [strategy["recompute"] for strategy in found["strategies"]]
    ([[[0, 1]], [[1, 1]]], 1, ['full', 'none'])
    """
    common = {slot: str(fixed.get(slot, off(slot))) for slot in ADDITIVE_SLOTS if slot != "schedule"}
    at = list(places) or [0] * (len(layers) + 1)
    each = [(place, tuple({**common, **own}.items())) for place, own in zip(at, [*layers, ends], strict=True)]
    strategies = list(dict.fromkeys(each))
    number = {strategy: index for index, strategy in enumerate(strategies)}
    runs, start = [], 0
    for size in stages:
        mine = [number[strategy] for strategy in each[start : start + size]]
        runs.append([[s, len(list(alike))] for s, alike in groupby(mine)])
        start += size
    found = {
        "strategies": [dict(choices) for _, choices in strategies], "stages": runs,
        "embedding": number[each[-1]], "head": number[each[-1]],
    }  # fmt: skip
    return found | ({"at": [place for place, _ in strategies]} if places else {})
