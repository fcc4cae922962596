"""Layouts of a pipeline: how many blocks of each kind every virtual stage holds.

Because a stage is a sum of blocks, everything about it is a small matrix times a block table; rows that share a layout are
composed with one product, and rows that have each their own (:class:`Dealt`) with one sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.ledger import Array
from planner.operators.baseline import EMBEDDING, HEAD
from planner.schedule.order import LOOPED, Placement

__all__ = [
    "BOUNDARY",
    "LAYOUT_NAMES",
    "Dealt",
    "Layout",
    "Layouts",
    "Split",
    "deal_layers",
    "layout_name",
    "layout_of",
    "layouts",
    "named_stages",
    "over_blocks",
    "per_row",
    "stages_named",
]

BOUNDARY = "boundary"  # the pseudo-block that stands for one hop between neighbouring stages


class Split(NamedTuple):
    """How layers are dealt to virtual stages: how many fewer the first and the last get, to make room for embedding and head."""

    name: str
    first_fewer: int
    last_fewer: int


SPLITS = (
    Split("even", 0, 0),
    Split("short_ends", 1, 1),
    Split("short_first", 1, 0),
    Split("short_last", 0, 1),
)
LAYOUT_NAMES = (*(split.name for split in SPLITS), "balanced")
_LONGEST_PART = 8  # characters of equal stages as they are told together, such as 127*1


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Blocks per virtual stage, and what pricing reads off it.

    ``counts``: (virtual stages, kinds), stage ``chunk·pp + device`` (see :class:`~planner.schedule.order.Placement`); ``chunks``
    the same as (chunks, devices, kinds), and ``device_counts`` their sum. Of ``copies`` pipelines side by side, each runs its
    share of the micro-batches. Equal neighbouring devices form a run (or every device is one), which is held to memory at its
    first device (most in flight: ``run_first``, ``first_counts``) and priced at its last (it waits longest: ``run_last``,
    ``last_counts``); ``ramp`` are the ``ramp_hops`` stages that a micro-batch passes before it. ``layers``: most transformer
    layers on one device.
    """

    pp: int
    virtual_stages: int
    split: str
    counts: Array
    chunks: Array
    device_counts: Array
    run_first: NDArray[np.int64]
    run_last: NDArray[np.int64]
    first_counts: Array
    last_counts: Array
    ramp: Array
    ramp_hops: NDArray[np.int64]
    layers: int
    copies: int = 1

    @property
    def stages(self) -> tuple[int, ...]:
        """Layers of every virtual stage."""
        return tuple(round(float(n)) for n in self.counts[:, :-3].sum(axis=1))

    def take(self, index: NDArray[np.intp]) -> Layout:
        """The layout of some of the rows: itself."""
        return self


class Layouts:
    """Layouts side by side, from which rows pick theirs."""

    def __init__(self, each: Sequence[Layout]) -> None:
        self.each = tuple(each)
        self.runs = max(len(layout.run_first) for layout in each)
        self._arrays: dict[str, Array] = {}

    def deal(self, of: NDArray[np.intp]) -> Layout | Dealt:
        """Rows with the layouts at ``of``."""
        return self.each[int(of[0])] if len(of) and np.all(of == of[0]) else Dealt(self, of)

    def stacked(self, name: str) -> Array:
        """An attribute of all layouts, along the last axis; the last run several times where others have more runs."""
        if name not in self._arrays:
            values = [getattr(layout, name) for layout in self.each]
            if name == "device_counts":
                values = [counts[:1] for counts in values]
            elif np.ndim(values[0]):
                values = [v[np.minimum(np.arange(self.runs), len(v) - 1)] for v in values]
            self._arrays[name] = np.ascontiguousarray(np.stack(values, axis=-1), dtype=np.float64)
        return self._arrays[name]


class Dealt(NamedTuple):
    """Rows that have each a layout of their own (its place in ``among`` is ``of``), in the terms of :class:`Layout`.

    What a layout has per run and kind is (runs, kinds, rows) here; ``device_counts`` are of the first device alone.
    """

    among: Layouts
    of: NDArray[np.intp]

    def take(self, index: NDArray[np.intp]) -> Layout | Dealt:
        """Some of the rows."""
        return self.among.deal(self.of[index])

    def __getattr__(self, name: str) -> Array:
        if name not in Layout.__slots__:
            raise AttributeError(name)
        return self.among.stacked(name).take(self.of, axis=-1)


def over_blocks(counts: Array, values: Array) -> Array:
    """Sums over kinds: counts (runs, kinds), or (runs, kinds, rows), times values (kinds, rows); (runs, rows)."""
    total: Array = counts @ values if counts.ndim == 2 else np.einsum("rka,ka->ra", counts, values)
    return total


def per_row(values: NDArray[Any]) -> Array:
    """What a layout (runs) or every row (runs, rows) has per run, to go with (runs, rows)."""
    return values[:, None] if values.ndim == 1 else values


@lru_cache(maxsize=4096)
def layouts(
    order: tuple[str, ...], kinds: tuple[str, ...], pp: int, virtual_stages: int, placement: Placement = LOOPED,
    alike_in_order: bool = True, room: int = 0, wanted: str = "",
) -> tuple[Layout, ...]:  # fmt: skip
    """Every named layout of a pipeline (:func:`named_stages`) of ``pp·virtual_stages`` stages, dealt over its copies.

    Unless equal devices are ``alike_in_order``, each is a run of its own. Of ``wanted``, a layout's name or its stages as
    :func:`layout_name` writes them, that one alone; none where these are other stages, or of other layers.
    """
    stages = pp * virtual_stages // placement.copies
    dealt = dict(named_stages(len(order), stages, room))
    if wanted:
        sizes = stages_named(wanted) or dealt.get(wanted, ())
        fits = len(sizes) == stages and sum(sizes) == len(order)
        dealt = {layout_name(sizes, room): sizes} if fits else {}
    return tuple(
        deal_layers(order, kinds, pp, virtual_stages, sizes, placement, alike_in_order, name)
        for name, sizes in dealt.items()
    )


