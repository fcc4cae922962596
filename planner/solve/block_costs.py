"""Half layers of a model, embedding and head, as blocks to deal to a pipeline: what they take and hold, by the engine."""

from __future__ import annotations

from collections.abc import Mapping

from planner.engine.pricer import Pricer
from planner.solve.combinatorial.blocks import Block
from planner.solve.graph.operators import Operator, model_graph
from planner.solve.tier_costs import elements_of, seconds_of
from planner.specs.cluster import Cluster
from planner.specs.model import Model
from planner.specs.stack import Stack
from planner.specs.workload import TrainWorkload

__all__ = ["model_blocks"]

_PHASES = ("forward", "backward", "weight")


def model_blocks(
    model: Model,
    cluster: Cluster,
    stack: Stack,
    workload: TrainWorkload,
    knobs: Mapping[str, str] | None = None,
) -> list[Block]:
    """The blocks of a model in order; ``workload.global_batch_size`` sequences are a micro-batch.

    A block holds weights, gradients, states, and its activations in a full pipeline: of one micro-batch in flight per device.

    Raises:
        SpecError: the model's data flow is not known.
    """
    graph = model_graph(model, cluster, stack, workload, knobs=knobs)
    pricer = Pricer(cluster, stack)
    per_weight = graph.weight_bytes + graph.gradient_bytes + graph.state_bytes
    parts: dict[str, list[Operator]] = {}
    done: set[str] = set()
    for operator in graph.operators:
        layer = operator.name.partition(".")[0]
        half = "" if not layer.startswith("layer") else ".network" if layer in done else ".attention"
        parts.setdefault(layer + half, []).append(operator)
        if operator.name.endswith(".mixer.add"):
            done.add(layer)
    blocks = []
    for name, operators in parts.items():
        seconds = sum(seconds_of(graph, pricer, operators, phase) for phase in _PHASES)
        weights = sum(elements_of(graph, operator.weight) for operator in operators if operator.weight)
        kept = sum(
            elements_of(graph, item.size) * item.bytes_per_element for o in operators for item in o.held
        )
        blocks.append(Block(name, seconds, weights * per_weight + cluster.devices * kept))
    return blocks
