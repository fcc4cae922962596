"""The fastest sharding of an operator graph on a device mesh within a memory budget, with proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.engine.pricer import Pricer
from planner.errors import Problem, SpecError
from planner.solve.combinatorial.certificate import Certificate
from planner.solve.combinatorial.choices import Assignment, ChoiceGraph, minimise
from planner.solve.graph.layouts import Layouts, Strategy
from planner.solve.graph.operators import OperatorGraph
from planner.specs.cluster import Cluster
from planner.specs.stack import Stack

__all__ = ["Sharding", "ShardingProblem", "shard"]

_MOST_AXES = 3


@dataclass(frozen=True, slots=True, eq=False)
class ShardingProblem:
    """A priced graph: strategies of every operator, and the choices between them."""

    graph: OperatorGraph
    degrees: tuple[int, ...]
    strategies: tuple[Sequence[Strategy], ...]
    choices: ChoiceGraph
    layouts: Layouts

    @staticmethod
    def priced(
        graph: OperatorGraph, cluster: Cluster, stack: Stack, degrees: Sequence[int], *, budget_bytes: float | None = None,
        micro_batches: int = 1,
    ) -> ShardingProblem:  # fmt: skip
        """Prices every strategy of every operator, and every change of layout between them.

        Args:
            graph: the operators.
            cluster: whose devices the mesh covers; its innermost ranks are the last axis's.
            stack: the software.
            degrees: ranks along every mesh axis; their product is the cluster's devices.
            budget_bytes: for weights, gradients, states and what is kept; None: the device's memory without what the
                software holds.
            micro_batches: per optimizer step.

        Raises:
            SpecError: the mesh does not fit the cluster.
        """
        mesh = "x".join(map(str, degrees))
        if not 1 <= len(degrees) <= _MOST_AXES or min(degrees) < 1:
            raise SpecError(
                Problem("--mesh", mesh, f"one to {_MOST_AXES} axes of at least one rank, such as 4x8")
            )
        if int(np.prod(degrees)) != cluster.devices:
            raise SpecError(
                Problem(
                    "--mesh", mesh, f"axes whose product is the {cluster.devices} devices of {cluster.name}"
                )
            )
        layouts = Layouts(graph, Pricer(cluster, stack), degrees, micro_batches)
        nodes = [layouts.nodes(operator) for operator in graph.operators]
        edges: dict[tuple[int, int], Any] = {}
        for number, operator in enumerate(graph.operators):
            for read in operator.reads:
                table = layouts.edge(graph.operators[read.source], operator, read)
                edges[read.source, number] = edges.get((read.source, number), 0.0) + table
        if budget_bytes is None:
            budget_bytes = float(cluster.device.memory_bytes) - float(stack.framework_bytes)
        choices = ChoiceGraph(
            [operator.name for operator in graph.operators], [seconds for _, seconds, _ in nodes],
            [held for *_, held in nodes], edges, budget_bytes,
        )  # fmt: skip
        strategies = tuple(strategies for strategies, *_ in nodes)
        return ShardingProblem(graph, tuple(degrees), strategies, choices, layouts)

    def sent_bytes(self, choice: Sequence[int]) -> dict[tuple[int, int], float]:
        """Bytes that a rank sends between every two operators, forward and back."""
        sent: dict[tuple[int, int], float] = {}
        for number, operator in enumerate(self.graph.operators):
            for read in operator.reads:
                made, used = (self.strategies[i][choice[i]] for i in (read.source, number))
                source = self.graph.operators[read.source]
                n_bytes = self.layouts.sent_bytes(source, operator, read, made, used)
                sent[read.source, number] = sent.get((read.source, number), 0.0) + n_bytes
        return sent

    def solution(self, found: Assignment) -> Sharding:
        """An assignment in words."""
        choices = self.choices
        operators = tuple(
            {
                "name": operator.name,
                "splits": list(strategies[x]),
                "time_s": float(seconds[x]),
                "memory_bytes": float(held[x]),
            }
            for operator, strategies, seconds, held, x in zip(
                self.graph.operators,
                self.strategies,
                choices.time_s,
                choices.memory_bytes,
                found.choice,
                strict=True,
            )
        )
        sent = self.sent_bytes(found.choice)
        reshardings = tuple(
            {
                "from": choices.names[i],
                "to": choices.names[j],
                "time_s": float(table[found.choice[i], found.choice[j]]),
                "sent_bytes": sent[i, j],
            }
            for (i, j), table in sorted(choices.edges.items())
            if sent[i, j] > 0.0
        )
        return Sharding(
            self.degrees,
            operators,
            reshardings,
            found.time_s,
            found.memory_bytes,
            choices.budget_bytes,
            found.certificate,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Sharding:
    """What every operator splits along every mesh axis (empty: nothing), and the layouts that change on the way."""

    degrees: tuple[int, ...]
    operators: tuple[Mapping[str, Any], ...]
    reshardings: tuple[Mapping[str, Any], ...]
    time_s: float
    memory_bytes: float
    budget_bytes: float
    certificate: Certificate

    def as_dict(self) -> dict[str, Any]:
        """The sharding as JSON fields."""
        return {
            "mesh": list(self.degrees), "time_s": self.time_s, "memory_bytes": self.memory_bytes,
            "budget_bytes": self.budget_bytes, "operators": [dict(o) for o in self.operators],
            "reshardings": [dict(r) for r in self.reshardings], "certificate": self.certificate.as_dict(),
        }  # fmt: skip


def shard(
    graph: OperatorGraph, cluster: Cluster, stack: Stack, degrees: Sequence[int], *, budget_bytes: float | None = None,
    micro_batches: int = 1, elimination: bool = True, backend: str = "scipy", time_limit_s: float | None = None,
) -> Sharding:  # fmt: skip
    """The sharding with which one micro-batch's forward and backward take least time.

    Arguments are those of :meth:`ShardingProblem.priced` and of :func:`~planner.solve.combinatorial.choices.minimise`.

    Raises:
        SpecError: the mesh does not fit the cluster.
        Infeasible: no sharding fits into the budget.
        SolverError: the integer program fails.
    """
    problem = ShardingProblem.priced(
        graph, cluster, stack, degrees, budget_bytes=budget_bytes, micro_batches=micro_batches
    )
    return problem.solution(
        minimise(problem.choices, elimination=elimination, backend=backend, time_limit_s=time_limit_s)
    )
