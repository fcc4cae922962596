"""Alpa's intra-operator plan: what every operator splits along every axis of a device mesh, at the least time within memory.

What it does: prices every sharding of every operator and every change of layout between them, and chooses; ``planner solve
    sharding``.
Saves: finds tensor, data, expert and sequence parallelism per operator, and mixtures of them that no launcher has a name for.
Costs: nothing at run time; nothing overlaps in its count.
Assumes: one micro-batch, whose kernels and collectives run one after the other; what is kept for the backward and the states
    are what binds memory.
Source: Zheng et al. 2022 (Alpa, arXiv:2201.12023) §4.
"""

from __future__ import annotations

from typing import Any

from planner.technique import Figure, Technique
from planner.techniques.solvers import solver

_LAYERS = 2


def _sent_elements(subject: Any) -> float:
    """Elements that a device sends per layer of GPT-3 175B, one sequence on 8 devices."""
    from planner.solve.graph.operators import model_graph
    from planner.solve.graph.sharding import ShardingProblem
    from planner.specs.hardware import load_cluster
    from planner.specs.models import load_model
    from planner.specs.stack import load_stack
    from planner.specs.workload import TrainWorkload

    cluster, stack = load_cluster("a100-sxm-80gb:1x8"), load_stack()
    graph = model_graph(load_model("gpt3-175b"), cluster, stack, TrainWorkload(1, 2048), layers=_LAYERS)
    problem = ShardingProblem.priced(graph, cluster, stack, (8,))
    sent = problem.sent_bytes(subject(problem.choices))
    names = problem.choices.names
    layers = [
        n for (i, j), n in sent.items() if names[i].startswith("layer") and names[j].startswith("layer")
    ]
    return sum(layers) / 2.0 / _LAYERS


TECHNIQUE = Technique(
    key="alpa",
    name="Alpa (intra-operator)",
    slot=None,
    kind="solver",
    source="arXiv:2201.12023",
    summary="The fastest sharding of every operator on a device mesh",
    figures=(
        Figure(
            "elements sent per layer of GPT-3 175B on 8 devices, as by Megatron's plan: 8bsh(t − 1)/t",
            8 * 2048 * 12288 * 7 / 8,
            1e-9,
            "Zheng et al. 2022 (arXiv:2201.12023), section 8.1; Narayanan et al. 2021 (arXiv:2104.04473), section 3.2",
            _sent_elements,
        ),
    ),
    solve=solver("choices.minimise", "choice"),
    naive=solver("choices.cheapest_alone"),
)
