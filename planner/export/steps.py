"""The way from one set of choices to a better one, told choice by choice: the most helpful one first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["Price", "Taken", "way"]

Price: TypeAlias = tuple[float, bool]
"""What choices cost, and whether they fit."""


@dataclass(frozen=True, slots=True)
class Taken:
    """One step: knobs (name → (was, is)), the cost before and after it, and whether what it leads to fits."""

    knobs: Mapping[str, tuple[Any, Any]]
    before: float
    after: float
    fits: bool


def way(
    current: Mapping[str, Any],
    goal: Mapping[str, Any],
    groups: Sequence[tuple[str, ...]],
    price: Callable[[Mapping[str, Any]], Price | None],
    start: Price,
    end: Price,
) -> list[Taken]:
    """Steps whose costs lead from ``start`` to ``end`` without a gap.

    Args:
        current, goal: knob → value, before and after.
        groups: knobs that change together; each group differs.
        price: what choices cost; None where they are not possible.
        start, end: the price of ``current`` and of ``goal``.

    >>> costs = {(1, 1): 9.0, (2, 1): 4.0, (1, 2): 6.0, (2, 2): 1.0}
    >>> steps = way({"a": 1, "b": 1}, {"a": 2, "b": 2}, [("a",), ("b",)],
    ...             lambda c: (costs[c["a"], c["b"]], True), (9.0, True), (1.0, True))
    >>> [(sorted(step.knobs), step.after) for step in steps]
    [(['a'], 4.0), (['b'], 1.0)]
    """
    here, cost, left = dict(current), start[0], list(groups)
    steps: list[Taken] = []
    while left:
        priced = [(found, group) for group in left if (found := price(_after(here, goal, group))) is not None]
        # A choice that does not fit by itself may fit after another one.
        fitting = [pair for pair in priced if pair[0][1] or not start[1]] or priced
        if not fitting or len(left) == 1:
            names = [name for group in left for name in group]
            steps.append(Taken(_changes(here, goal, names), cost, *end))
            break
        found, group = min(fitting, key=lambda pair: pair[0][0])
        steps.append(Taken(_changes(here, goal, group), cost, *found))
        here, cost = _after(here, goal, group), found[0]
        left.remove(group)
    return steps


def _after(here: Mapping[str, Any], goal: Mapping[str, Any], group: Sequence[str]) -> dict[str, Any]:
    return {**here, **{name: goal.get(name) for name in group}}


def _changes(
    here: Mapping[str, Any], goal: Mapping[str, Any], names: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    found = {name: (here.get(name, "-"), goal.get(name, "-")) for name in names}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]} or found
