"""Shardings of operators on a device mesh, and what each takes, holds and sends, by the engine's prices.

A strategy says along every mesh axis which dimension an operator splits, or none (all ranks of the axis do the same).
From it follow the layouts of all tensors: a tensor that has the dimension is split along it, one that has not is whole
going in, and going out partial (the dimension was summed over). Gradients mirror that: where a whole input met split
work, its gradient is partial.

- An operator takes the seconds of its forward, backward and weight-gradient kernels on sharded axes, and the
  reduce-scatter of its weight's gradient with the all-gather of the updated weight, per micro-batch (an all-reduce whose
  halves the update parts, as in ZeRO stage 1).
- It holds its weights, gradients and what it keeps for the backward, and its share of the optimizer's states, which are
  cut over the ranks that sum one gradient.
- An edge takes the collectives that turn one layout into the other, forward, and those of the gradient, backward.

The optimizer's update is left out: every strategy cuts it over all ranks that could share it. Nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.costs.resharding import PARTIAL, WHOLE, Layout, resharding_steps
from planner.engine.pricer import Pricer
from planner.ledger import Axes, Collective, Group, Item, Matmul, role
from planner.solve.graph.operators import Operator, OperatorGraph, Read, names_in

__all__ = ["Layouts", "Strategy"]

Floats: TypeAlias = NDArray[np.float64]
Strategy: TypeAlias = tuple[str, ...]
"""Per mesh axis the dimension that is split; :data:`~planner.costs.resharding.WHOLE` for none."""

_BYTE = "int8"  # a dtype of one byte: collectives are priced by their bytes
_ROW_BYTES = 4.0  # sums over rows are fp32


@dataclass(frozen=True, slots=True, eq=False)
class _Wire:
    """Collectives over subsets of the mesh's axes, priced by the engine."""

    pricer: Pricer
    degrees: tuple[int, ...]
    groups: dict[tuple[int, ...], Group]

    @staticmethod
    def of(pricer: Pricer, degrees: tuple[int, ...]) -> _Wire:
        """The wire of a mesh whose last axis is innermost."""
        groups = {}
        strides = [int(np.prod(degrees[axis + 1 :])) for axis in range(len(degrees))]
        for count in range(1, len(degrees) + 1):
            for axes in combinations(range(len(degrees)), count):
                size = float(np.prod([degrees[axis] for axis in axes]))
                groups[axes] = Group(
                    "+".join(map(str, axes)), np.array([size]), np.array([float(strides[axes[-1]])])
                )
        return _Wire(pricer, degrees, groups)

    def seconds(self, kind: str, axes: tuple[int, ...], n_bytes: Floats) -> Floats:
        """Seconds of collectives of these sizes."""
        item = Collective(
            what="resharding",
            block="",
            kind=kind,
            group=self.groups[axes],
            size="bytes",
            dtype=_BYTE,
            by="solver",
        )
        (found,) = self.pricer.prices([item], Axes({"bytes": np.atleast_1d(n_bytes)}))
        return np.broadcast_to(found, np.shape(n_bytes))


