"""Links that a layer's exchange of tokens and the step's traffic beside it share.

An all-to-all blocks its layer; gradients that are reduced behind the backward, and weights that are gathered behind the forward,
block nothing until the pass ends. Libraries run them on streams that know nothing of each other, so that they share the network
fairly wherever their groups' outermost links are the same (J. Li et al., "Accelerating Distributed MoE Training and Inference
with Lina", USENIX ATC 2023, section 2.2: all-to-alls beside an all-reduce take 1.83 times as long in the median).

The same holds of what sharded weights send in every micro-batch: gathers behind the forward and the backward, reductions behind
the backward.

With ``A`` seconds of exchanges among the ``B`` seconds of a block's pass, and ``R`` seconds of traffic for that block::

    shared:  an exchange meets traffic for a share R/B of the time, and takes twice as long then: A·min(1, R/B) more
    ahead:   traffic has the C = B − A seconds that are free: what it lacks delays the pass's end, min(A, R − C);
             and an exchange waits for half of the piece of traffic that is under way, where one is: R/C

Both are ``A`` where the traffic fills the pass: then the link is the bottleneck, whoever goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import TypeAlias

import numpy as np

from planner.costs.precision import dtype_bytes
from planner.ledger import Array, Axes, Collective, Group, Item, Resident

__all__ = ["Priced", "beside_traffic", "exchanges", "slowdown", "waits", "waits_in_pass"]

Priced: TypeAlias = Sequence[tuple[Item, Array]]
"""Items, and their seconds alone."""

_PASSES = (("gradients", ("backward", "weight")), ("weights", ("forward",)))
_OF_STATES = frozenset({"gradients", "parameters"})


def exchanges(item: Item) -> bool:
    """Whether an item is an exchange that its layer waits for."""
    return (
        isinstance(item, Collective)
        and item.kind == "all_to_all"
        and (item.track == "main" or item.ahead_bytes > 0.0)
    )


def slowdown(exchange: Collective) -> float:
    """How many times as long as alone an exchange takes while traffic is on its link: twice, where both share it fairly."""
    return 1.0 if exchange.ahead_bytes else 2.0


def beside_traffic(parts: Mapping[tuple[str, str], list[Item]], block: str) -> list[list[Item]]:
    """Items of the passes that a block's traffic of the step runs beside, those of gradients first; none without exchanges."""
    found = [list(chain(*(parts.get((block, phase), ()) for phase in phases))) for _, phases in _PASSES]
    return found if any(map(exchanges, chain(*found))) else []


def waits(
    step: Priced, beside: Sequence[Priced], outermost: Callable[[Group], Array], axes: Axes
) -> Iterable[tuple[Collective, Array]]:
    """Seconds by which a block's exchanges, or what they keep from its traffic, delay a step, exchange by exchange.

    Args:
        step: what the block does once per step.
        beside: the passes of :func:`beside_traffic`.
        outermost: of a group, the number of the outermost tier that it spans.
        axes: of both.
    """
    for (track, _), work in zip(_PASSES, beside, strict=False):  # of a block without exchanges there are none
        traffic = [(item, s) for item, s in step if isinstance(item, Collective) and item.track == track]
        yield from _waits([(item, s) for item, s in traffic if _is_traffic(item)], work, outermost, axes)


def waits_in_pass(
    passes: Sequence[Priced], outermost: Callable[[Group], Array], axes: Axes
) -> Iterable[tuple[Collective, Array]]:
    """The same by what a pass sends in every micro-batch, in a phase of it that is priced with others before or after it.

    Args:
        passes: the phase, then those of :func:`planner.engine.phases.shares_backward`.
        outermost, axes: as above.
    """
    (first, *_), before = passes[0], list(chain(*passes[1:]))
    together = [*passes[0], *before]
    yield from _waits(_loose_traffic(together), together, outermost, axes)
    if first[0].phase == "recompute":  # what the backward waits without it is the backward's
        for item, seconds in _waits(_loose_traffic(before), before, outermost, axes):
            yield item, -seconds


def _waits(
    traffic: Sequence[tuple[Collective, Array]], work: Priced, outermost: Callable[[Group], Array], axes: Axes
) -> Iterable[tuple[Collective, Array]]:
    """Seconds by which the exchanges among some work, or what they keep from traffic beside it, delay it."""
    found = [(item, s) for item, s in work if exchanges(item)]
    if not (traffic and found):
        return
    free_s = sum(s for item, s in work if item.track == "main" and not exchanges(item) and _stays(item))
    whole_s = np.maximum(free_s + sum(s for _, s in found), 1e-30)
    for item, seconds in found:
        assert isinstance(item, Collective)
        there = [(i, s * (outermost(i.group) == outermost(item.group))) for i, s in traffic]
        busy_s = sum(s for _, s in there)
        if not item.ahead_bytes:
            yield item, (slowdown(item) - 1.0) * seconds * np.minimum(busy_s / whole_s, 1.0)
            continue
        share = seconds / np.maximum(sum(s for _, s in found), 1e-30)  # of what all exchanges delay
        left_s = share * np.clip(busy_s - free_s, 0.0, whole_s - free_s)
        piece_s = sum(
            s * np.minimum(item.ahead_bytes / np.maximum(axes[i.size] * dtype_bytes(i.dtype), 1.0), 1.0)
            for i, s in there
        )
        met = np.minimum(busy_s / np.maximum(free_s, 1e-30), 1.0) * (seconds > 0.0)
        yield item, left_s + 0.5 * piece_s * met


def _loose_traffic(work: Priced) -> list[tuple[Collective, Array]]:
    """What runs beside all of some work."""
    beside = [(i, s) for i, s in work if isinstance(i, Collective) and i.track != "main" and not i.window]
    return [(item, s) for item, s in beside if _is_traffic(item)]


def _is_traffic(item: Collective) -> bool:
    """Whether an item is traffic of data parallelism."""
    return "data_parallel" in item.tags and not _OF_STATES.isdisjoint(item.tags)


def _stays(item: Item) -> bool:
    """Whether an item is work of the pass itself, and no swap's."""
    return not isinstance(item, Resident) and "offload" not in item.tags
