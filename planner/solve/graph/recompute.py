"""A layer's forward and backward as a graph of kernels, and its front of recomputation time against kept memory.

The operators of one layer become nodes in the order in which they run; behind them stands the boundary, where the rest of
the model runs, then one backward node per operator, in reverse. A backward node reads the gradient of what its operator
made, and, where the ledger keeps anything for it, what the operator read (a fused attention also what it made). Every
front point could stand beside the named recompute choices of a layer: seconds more, bytes kept per micro-batch in flight,
bytes at the peak while the layer is at work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from planner.engine.pricer import Pricer
from planner.ledger import AttentionCore, Kernel
from planner.solve.combinatorial.recompute import ComputeGraph, Schedule
from planner.solve.graph.operators import Operator, OperatorGraph
from planner.specs.cluster import Cluster
from planner.specs.stack import Stack

__all__ = ["layer_graph", "point"]


def layer_graph(graph: OperatorGraph, layer: int, cluster: Cluster, stack: Stack) -> ComputeGraph:
    """Forward and backward of one layer of a model's graph; its input and the gradient of its output are given.

    Args:
        graph: of a model.
        layer: its number.
        cluster: whose device runs it.
        stack: the software.
    """
    numbers = [i for i, operator in enumerate(graph.operators) if operator.name.startswith(f"layer{layer}.")]
    operators = [graph.operators[i] for i in numbers]
    at = {number: index for index, number in enumerate(numbers)}
    n = len(operators)
    inside = [[at[read.source] for read in operator.reads if read.source in at] for operator in operators]
    pricer = Pricer(cluster, stack)
    forward = [_seconds(operator, pricer, graph, ("forward",)) for operator in operators]
    backward = [_seconds(operator, pricer, graph, ("backward", "weight")) for operator in operators]
    made = [_bytes(graph, operator.output, operator.bytes_per_element) for operator in operators]
    reads: list[tuple[int, ...]] = [tuple(sorted(set(sources))) for sources in inside]
    sizes, times = list(made), list(forward)
    names = [operator.name.partition(".")[2] for operator in operators]
    node_of: dict[int, int] = {}
    for index in reversed(range(n)):
        operator = operators[index]
        needs = {node_of[other] for other in range(n) if index in inside[other]}
        if any("mask" not in held.what for held in operator.held):
            needs |= set(inside[index])
        if isinstance(operator.kernels[0], AttentionCore):
            needs.add(index)
        node_of[index] = len(reads)
        reads.append(tuple(sorted(needs)))
        times.append(backward[index])
        sizes.append(sum(_bytes(graph, read.size, read.bytes_per_element) for read in operator.reads))
        names.append(f"{names[index]} backward")
    # The layer's output goes on to the next layer, which keeps it as its input.
    sizes[n - 1] = 0.0
    return ComputeGraph(names, times, sizes, reads, boundary=n)


def point(schedule: Schedule) -> dict[str, Any]:
    """A schedule as JSON fields."""
    assert schedule.certificate is not None
    return {
        "recompute_s": schedule.recompute_s, "time_s": schedule.time_s, "kept_bytes": schedule.kept_bytes,
        "peak_bytes": schedule.peak_bytes, "computed_again": schedule.again, "certificate": schedule.certificate.as_dict(),
    }  # fmt: skip


def _seconds(operator: Operator, pricer: Pricer, graph: OperatorGraph, phases: Sequence[str]) -> float:
    kernels = [item for item in operator.kernels if isinstance(item, Kernel) and item.phase in phases]
    return sum(float(np.ravel(price)[0]) for price in pricer.prices(kernels, graph.axes))


def _bytes(graph: OperatorGraph, size: str, bytes_per_element: float) -> float:
    return float(np.ravel(graph.axes[size])[0]) * bytes_per_element