class Layouts:
    """Prices strategies of a graph's operators on a mesh.

    Args:
        graph: the operators.
        pricer: the engine.
        degrees: ranks along every mesh axis, innermost last.
        micro_batches: per optimizer step, over which the sum of weight gradients is spread.
    """

    def __init__(
        self, graph: OperatorGraph, pricer: Pricer, degrees: Sequence[int], micro_batches: int = 1
    ) -> None:
        self.graph, self.degrees, self.micro_batches = graph, tuple(degrees), micro_batches
        self._pricer = pricer
        self._wire = _Wire.of(pricer, self.degrees)
        self._known: dict[object, tuple[list[Strategy], Floats, Floats]] = {}
        self._edges: dict[object, Floats] = {}

    def strategies(self, operator: Operator) -> list[Strategy]:
        """All strategies of an operator: every dimension that divides, along every axis; the unsplit one is the first."""
        graph = self.graph
        forward = operator.kernels[0]
        sizes = [operator.output, operator.weight] + [s for item in operator.kernels for s in _sizes(item)]
        free = [WHOLE, *sorted(graph.dimensions_of(*sizes) - operator.whole)]
        names = {name for size in sizes for name in names_in(size) if role(name) in graph.dimensions}
        assert forward.phase == "forward"
        return [s for s in product(free, repeat=len(self.degrees)) if self._divides(s, names)]

    def nodes(self, operator: Operator) -> tuple[list[Strategy], Floats, Floats]:
        """Strategies of an operator, seconds and bytes of each."""
        key = (*map(id, operator.kernels), operator.weight)
        if key not in self._known:
            strategies = self.strategies(operator)
            axes = self._sharded(strategies)
            seconds = np.zeros(len(strategies))
            for price in self._pricer.prices(list(operator.kernels), axes):
                seconds = seconds + price
            held = np.zeros(len(strategies))
            for item in operator.held:
                held = held + axes[item.size] * item.bytes_per_element
            if operator.weight:
                sync_s, states = self._weights(operator, strategies, axes)
                seconds, held = seconds + sync_s, held + states
            seconds = seconds + self._sums(operator, strategies, axes)
            self._known[key] = strategies, seconds, held
        return self._known[key]

    def edge(self, source: Operator, target: Operator, read: Read) -> Floats:
        """Seconds that a tensor takes from one operator to another and its gradient back, per pair of strategies."""
        key = (
            source.output,
            tuple(map(id, source.kernels)),
            tuple(map(id, target.kernels)),
            read.size,
            read.bytes_per_element,
        )
        if key not in self._edges:
            graph = self.graph
            made, used = self.nodes(source)[0], self.nodes(target)[0]
            dims = graph.dimensions_of(read.size, source.output)
            n_bytes = float(np.ravel(graph.axes[read.size])[0]) * read.bytes_per_element
            out, into = [_made(s, dims) for s in made], [_used(s, dims) for s in used]
            # Gradients mirror that: of what was used come parts of what was made.
            given, wanted = [_made(s, dims) for s in used], [_used(s, dims) for s in made]
            self._edges[key] = (
                self._resharding(out, into, n_bytes) + self._resharding(given, wanted, n_bytes).T
            )
        return self._edges[key]

    def sent_bytes(
        self, source: Operator, target: Operator, read: Read, made: Strategy, used: Strategy
    ) -> float:
        """Bytes that a rank sends to hand a tensor from one operator to another, and its gradient back."""
        dims = self.graph.dimensions_of(read.size, source.output)
        n_bytes = float(np.ravel(self.graph.axes[read.size])[0]) * read.bytes_per_element
        total = 0.0
        for there, wanted in ((_made(made, dims), _used(used, dims)), (_made(used, dims), _used(made, dims))):
            for step in resharding_steps(there, wanted, self.degrees):
                ranks = self.degrees[step.axis]
                passes = 2.0 if step.collective == "all_reduce" else 1.0
                total += passes * step.fraction * n_bytes * (ranks - 1) / ranks
        return total

    # -- details -----------------------------------------------------------------------------------------------------

    def _divides(self, strategy: Strategy, names: set[str]) -> bool:
        """Whether every axis of a split dimension is a multiple of the ranks that share it."""
        for dimension in set(strategy) - {WHOLE} - self.graph.padded:
            ranks = np.prod([n for n, d in zip(self.degrees, strategy, strict=True) if d == dimension])
            for name in names:
                if self.graph.dimensions[role(name)] == dimension and np.any(self.graph.axes[name] % ranks):
                    return False
        return True

    def _ranks(self, strategies: Sequence[Strategy], dimension: str) -> Floats:
        """Ranks that a dimension is split over, per strategy."""
        split = np.array([[d == dimension for d in s] for s in strategies])
        ranks: Floats = np.where(split, np.array(self.degrees, dtype=float), 1.0).prod(axis=1)
        return ranks

    def _sharded(self, strategies: Sequence[Strategy]) -> Axes:
        """The axes, one row per strategy."""
        factors = {
            name: 1.0 / self._ranks(strategies, dimension)
            for name, dimension in self.graph.dimensions.items()
        }
        return self.graph.axes.scaled(factors)

    def _weights(self, operator: Operator, strategies: list[Strategy], axes: Axes) -> tuple[Floats, Floats]:
        """Seconds of the sum of the weight's gradient, and bytes of weight, gradient and states."""
        graph = self.graph
        dims = graph.dimensions_of(operator.weight)
        elements = np.broadcast_to(axes[operator.weight], len(strategies))
        summed = [tuple(a for a, d in enumerate(s) if d != WHOLE and d not in dims) for s in strategies]
        sharing = np.array([float(np.prod([self.degrees[a] for a in over])) for over in summed])
        seconds = np.zeros(len(strategies))
        for over in set(summed) - {()}:
            at = np.array([s == over for s in summed])
            both = self._wire.seconds("reduce_scatter", over, elements[at] * graph.gradient_bytes)
            seconds[at] = both + self._wire.seconds("all_gather", over, elements[at] * graph.weight_bytes)
        held = elements * (graph.weight_bytes + graph.gradient_bytes + graph.state_bytes / sharing)
        return seconds / self.micro_batches, held

    def _sums(self, operator: Operator, strategies: list[Strategy], axes: Axes) -> Floats:
        """Seconds of small sums over rows inside an operator."""
        seconds = np.zeros(len(strategies))
        for dimension, count in (operator.sums or {}).items():
            other = [n for n in names_in(operator.output) if self.graph.dimensions.get(role(n)) != dimension]
            rows = np.broadcast_to(axes["*".join(other)], len(strategies)) * _ROW_BYTES
            over = [tuple(a for a, d in enumerate(s) if d == dimension) for s in strategies]
            for group in set(over) - {()}:
                at = np.array([o == group for o in over])
                seconds[at] += count * self._wire.seconds("all_reduce", group, rows[at])
        return seconds

    def _resharding(self, sources: list[Layout], targets: list[Layout], n_bytes: float) -> Floats:
        """Seconds of every change of layout of one tensor."""
        wanted: dict[tuple[str, int], list[tuple[int, int, float]]] = {}
        firsts = {layout: index for index, layout in reversed(list(enumerate(sources)))}
        seconds_first = {layout: index for index, layout in reversed(list(enumerate(targets)))}
        found = np.zeros((len(sources), len(targets)))
        for source, row in firsts.items():
            for target, column in seconds_first.items():
                for step in resharding_steps(source, target, self.degrees):
                    wanted.setdefault((step.collective, step.axis), []).append((row, column, step.fraction))
        for (kind, axis), steps in wanted.items():
            rows, columns, fractions = (np.array(part) for part in zip(*steps, strict=True))
            np.add.at(found, (rows, columns), self._wire.seconds(kind, (axis,), fractions * n_bytes))
        at_rows = [firsts[layout] for layout in sources]
        at_columns = [seconds_first[layout] for layout in targets]
        resharded: Floats = found[np.ix_(at_rows, at_columns)]
        return resharded


def _made(strategy: Strategy, dimensions: set[str]) -> Layout:
    """The layout of a tensor that comes out of an operator: partial where a dimension is split that it has not."""
    return tuple(d if d in dimensions or d == WHOLE else PARTIAL for d in strategy)


def _used(strategy: Strategy, dimensions: set[str]) -> Layout:
    """The layout of a tensor that goes into an operator: whole where a dimension is split that it has not."""
    return tuple(d if d in dimensions else WHOLE for d in strategy)


def _sizes(item: Item) -> list[str]:
    """Expressions of a kernel that name what it can split."""
    if isinstance(item, Matmul):
        return [item.m, item.n, item.k, item.groups]
    return [
        getattr(item, name) for name in ("size", "batch", "heads", "kv_heads", "q") if hasattr(item, name)
    ]
