"""Which interval of a model's layers every one of unlike nodes holds, so that most tokens per second flow through all layers.

Where links between nodes carry more than the nodes do, a node is an edge from its first layer to behind its last, with what it
generates while holding so many as capacity: what flows from the first layer to behind the last is what the nodes serve, whoever
hands over to whom. Alike nodes are counted and not told apart, so that the program is small where the published one, with a
variable for every pair of nodes, is not. The best single pipeline comes first, by a knapsack for every rate that a node may have.

Source: Y. Mei et al. 2025 (Helix, ASPLOS, arXiv:2406.01566), section 4: intervals, and the flow through them, without partial
inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.errors import Infeasible, Problem, SolverError
from planner.solve.combinatorial.certificate import Certificate, Clock, certify
from planner.solve.combinatorial.milp import MilpSolution, Program, solve

__all__ = ["LayerFlow", "NodeKind", "Span", "even_stages", "place_layers"]


@dataclass(frozen=True, slots=True)
class NodeKind:
    """Alike nodes.

    Attributes:
        name: what they are called.
        count: how many there are.
        tokens_per_s: what one of them generates while it holds 1, 2, … layers; as many entries as it can hold.
    """

    name: str
    count: int
    tokens_per_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Nodes of one kind that hold the same layers: ``first`` and the ones behind it, ``layers`` in all."""

    kind: str
    first: int
    layers: int
    nodes: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class LayerFlow:
    """A placement, by first layer, and what flows through it."""

    spans: tuple[Span, ...]
    tokens_per_s: float
    certificate: Certificate


def place_layers(
    kinds: Sequence[NodeKind], layers: int, *, backend: str = "scipy", time_limit_s: float | None = None
) -> LayerFlow:
    """The placement through which most flows.

    Args:
        kinds: the nodes.
        layers: of the model.
        backend: of the integer program.
        time_limit_s: after which the best placement so far is returned with its gap.

    Raises:
        Infeasible: all nodes together cannot hold the layers.

    >>> fast, slow = NodeKind("fast", 1, (8.0, 4.0)), NodeKind("slow", 2, (4.0, 1.0))
    >>> place_layers([fast, slow], 4).tokens_per_s  # two layers on the fast node, one on each of the slow ones
    4.0
    """
    clock = Clock(time_limit_s)
    most = sum(kind.count * len(kind.tokens_per_s) for kind in kinds)
    if most < layers:
        expected = "more nodes, or nodes that hold more"
        raise Infeasible(Problem("nodes", f"room for {most} of {layers} layers", expected))
    chain = _best_chain(kinds, layers)
    work = sum(k.count * max(n * r for n, r in enumerate(k.tokens_per_s, 1)) for k in kinds) / layers
    best, bound, by = chain, work, "one pipeline, and all nodes at their best"
    if not chain or sum(_through(chain)) < work * (1.0 - 1e-9):
        program = _Program(kinds, layers, work)
        found = solve(program.program, backend=backend, time_limit_s=clock.left_s)
        bound, by = min(work, -found.bound), f"integer program ({backend})"
        if found.found and (not chain or -found.objective > min(_through(chain))):
            best = program.spans(found)
    if not best:
        raise SolverError(Problem("nodes", f"no placement in time by the {by}", "more time", "Allow more."))
    value = sum(span.tokens_per_s for span in best if span.first == 0)
    certificate = certify(-value, min(-bound, -value), by, clock)
    return LayerFlow(tuple(sorted(best, key=lambda s: (s.first, s.layers, s.kind))), value, certificate)


