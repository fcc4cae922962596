"""What a step takes at least on every row: its blocks' work at a micro-batch without end, shared evenly by the stages.

The micro-batch and the numbers of stages and replicas change what a sequence costs by tiles, launches, latencies and bubbles, and
never to below what it costs in a micro-batch so large that all these are lost in the sum. Many rows share that cost, so that
it takes the ledger of a few rows to bound all others, before any of them has a ledger of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from planner.costs.arrays import distinct
from planner.engine.block_table import PACED, tabulate
from planner.engine.pricer import Pricer
from planner.ledger import Array, Item, Ledger
from planner.pipeline.composer import phase_seconds
from planner.pipeline.layout import BOUNDARY
from planner.solve.prefixes import Alike
from planner.solve.space import Rows
from planner.technique import Context

__all__ = ["ENDLESS", "ROUNDING", "RowFloor"]

Index = NDArray[np.intp]

ENDLESS = 2.0**30  # sequences in the micro-batch: what is not proportional to it is lost in the sum
ROUNDING = 1e-6  # by how much the last, partial wave and the sums' rounding may still be seen

_CUTS = ("tp", "cp", "ep", "etp")


class RowFloor:
    """Floors of a space's rows.

    Args:
        rows: of the space.
        blocks: how many of each kind the model has.
    """

    def __init__(self, rows: Rows, blocks: Mapping[str, float]) -> None:
        self.rows, self.blocks = rows, blocks
        self._alike = Alike(rows, _CUTS)
        first = rows.take(self._alike.first)
        self._cuts = Rows({**first.values, "micro_batch_size": np.full(len(first), ENDLESS)})
        self._known: dict[tuple[str, ...], Array] = {}

    def seconds(
        self, name: tuple[str, ...], at: Index, sequences: int, ledger: Callable[[Rows], tuple[Ledger, Context]],
        pricer: Pricer,
    ) -> Array:  # fmt: skip
        """Seconds that a step takes at least on the rows at ``at``.

        Args:
            name: of a prefix.
            at: rows on which it is valid.
            sequences: of the step.
            ledger: the prefix's ledger on given rows.
            pricer: prices it.
        """
        each = self._known.setdefault(name, np.full(len(self._cuts), np.nan))
        classes = distinct(self._alike.of[at])
        new = classes[np.isnan(each[classes])]
        if len(new):
            each[new] = self._per_sequence_s(*ledger(self._cuts.take(new)), pricer)
        values = {degree: self.rows.values[degree][at] for degree in ("dp", "pp")}
        floor_s: Array = sequences / values["dp"] * each[self._alike.of[at]] / values["pp"] * (1.0 - ROUNDING)
        return floor_s

    def _per_sequence_s(self, ledger: Ledger, ctx: Context, pricer: Pricer) -> Array:
        """Device-seconds of a sequence's forward and backward through all blocks, over the ranks of a stage that share it."""

        def outside(item: Item) -> bool:
            return item.block == BOUNDARY or item.phase == "step"

        table = tabulate(ledger.drop(outside), pricer, tuple(self.blocks), len(ctx.micro_batch_size), PACED)
        forward, backward, _ = phase_seconds(table)
        total: Array = np.array([*self.blocks.values()]) @ (forward + backward) / ENDLESS
        return total
