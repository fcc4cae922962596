"""Rows of one pipeline degree, of all prefixes side by side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.engine.block_table import BlockTable
from planner.ledger import Array

__all__ = ["DegreeRows", "some_of"]


@dataclass(frozen=True, slots=True, eq=False)
class DegreeRows:
    """Rows of one pipeline degree, of all prefixes.

    Attributes:
        part, row: whose row it is, and which.
        communicators: groups with more than one rank.
        table: of the prefixes.
    """

    pp: int
    part: Array
    row: Array
    micro_batches: Array
    communicators: Array
    table: BlockTable

    def take(self, index: Array) -> tuple[DegreeRows, Array]:
        """Some of the rows, and their places among all."""
        part, row, micro_batches, communicators = (
            x[index] for x in (self.part, self.row, self.micro_batches, self.communicators)
        )
        return DegreeRows(self.pp, part, row, micro_batches, communicators, self.table.take(index)), index


def some_of(rows: DegreeRows, each: Array, keep: NDArray[np.bool_] | np.bool_) -> tuple[DegreeRows, Array]:
    """Some of the rows, and the same columns of a table."""
    taken, index = rows.take(np.flatnonzero(keep))
    return taken, each[:, index]
