"""Collectives that turn one layout of a tensor into another: the boxing table of split, broadcast and partial layouts.

A layout says for every axis of a device mesh how the tensor lies along it: split along one of its dimensions (the dimension's
name), whole on every rank (:data:`WHOLE`), or as summands of the whole (:data:`PARTIAL`). Source: J. Yuan et al. 2021 (OneFlow,
arXiv:2110.15032), Table 2, whose sizes are those of all p devices together; here they are of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from planner.costs.arrays import Real

__all__ = ["Layout", "Step", "reshard_bytes", "resharding_steps"]

WHOLE, PARTIAL = "", "+"

Layout = tuple[str, ...]


class Step(NamedTuple):
    """One collective along a mesh axis; ``fraction`` of the tensor is its size, in the terms of the collective formulas.

    That is the full tensor for all-reduce, all-gather and reduce-scatter, what one rank holds for all-to-all.
    """

    collective: str
    axis: int
    fraction: float


def reshard_bytes(source: str, target: str, n_bytes: Real, group: Real) -> Real:
    """Bytes sent per rank to turn one layout of a tensor of ``n_bytes`` along one axis of ``group`` ranks into another.

    ``split → whole (G−1)/G·n``, ``partial → split (G−1)/G·n``, ``partial → whole 2(G−1)/G·n``, ``split → another split
    (G−1)/G²·n``; a whole tensor is everything else already.

    >>> changes = [("rows", ""), ("+", "rows"), ("+", ""), ("rows", "columns"), ("", "rows")]
    >>> [float(reshard_bytes(*change, 16.0, 4)) for change in changes]
    [12.0, 12.0, 24.0, 3.0, 0.0]
    """
    kind = _collective(source, target)
    if kind is None:
        return 0.0 * n_bytes * group
    passes: Real = (
        2.0 if kind == "all_reduce" else 1.0 / np.asarray(group, dtype=float) if kind == "all_to_all" else 1.0
    )
    return passes * n_bytes * (group - 1) / group


def resharding_steps(source: Layout, target: Layout, degrees: Sequence[int]) -> tuple[Step, ...]:
    """The collectives that turn one layout on a mesh into another, axis by axis.

    What shrinks the tensor goes first (slices, reduce-scatters, all-to-alls), what grows it last. A dimension is put on an axis
    only after another axis that gives it up has done so, so that ranks end up with neighbouring pieces. Along a dimension that
    is split over two axes, pieces may lie in either order.

    Args:
        source: layout that there is.
        target: layout that is wanted.
        degrees: ranks along every axis.

    >>> resharding_steps(("batch", ""), ("", "heads"), (4, 8))  # the slice first: an eighth is gathered
    (Step(collective='all_gather', axis=0, fraction=0.125),)
    >>> resharding_steps(("batch", ""), ("", "batch"), (4, 8))  # the gather first: a slice of the batch is no neighbour
    (Step(collective='all_gather', axis=0, fraction=1.0),)
    """
    now = list(source)
    open_axes = [axis for axis in range(len(degrees)) if now[axis] != target[axis]]
    steps: list[Step] = []
    while open_axes:
        ready = [axis for axis in open_axes if not _waits(axis, now, target, open_axes)]
        if ready:
            axis = min(ready, key=lambda a: (_ORDER[_collective(now[a], target[a])], a))
            wanted = target[axis]
            open_axes.remove(axis)
        else:  # two axes exchange their dimensions: one of them is gathered
            axis, wanted = open_axes[0], WHOLE
        kind = _collective(now[axis], wanted)
        if kind is not None and degrees[axis] > 1:
            others = [n for a, n in enumerate(degrees) if a != axis and now[a] not in (WHOLE, PARTIAL)]
            fraction = 1.0 / float(np.prod(others, dtype=np.float64))
            steps.append(Step(kind, axis, fraction / degrees[axis] if kind == "all_to_all" else fraction))
        now[axis] = wanted
    return tuple(steps)


def _waits(axis: int, now: Sequence[str], target: Layout, open_axes: Sequence[int]) -> bool:
    """Whether the dimension that an axis is to take still lies on another one that will give it up."""
    wanted = target[axis]
    return wanted not in (WHOLE, PARTIAL) and any(now[a] == wanted for a in open_axes if a != axis)


def _collective(source: str, target: str) -> str | None:
    """What a change along one axis needs; None where every rank has its part of the target already."""
    if target in (source, PARTIAL) or source == WHOLE:
        return None
    if source == PARTIAL:
        return "all_reduce" if target == WHOLE else "reduce_scatter"
    return "all_gather" if target == WHOLE else "all_to_all"


_ORDER = {None: 0, "reduce_scatter": 1, "all_to_all": 2, "all_reduce": 3, "all_gather": 4}
