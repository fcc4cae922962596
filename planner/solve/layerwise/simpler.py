"""Of layer-wise plans that are as fast as far as anyone can tell, the simplest.

The best strategies of every device on its own put layers under strategies that hardly differ, for a ten-thousandth of a step.
Whoever runs the plan pays for each of them: another kernel to test, another line of configuration. So strategies are merged one
into another, layers that stay alone first, as long as all fit and the step is not longer than a tie allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import TypeAlias, TypeVar

from planner.pipeline.assignment import Assignment, Runs

__all__ = ["Taken", "merged", "simplest", "taken_by"]

Taken: TypeAlias = tuple[tuple[Runs, ...], int, int]
"""Strategies by number: of the layers of every virtual stage, of the embedding, of the head."""

_Priced = TypeVar("_Priced")


def simplest(
    taken: Taken, best: _Priced, price: Callable[[Taken], tuple[float, _Priced] | None], within_s: float
) -> _Priced:
    """The candidate with fewest strategies, and then fewest runs of unlike layers, that merging reaches; the fastest of those.

    Args:
        taken, best: what the fastest candidate takes, and itself.
        price: step time and candidate of what is taken; None where it does not fit.
        within_s: step time up to which candidates tie.

    >>> def price(taken):  # a layer takes 1.001, 1 or 0.5 s, and no more than one layer of the last kind fits
    ...     layers = [(s, n) for runs in taken[0] for s, n in runs]
    ...     fits = sum(n for s, n in layers if s == 2) < 2
    ...     return (sum(n * (1.001, 1.0, 0.5)[s] for s, n in layers), taken) if fits else None
    >>> some = (((0, 3), (1, 1), (2, 1)),), 0, 0
    >>> simplest(some, some, price, 4.51)  # the third strategy is worth half a second, the second one nothing
    ((((1, 4), (2, 1)),), 1, 1)
    """
    while True:
        tried: list[tuple[int, int, float, Taken, _Priced]] = []
        for few, many in permutations(_numbers(taken), 2):
            merger = merged(taken, few, many)
            found = price(merger)
            if found is not None and found[0] <= within_s:
                runs = sum(len(runs) for runs in merger[0])
                tried.append((len(_numbers(merger)), runs, found[0], merger, found[1]))
        if not tried:
            return best
        *_, taken, best = min(tried, key=lambda one: one[:3])


def merged(taken: Taken, one: int, other: int) -> Taken:
    """The same with another strategy wherever one stands."""
    stages, *ends = taken
    embedding, head = (other if end == one else end for end in ends)
    return (
        tuple(_joined([(other if s == one else s, n) for s, n in runs]) for runs in stages),
        embedding,
        head,
    )


def taken_by(assignment: Assignment) -> Taken:
    """What an assignment takes, by its own numbers."""
    return assignment.stages, assignment.embedding, assignment.head


# -- details ---------------------------------------------------------------------------------------------------------


def _numbers(taken: Taken) -> list[int]:
    """Strategies in use, those of fewest layers first."""
    stages, *ends = taken
    layers = dict.fromkeys(ends, 0)
    for runs in stages:
        for s, n in runs:
            layers[s] = layers.get(s, 0) + n
    return sorted(layers, key=lambda s: (layers[s], s))


def _joined(runs: Sequence[tuple[int, int]]) -> Runs:
    """Runs whose neighbours differ."""
    found: list[tuple[int, int]] = []
    for s, n in runs:
        if found and found[-1][0] == s:
            found[-1] = s, found[-1][1] + n
        else:
            found.append((s, n))
    return tuple(found)
