"""What the search hands around: candidates that are to be priced together, and what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.engine.block_table import BlockTable
from planner.ledger import Array
from planner.pipeline.layout import Dealt, Layout
from planner.schedule.order import Generator
from planner.solve.space import Choice, order_of

if TYPE_CHECKING:
    from planner.solve.expansion import Expansion

__all__ = ["Batch", "Jobs", "Pending", "Scored", "SearchCounts", "Shortfall"]

Index = NDArray[np.intp]


class SearchCounts:
    """How the space was exhausted: ``candidates = scored + all excluded + all rejected``."""

    def __init__(self) -> None:
        self.candidates = self.scored = 0
        self.excluded_by_bound: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()


class Scored(NamedTuple):
    """One candidate that fits, with the lower bound of its step time and its column of the block table."""

    bound_s: float
    peak_bytes: float
    recipe: Mapping[str, Choice]
    row: Mapping[str, float]
    layout: Layout
    recompute_layers: int | None
    table: BlockTable

    @property
    def schedule(self) -> Generator:
        """The order generator."""
        return order_of(self.recipe["schedule"])

    def micro_batches(self, global_batch_size: int) -> int:
        """Micro-batches per step."""
        return round(global_batch_size / (self.row["dp"] * self.row["micro_batch_size"]))


class Batch(NamedTuple):
    """Candidates that were scored together; ``fitting`` are the indices of those within memory."""

    expansion: Expansion
    jobs: Jobs
    fitting: Index
    bound_s: Array
    peak_bytes: Array
    recompute_layers: Array | None

    def scored(self, at: Index) -> list[Scored]:
        """Some of them, each on its own."""
        jobs, layers = self.jobs, self.recompute_layers
        table = self.expansion.columns.of(jobs.take(at))
        return [
            Scored(
                float(self.bound_s[index]), float(self.peak_bytes[index]), self.expansion.recipe(jobs, index),
                self.expansion.row(jobs, index), jobs.layout_of(index), None if layers is None else int(layers[index]),
                table.take(np.array([number])),
            )
            for number, index in enumerate(at.tolist())
        ]  # fmt: skip


class Pending(NamedTuple):
    """(state, row) pairs of one schedule that were scored plain.

    ``bounds_s`` and ``fits``: (swaps, recomputes, pairs), the bounds of their branches (zero: not priced) and which of them were
    found to fit. ``overfull``: no branch of the pair can. ``saving_s``: what a branch may save of the plain one's time.
    """

    expansion: Expansion
    jobs: Jobs
    bounds_s: Array
    fits: NDArray[np.bool_]
    overfull: NDArray[np.bool_]
    saving_s: Array

    @property
    def floor_s(self) -> Array:
        """What no branch of a pair is faster than; nothing is known where the plain ones move activations."""
        plain_s: Array = self.bounds_s[0, 0] - self.saving_s
        return (
            np.zeros_like(plain_s)
            if self.expansion.branches.moves_activations(0, self.jobs.schedule)
            else plain_s
        )


class Shortfall(NamedTuple):
    """The candidate that came closest to fitting: which memory binds, and by how much.

    ``at_least``: what is needed is only what no recompute or offload could move.
    """

    binding: str
    needed_bytes: float
    budget_bytes: float
    at_least: bool
    recipe: Mapping[str, Choice]
    row: Mapping[str, float]
    layout: Layout

    @property
    def excess(self) -> float:
        """What it needs, relative to the budget."""
        return self.needed_bytes / self.budget_bytes


class Jobs(NamedTuple):
    """Candidates that share a schedule; arrays over jobs."""

    schedule: Choice
    layout: Layout | Dealt
    recomputes: Index
    swaps: Index
    states: Index
    rows: Index
    width: NDArray[np.int64]  # candidates behind each job: layer counts of a recompute by layers

    def layout_of(self, index: int) -> Layout:
        """The layout of one job."""
        layout = self.layout
        return layout if isinstance(layout, Layout) else layout.among.each[int(layout.of[index])]

    def take(self, index: Index) -> Jobs:
        """Some of the jobs."""
        return self._replace(
            layout=self.layout.take(index), recomputes=self.recomputes[index], swaps=self.swaps[index],
            states=self.states[index], rows=self.rows[index], width=self.width[index],
        )  # fmt: skip
