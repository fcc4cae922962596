"""A prefix of a recipe on its valid rows, priced once for all rows whose blocks cost alike.

What a block computes and sends follows from how it is cut and from the micro-batch. Rows that differ in the numbers of stages and
replicas alone share all that; what does depend on these, as the hop between stages, is found by its sizes and groups, and priced
on every row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.costs.arrays import distinct
from planner.engine.block_table import COMPACT, TIMES, BlockTable, tabulate
from planner.engine.pricer import Pricer
from planner.ledger import Array, Axes, Collective, Item, Ledger, Resident
from planner.solve.branches import Activity
from planner.solve.space import Choice, Rows
from planner.technique import Context

__all__ = ["Alike", "Prefix", "likely", "priced_alike"]

Index = NDArray[np.intp]

_OF_BLOCKS = ("tp", "cp", "ep", "etp", "micro_batch_size")


class Alike:
    """Rows by some of their degrees, those that cut a block: the class of each, and the first row of each class."""

    def __init__(self, rows: Rows, names: Sequence[str] = _OF_BLOCKS) -> None:
        degrees = [rows.values[name] for name in names]
        each = [distinct(degree) for degree in degrees]
        places = [np.searchsorted(values, degree) for values, degree in zip(each, degrees, strict=True)]
        cuts = np.ravel_multi_index(places, [len(values) for values in each])
        self.of = np.searchsorted(distinct(cuts), cuts)
        self.first = np.zeros(self.of.max(initial=-1) + 1, dtype=np.intp)
        self.first[self.of[::-1]] = np.arange(len(rows))[::-1]
        self._differ: dict[int, tuple[Array, bool]] = {}

    def apart(self, ledger: Ledger, pricer: Pricer) -> set[tuple[str, bool]]:
        """Blocks, and whether in the optimizer step, with items whose times differ between rows of a class."""
        axes = ledger.axes
        names = [name for name in axes.names() if self._differs(axes[name])]
        windows = {name for name, chunks in ledger.chunks.items() if self._differs(np.asarray(chunks))}

        def differs(item: Item) -> bool:
            if isinstance(item, Collective) and any(map(self._differs, (item.group.size, item.group.stride))):
                return True
            return item.window in windows or any(name in pricer.key(item)[0] for name in names)

        timed = (item for item in ledger.items if not isinstance(item, Resident))
        return {(item.block, item.phase == "step") for item in timed if differs(item)}

    def _differs(self, values: Array) -> bool:
        """Whether rows of a class have different values; remembered, for ledgers share most of theirs."""
        if id(values) not in self._differ:
            differ = values.size > 1 and not np.array_equal(values, values[self.first][self.of])
            self._differ[id(values)] = values, differ
        return self._differ[id(values)][1]


class Prefix(NamedTuple):
    """A prefix on rows on which it is valid.

    Attributes:
        recipe: its choices.
        rows: its rows; ``ctx``, ``ledger`` and ``activity`` are on them.
        of: the class of each row.
        known: what was priced, on the classes.
        places: of the rows, in the whole space.
    """

    recipe: Mapping[str, Choice]
    rows: Rows
    ctx: Context
    ledger: Ledger
    activity: Activity
    of: Index
    known: Axes
    places: Index

    def take(self, index: Index) -> Prefix:
        """The prefix on some of its rows."""
        ctx, classes = self.ctx.take(index), distinct(self.of[index])
        return Prefix(
            self.recipe, self.rows.take(index), ctx, self.ledger.take(index, ctx.mesh.counterpart), self.activity.take(index),
            np.searchsorted(classes, self.of[index]), self.known.take(classes), self.places[index],
        )  # fmt: skip

    def priced_ledger(self) -> Ledger:
        """The ledger with what is known of its prices."""
        self.ledger.axes.recall(self.known, self.of)
        return self.ledger


def likely(ctx: Context, table: BlockTable, counts: Array, budget: float) -> NDArray[np.bool_]:
    """Rows that would about fit a budget under 1F1B with the optimizer sharded; this orders the work and excludes nothing.

    ``counts``: of the model's blocks.
    """
    optimizer = counts @ table["optimizer_bytes"]
    in_flight = np.minimum(ctx.micro_batches, ctx.mesh.pp)
    each = (
        counts @ table["always_bytes"]
        - optimizer
        + optimizer / ctx.mesh.dp
        + in_flight * (counts @ table["saved_bytes"])
    )
    fits: NDArray[np.bool_] = each / ctx.mesh.pp <= budget
    return fits


def priced_alike(
    ledger: Ledger, ctx: Context, at: Index, alike: Alike, pricer: Pricer, kinds: tuple[str, ...]
) -> tuple[BlockTable, Index, Axes]:
    """The table of a part's ledger on some of its rows, their classes, and the axes on which the classes were priced."""
    apart = alike.apart(ledger, pricer)
    shared = [
        not isinstance(item, Resident) and (item.block, item.phase == "step") not in apart
        for item in ledger.items
    ]
    every, once = (
        replace(ledger, items=tuple(i for i, kept in zip(ledger.items, shared, strict=True) if kept is share))
        for share in (False, True)
    )
    classes = distinct(alike.of[at])
    first, of = alike.first[classes], np.searchsorted(classes, alike.of[at])
    once = once.take(first, ctx.mesh.take(first).counterpart)
    every = every.take(at, ctx.mesh.take(at).counterpart)
    table = tabulate(every, pricer, kinds, len(at), COMPACT)
    table.values[: len(TIMES)] += tabulate(once, pricer, kinds, len(first), TIMES).values.take(of, axis=2)
    return table, of, once.axes
