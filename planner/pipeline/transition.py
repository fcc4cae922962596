"""A change of degrees between neighbouring layers: a block of its own, which turns one layout of the activations into another.

Layers of one stage may cut their work to different degrees, as long as all see the same micro-batches. Between unlike
neighbours the activations change their layout, and their gradients change it back: the collectives of the boxing table
(:mod:`planner.costs.resharding`), priced as all others are. So a change is a block like a layer, of which a stage holds as many
as there are changes among its layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from planner.costs.precision import dtype_bytes
from planner.costs.resharding import WHOLE, Layout, resharding_steps
from planner.engine.block_table import BlockTable, tabulate
from planner.engine.pricer import Pricer
from planner.ledger import Axes, Collective, Group, Item, Ledger, Resident
from planner.pipeline.place import Place, activation_elements

__all__ = ["CHANGE", "communicators", "meets", "transition", "transition_s"]

CHANGE = "change"
"""The kind of block that a change of degrees is."""


def meets(one: Place, other: Place) -> bool:
    """Whether layers of two places may be neighbours in a stage: the same devices and micro-batches, cut at ranks that refine
    each other.

    A rank of the one then holds a piece that whole ranks of the other share; degrees of 2 and 3 do not.
    """
    alike = one.group == other.group and one.ranks == other.ranks and one.micro_batches == other.micro_batches
    edges = _edges(one, other)
    return alike and all(outer % inner == 0 for inner, outer in pairwise(edges))


def transition(one: Place, other: Place) -> Ledger:
    """What passes from a layer of one place to the next one's, and back for the gradients; a ledger of the block :data:`CHANGE`.

    The residual stream lies split along its batch over data-parallel ranks, along the sequence over context-parallel ones, and
    over tensor-parallel ones if it is sharded there. Where a place leaves it whole, it is sliced for nothing, and the gradient
    of a slice is gathered. The pieces of a causal sequence that context parallelism deals are not those of sequence
    parallelism, so that the two are different splits.
    """
    edges = _edges(one, other)
    before, after = _layout(one, edges), _layout(other, edges)
    ctx = other.context({})
    held = [activation_elements(place) for place in (one, other)]
    # One of the places splits the stream furthest; elements of all ranks follow from either.
    whole = held[1] * float(
        np.prod([n for n, split in zip(_degrees(edges), after, strict=True) if split != WHOLE])
    )
    axes = Axes({"micro_batch": np.array([whole]), "pieces": np.array([sum(held)])})
    dtype = ctx.format.activation
    items: list[Item] = [
        Resident(
            what="change.pieces", block=CHANGE, by="galvatron", pool="workspace", lifetime="block",
            size="pieces", bytes_per_element=dtype_bytes(dtype),
        )
    ]  # fmt: skip
    for phase, source, target in (("forward", before, after), ("backward", after, before)):
        items += _collectives(phase, edges, source, target, dtype)
    return Ledger(axes, tuple(items), {})


def transition_table(one: Place, other: Place, pricer: Pricer) -> BlockTable:
    """The one-row table of a change."""
    return tabulate(transition(one, other), pricer, (CHANGE,), 1)


def transition_s(one: Place, other: Place, pricer: Pricer) -> float:
    """Seconds of a change for one micro-batch, activations and gradients; the same either way.

    Both ways pass through the same two changes of layout, once with the activations and once with the gradients.
    """
    table = transition_table(one, other, pricer)
    return float(table["forward_s"][0, 0] + table["backward_s"][0, 0])


def communicators(places: Sequence[Place]) -> float:
    """Groups with more than one rank that a device of a stage is part of, whose layers are at some places in this order."""
    groups = {group for place in places for group in place.groups()}
    for one, other in pairwise(places):
        if one is not other:
            edges = _edges(one, other)
            layouts = _layout(one, edges), _layout(other, edges)
            for source, target in (layouts, layouts[::-1]):
                steps = resharding_steps(source, target, _degrees(edges))
                groups |= {(CHANGE, _degrees(edges)[step.axis], edges[step.axis]) for step in steps}
    return float(len(groups))


# -- details ---------------------------------------------------------------------------------------------------------


def _edges(one: Place, other: Place) -> list[int]:
    """Numbers of neighbouring ranks at which either place cuts, innermost first, from 1 to all ranks."""
    cuts = {1, one.ranks}
    for place in (one, other):
        tp, cp = round(place.row["tp"]), round(place.row["cp"])
        cuts |= {tp, tp * cp}
    return sorted(cuts)


def _degrees(edges: Sequence[int]) -> list[int]:
    return [outer // inner for inner, outer in pairwise(edges)]


def _layout(place: Place, edges: Sequence[int]) -> Layout:
    """How the residual stream lies along every axis between two edges."""
    tp, cp = round(place.row["tp"]), round(place.row["cp"])
    sharded = _shards_tensor(place)
    return tuple(
        (("sequence" if sharded else WHOLE) if outer <= tp else "context" if outer <= tp * cp else "batch")
        for outer in edges[1:]
    )


@lru_cache(maxsize=4096)
def _shards_tensor(place: Place) -> bool:
    """Whether tensor-parallel ranks hold parts of the residual stream, and not copies."""
    return activation_elements(place) * place.row["cp"] * 1.5 < _unsharded(place)


def _unsharded(place: Place) -> float:
    """Elements of a data-parallel rank's part of a micro-batch."""
    alone = {**place.row, "tp": 1.0, "cp": 1.0, "etp": 1.0, "ep": 1.0}
    return activation_elements(Place(place.problem, place.group, {}, alone))


def _collectives(
    phase: str, edges: Sequence[int], source: Layout, target: Layout, dtype: str
) -> Iterator[Collective]:
    """The collectives of one direction."""
    degrees = _degrees(edges)
    for number, step in enumerate(resharding_steps(source, target, degrees)):
        group = Group(CHANGE, np.array([float(degrees[step.axis])]), np.array([float(edges[step.axis])]))
        yield Collective(
            what=f"change.{step.collective}.{number}", block=CHANGE, phase=phase, by="galvatron", tags=frozenset({"change"}),
            source="arXiv:2211.13878", kind=step.collective, group=group, size=f"micro_batch/{round(1.0 / step.fraction)}",
            dtype=dtype,
        )  # fmt: skip
