"""Helix: unlike nodes hold unlike intervals of the layers, so that most tokens flow through all of them.

What it does: every node holds as many layers as make the flow from the first to behind the last largest; ``planner solve flow``.
Saves: the wait for nodes that hold as many layers as faster ones do.
Costs: nothing but the search.
Assumes: nodes are what binds, not the links between them; requests enter a node at its first layer, each on a route of its own.
Not reproduced: its simulator's 339.6, 151.6 and 309.0 tokens/s of decodes (Helix, SWARM, a pipeline per kind), which are of
    requests on links of 12.5 Mbit/s; the flow through its own placement, 1,657 tokens/s with prompts, bounds the first at 402.
Source: Mei et al. 2025 (Helix, ASPLOS, arXiv:2406.01566); Thesys-lab/Helix-ASPLOS25.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from planner.technique import Figure, Knob, Technique
from planner.techniques.solvers import solver

# Thesys-lab/Helix-ASPLOS25, artifact_evaluation/distributed_clusters/layout_llama30b/ilp/t4/ilp_model.lp: tokens/s of a T4 that
# holds 1 to 7 layers of LLaMA 30B.
_T4 = (
    1803.997621271998, 808.4988909790768, 539.0154802625716, 356.6720490577613, 397.6850640835783, 331.373421327816,
    230.9919127164781,
)  # fmt: skip


def _twelve_t4(subject: Callable[..., Any]) -> float:
    """Tokens per second of LLaMA 30B, 60 layers, on twelve T4."""
    from planner.solve.combinatorial.layer_flow import NodeKind

    return float(subject([NodeKind("t4", 12, _T4)], 60))


TECHNIQUE = Technique(
    key="helix_maxflow",
    name="Helix: max-flow over heterogeneous GPUs",
    slot=None,
    job="serving",
    kind="solver",
    source="ASPLOS 2025",
    summary="Unlike nodes to intervals of layers, for the most tokens through all",
    knobs=(Knob("first", "layer that a node begins with"), Knob("layers", "how many it holds")),
    figures=(
        Figure(
            "tokens per second through LLaMA 30B on twelve T4: the optimum of Helix's own program",
            397.68506408357825,
            1e-9,
            "Mei et al. 2025, Thesys-lab/Helix-ASPLOS25, distributed_clusters/layout_llama30b/ilp/t4/ilp_solution.sol (Gurobi)",
            _twelve_t4,
        ),
    ),
    solve=solver("layer_flow.place_layers", "tokens_per_s"),
    naive=solver("layer_flow.even_stages"),
)