def even_stages(kinds: Sequence[NodeKind], layers: int) -> float:
    """Tokens per second of equal stages that every node can hold, each node on the stage that is slowest so far.

    As many baselines place layers (SWARM in Helix's evaluation); 0 where nodes are fewer than stages.

    >>> even_stages([NodeKind("fast", 1, (8.0, 4.0)), NodeKind("slow", 2, (4.0, 1.0))], 4)
    2.0
    """
    size = min(len(kind.tokens_per_s) for kind in kinds)
    stages = -(-layers // size)
    held = -(-layers // stages)
    rates = np.zeros(stages)
    nodes = [kind.tokens_per_s[held - 1] for kind in kinds for _ in range(kind.count)]
    for rate in sorted(nodes, reverse=True):
        rates[int(rates.argmin())] += rate
    return float(rates.min())


def _through(chain: Sequence[Span]) -> list[float]:
    """What enters a placement."""
    return [span.tokens_per_s for span in chain if span.first == 0] or [0.0]


def _best_chain(kinds: Sequence[NodeKind], layers: int) -> list[Span]:
    """One pipeline whose slowest node is as fast as can be; empty where none has exactly so many layers."""
    rates = sorted({rate for kind in kinds for rate in kind.tokens_per_s})
    low, high, best = 0, len(rates), []
    while low < high:  # the sets of allowed sizes shrink with the rate
        middle = (low + high) // 2
        found = _chain(kinds, layers, rates[middle])
        if found:
            low, best = middle + 1, found
        else:
            high = middle
    return best


def _chain(kinds: Sequence[NodeKind], layers: int, rate: float) -> list[Span]:
    """A pipeline all of whose nodes have a rate: reachable sums of layers, node by node, as bits of a number."""
    whole = (1 << (layers + 1)) - 1
    nodes = [
        (kind.name, [n for n, r in enumerate(kind.tokens_per_s, 1) if r >= rate])
        for kind in kinds
        for _ in range(kind.count)
    ]
    reached = [1]
    for _, sizes in nodes:
        sums = reached[-1]
        for size in sizes:
            sums |= (reached[-1] << size) & whole
        reached.append(sums)
    if not reached[-1] >> layers & 1:
        return []
    left, spans = layers, []
    for (name, sizes), before in zip(reversed(nodes), reversed(reached[:-1]), strict=True):
        if before >> left & 1:
            continue  # this node is not needed
        size = next(s for s in sizes if s <= left and before >> (left - s) & 1)
        left -= size
        spans.append(Span(name, left, size, 1, rate))
    return spans


class _Program:
    """Nodes of every kind on every interval, and what flows through them."""

    def __init__(self, kinds: Sequence[NodeKind], layers: int, most: float) -> None:
        self.program = Program()
        spans = [
            (kind, first, size, rate)
            for kind in kinds
            for size, rate in enumerate(kind.tokens_per_s, 1)
            for first in range(layers - size + 1)
        ]
        self._spans = spans
        starts = np.array([first for _, first, _, _ in spans])
        ends = starts + np.array([size for _, _, size, _ in spans])
        rates, counts = np.array([r for *_, r in spans]), np.array([float(k.count) for k, *_ in spans])
        self._nodes = self.program.variables(np.zeros(len(spans)), upper=counts, integer=True)
        self._flows = self.program.variables(
            np.where(starts == 0, -1.0, 0.0), upper=np.minimum(counts * rates, most)
        )
        pairs = np.column_stack([self._flows, self._nodes])
        self.program.constrain(pairs, np.column_stack([np.ones(len(spans)), -rates]), high=0.0)
        for place in range(1, layers):
            flows = [*self._flows[ends == place], *self._flows[starts == place]]
            signs = [1.0] * int((ends == place).sum()) + [-1.0] * int((starts == place).sum())
            self.program.constrain([flows], [signs], low=0.0, high=0.0)
        for kind in kinds:
            own = self._nodes[[k is kind for k, *_ in spans]]
            self.program.constrain([own], [np.ones(len(own))], high=float(kind.count))
        first = self._flows[starts == 0]
        self.program.constrain([first], [np.ones(len(first))], high=most)

    def spans(self, found: MilpSolution) -> list[Span]:
        """The intervals through which something flows."""
        nodes, flows = found.values[self._nodes], found.values[self._flows]
        return [
            Span(kind.name, first, size, round(float(n)), float(flow))
            for (kind, first, size, _), n, flow in zip(self._spans, nodes, flows, strict=True)
            if flow > 1e-6 and n > 0.5
        ]