@lru_cache(maxsize=4096)
def named_stages(layers: int, stages: int, room: int = 0) -> Mapping[str, tuple[int, ...]]:
    """Layers of every stage under each layout that has a name.

    Even, with one layer fewer on the first and/or last stage (which also hold embedding and head); where nothing divides, a
    balanced split whose ends get the smaller share, and whose last stage has ``room`` layers fewer, for what else it does (as far
    as it has any).

    >>> dict(named_stages(30, 4)), dict(named_stages(29, 4))
    ({'short_ends': (7, 8, 8, 7)}, {'balanced': (7, 8, 7, 7)})
    """
    found: dict[str, tuple[int, ...]] = {}
    for split in SPLITS:
        each, left = divmod(layers + split.first_fewer + split.last_fewer, stages)
        if left or (stages == 1 and split.name != "even") or each < 1:
            continue
        sizes = [each] * stages
        sizes[0] -= split.first_fewer
        sizes[-1] -= split.last_fewer
        found[split.name] = tuple(sizes)
    if not found and layers >= stages:
        room = min(room, layers // stages)
        small, longer = divmod(layers + room, stages)
        start = (stages - longer) // 2
        sizes = [small + (start <= stage < start + longer) for stage in range(stages)]
        sizes[-1] -= room
        found["balanced"] = tuple(sizes)
    return found


def layout_name(stages: Sequence[int], room: int = 0) -> str:
    """The name of the layout with these stages; where there is none, their layers, equal neighbours told together.

    >>> layout_name([7, 8, 8, 7]), layout_name([20, 21, 21, 18])
    ('short_ends', '20+2*21+18')
    """
    named = named_stages(sum(stages), len(stages), room)
    texts = (
        f"{n}*{size}" if n > 1 else str(size) for size, n in ((s, len([*g])) for s, g in groupby(stages))
    )
    return next((name for name, sizes in named.items() if sizes == tuple(stages)), "+".join(texts))


def stages_named(text: str) -> tuple[int, ...]:
    """Layers of every stage as :func:`layout_name` writes them out; none where the text is something else.

    >>> stages_named("20+2*21+18"), stages_named("even")
    ((20, 21, 21, 18), ())
    """
    found: list[int] = []
    for part in text.split("+"):
        many, times, size = part.rpartition("*")
        if not size.isdecimal() or (times and not many.isdecimal()) or len(part) > _LONGEST_PART:
            return ()
        found += [int(size)] * int(many or 1)
    return tuple(found)


def deal_layers(
    order: Sequence[str], kinds: tuple[str, ...], pp: int, virtual_stages: int, sizes: Sequence[int],
    placement: Placement = LOOPED, alike_in_order: bool = True, name: str = "",
) -> Layout:  # fmt: skip
    """The layout of some numbers of layers per stage of a pipeline, which add up to all layers; ``name`` unless they say it."""
    ends = np.cumsum(sizes)
    pipeline = np.diff(_cumulative(tuple(order), kinds)[np.concatenate([[0], ends])], axis=0)
    everywhere, part = placement.shared_ends, 1.0 / len(pipeline)
    pipeline[:, kinds.index(EMBEDDING)] = part if everywhere else np.arange(len(pipeline)) == 0
    pipeline[:, kinds.index(HEAD)] = part if everywhere else np.arange(len(pipeline)) == len(pipeline) - 1
    return layout_of(pipeline, pp, virtual_stages, name or layout_name(sizes), placement, alike_in_order)


def layout_of(
    pipeline: Array, pp: int, virtual_stages: int, split: str, placement: Placement = LOOPED, alike_in_order: bool = True
) -> Layout:  # fmt: skip
    """The layout of given blocks per stage of a pipeline, (stages, kinds), of whose kinds the last three are no layers."""
    counts = np.tile(pipeline, (placement.copies, 1))
    chunks = placement.by_chunk(counts, pp)
    differ = (
        np.any(chunks[:, 1:] != chunks[:, :-1], axis=(0, 2))
        if alike_in_order
        else np.ones(pp - 1, dtype=bool)
    )
    changes = np.flatnonzero(differ)
    first, last = np.concatenate([[0], changes + 1]), np.concatenate([changes, [pp - 1]])
    device_counts = chunks.sum(axis=0)
    depth = placement.depth(pp)[last]
    before = (np.cumsum(pipeline, axis=0) - pipeline)[depth]
    layers = int(device_counts[first][:, :-3].sum(axis=1).max())
    return Layout(
        pp, virtual_stages, split, counts, chunks, device_counts, first, last, device_counts[first], device_counts[last],
        before, depth, layers, placement.copies,
    )  # fmt: skip


@lru_cache(maxsize=16)
def _cumulative(order: tuple[str, ...], kinds: tuple[str, ...]) -> Array:
    """Layers of each kind before each position: (layers + 1, kinds)."""
    one_hot = np.array([[kind == name for kind in kinds] for name in order], dtype=np.float64)
    return np.concatenate([np.zeros((1, len(kinds))), np.cumsum(one_hot, axis=0)])
