"""Meshes of a layer-wise space with their strategies, whose tables are made when they are asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from planner.ledger import Array
from planner.pipeline.layout import Layout
from planner.solve.layerwise.cuts import name_of
from planner.solve.layerwise.strategies import Branch, Mesh, Strategies
from planner.solve.space import Choice

__all__ = ["Deal", "Meshes"]


@dataclass(frozen=True, slots=True, eq=False)
class Deal:
    """One mesh under one schedule; ``layout`` None leaves the cuts open. No plan of it is faster than ``bound_s``."""

    bound_s: float
    part: int
    row: int
    schedule: Choice
    layout: Layout | None

    def rank(self) -> tuple[float, int, int]:
        """What deals are sorted by."""
        return self.bound_s, self.part, self.row

    @property
    def order(self) -> str:
        """Name of the schedule's order."""
        return name_of(self.schedule)


class Meshes:
    """Meshes of the rows of prefixes, by the numbers that deals name them by."""

    def __init__(self) -> None:
        # Rows of a prefix that are priced, blocks under all strategies on them, and these.
        self._priced: dict[int, tuple[Array, Array, Strategies]] = {}
        self._dealt: defaultdict[int, set[int]] = defaultdict(set)  # rows of prefixes that have deals
        self._meshes: dict[tuple[int, int], Mesh] = {}
        self._lower: dict[tuple[int, int], tuple[Mesh, frozenset[int]]] = {}
        self._asked: set[Branch] = set()

    def mesh(self, deal: Deal) -> Mesh:
        """The deal's mesh with all of its strategies."""
        return self._made(deal.part, [deal.row])[0]

    def lower(self, deal: Deal) -> Mesh:
        """The deal's mesh before it has tables: no strategy is faster than this says; those that were asked for are as fast."""
        key = deal.part, deal.row
        if key not in self._lower:
            # Most of what this costs does not depend on how many rows there are.
            several = sorted({deal.row} | self._dealt[deal.part])
            several = [row for row in several if (deal.part, row) not in self._lower]
            among, _, taken = self._priced[deal.part]
            found = taken.lower(np.searchsorted(among, several).tolist())
            self._lower |= {
                (deal.part, row): (mesh, frozenset()) for row, mesh in zip(several, found, strict=True)
            }
        return self._lower[key][0]

    def price(self, deal: Deal, numbers: Iterable[int] = ()) -> bool:
        """Makes tables of some strategies of :meth:`lower`, and of what was asked for elsewhere; whether one of them is new."""
        lower, known = self.lower(deal), self._lower[deal.part, deal.row][1]
        asked = set(numbers)
        self._asked |= {lower.branches[s] for s in asked}
        new = (asked | {s for s, branch in enumerate(lower.branches) if branch in self._asked}) - known
        if new:
            among, _, taken = self._priced[deal.part]
            priced = taken.priced(lower, int(np.searchsorted(among, deal.row)), sorted(new))
            self._lower[deal.part, deal.row] = priced, known | new
        return not asked <= known

    def _made(self, part: int, rows: Sequence[int]) -> list[Mesh]:
        """Meshes of some rows of a prefix; most of what their tables cost does not depend on how many they are."""
        new = [row for row in dict.fromkeys(rows) if (part, row) not in self._meshes]
        if new:
            among, _, taken = self._priced[part]
            found = taken.meshes(np.searchsorted(among, new).tolist())
            self._meshes |= zip(((part, row) for row in new), found, strict=True)
        return [self._meshes[part, row] for row in rows]
