"""A training step's tensors and kernels, by the engine: the problem that places them in tiers of memory.

One micro-batch per step on devices that each hold an equal share of weights, gradients and optimizer states (ZeRO stage
3), and keep the activations of their own sequences. A layer's forward uses its weights and makes what it keeps; its
backward uses both and makes its gradients; its update uses weights, gradients and states. Tiers are the cluster's: device
memory, host memory over the host link, NVMe. What placement does not change is left out: gathers of weights over the
network take time, and the gathered weights of the largest layer take device memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from planner.costs.optimizer import optimizer_touched_bytes
from planner.engine.pricer import Pricer
from planner.ledger import Axes, Item, Stream
from planner.solve.combinatorial.tiering import Kernel, Tensor, Tier, TieringProblem
from planner.solve.graph.operators import Operator, OperatorGraph, model_graph
from planner.specs.cluster import Cluster
from planner.specs.model import Model
from planner.specs.stack import Stack
from planner.specs.workload import TrainWorkload

__all__ = ["elements_of", "seconds_of", "tier_problem"]


def tier_problem(
    model: Model, cluster: Cluster, stack: Stack, workload: TrainWorkload, *, layers: int | None = None,
    knobs: Mapping[str, str] | None = None, moves: str = "serial", device_bytes: float | None = None,
) -> TieringProblem:  # fmt: skip
    """The problem of one device.

    Args:
        model: what is trained.
        cluster: its devices share the states.
        stack: the software.
        workload: ``global_batch_size`` sequences run on each device.
        layers: how many of the model's layers; None: all.
        knobs: choices of formats and kernels.
        moves: as in :data:`~planner.solve.combinatorial.tiering.MOVES`.
        device_bytes: device memory for tensors; None: all without what the software and gathered weights hold.

    Raises:
        SpecError: the model's data flow is not known, or it has fewer layers.
    """
    graph = model_graph(model, cluster, stack, workload, layers=layers, knobs=knobs)
    pricer = Pricer(cluster, stack)
    parts: dict[str, list[Operator]] = {}
    for operator in graph.operators:
        parts.setdefault(operator.name.partition(".")[0], []).append(operator)
    tensors: list[Tensor] = []
    forward, backward, update = [], [], []
    largest = 0.0
    for name, operators in parts.items():
        elements = sum(elements_of(graph, operator.weight) for operator in operators if operator.weight)
        largest = max(largest, elements * graph.weight_bytes)
        share = elements / cluster.devices
        kept = sum(
            elements_of(graph, item.size) * item.bytes_per_element for o in operators for item in o.held
        )
        first = len(tensors)
        tensors += [
            Tensor(f"weights {name}", share * graph.weight_bytes, persists=True),
            Tensor(f"kept {name}", kept),
            Tensor(f"gradients {name}", share * graph.gradient_bytes),
            Tensor(f"states {name}", share * graph.state_bytes, persists=True),
        ]
        weights, held, gradients, states = range(first, first + 4)
        seconds = {
            phase: seconds_of(graph, pricer, operators, phase) for phase in ("forward", "backward", "weight")
        }
        forward.append(Kernel(f"forward {name}", seconds["forward"], (weights, held)))
        backward.append(
            Kernel(f"backward {name}", seconds["backward"] + seconds["weight"], (weights, held, gradients))
        )
        update.append(Kernel(f"update {name}", _update_s(graph, pricer, share), (weights, gradients, states)))
    if device_bytes is None:
        gathered = largest if cluster.devices > 1 else 0.0
        device_bytes = float(cluster.device.memory_bytes) - float(stack.framework_bytes) - gathered
    link = cluster.host_link_bytes_per_s
    tiers = [Tier("device", max(device_bytes, 0.0))]
    if cluster.host_memory_bytes > 0:
        tiers.append(Tier("host", cluster.host_memory_bytes, link, link))
    if cluster.cxl_bytes > 0:
        rate = min(cluster.cxl_bytes_per_s, link)
        tiers.append(Tier("cxl", cluster.cxl_bytes, rate, rate))
    if cluster.nvme_bytes > 0:
        rate = min(cluster.nvme_bytes_per_s, link)
        tiers.append(Tier("nvme", cluster.nvme_bytes, rate, rate))
    return TieringProblem((*forward, *reversed(backward), *update), tuple(tensors), tuple(tiers), moves)


def elements_of(graph: OperatorGraph, size: str) -> float:
    """Elements that an expression of a graph says."""
    return float(np.ravel(graph.axes[size])[0])


def seconds_of(graph: OperatorGraph, pricer: Pricer, operators: list[Operator], phase: str) -> float:
    """Seconds of some operators' kernels in one phase."""
    kernels: list[Item] = [item for o in operators for item in o.kernels if item.phase == phase]
    return sum(float(np.ravel(price)[0]) for price in pricer.prices(kernels, graph.axes))


def _update_s(graph: OperatorGraph, pricer: Pricer, elements: float) -> float:
    """Seconds to read and write states and weights, and to read gradients: a fused element-wise update on the device."""
    touched = float(optimizer_touched_bytes(graph.state_bytes, graph.gradient_bytes, graph.weight_bytes))
    if not elements:
        return 0.0
    item = Stream(what="update", block="", phase="step", size="elements", bytes_per_element=touched)
    (seconds,) = pricer.prices([item], Axes({"elements": elements}))
    return float(np.ravel(seconds)[0])
