"""Holmes: ranks that sum gradients share a kind of network interface, pipelines cross from one kind to another.

What it does: places replicas of a stage where their interfaces can speak RDMA to each other, and hops between stages where only
    Ethernet is left; ``planner solve ranks`` with the bandwidth of every pair of nodes.
Saves: gradient sums at the speed of the slowest pair, which in a mixed cluster is Ethernet's.
Costs: a rank order of the launcher's own.
Assumes: as Pipette's mapping, which it is on a matrix of two rates.
Source: Yang et al. 2024 (Holmes, ICPP 2024, arXiv:2312.03549) §3.
"""

from __future__ import annotations

from typing import Any

from planner.technique import Figure, Technique
from planner.techniques.solvers import solver

_RDMA, _ETHERNET = 8.0, 1.0  # of a link; only their order matters
_NODES = 4


def _slower(subject: Any) -> float:
    """Seconds of gradient sums over two kinds of interfaces, over those where all nodes have one kind."""
    import numpy as np

    from planner.solve.combinatorial.ranks import RankProblem, pipeline_phases

    kinds = np.arange(_NODES) % 2  # every other node has the other kind
    mixed = np.where(kinds[:, None] == kinds[None, :], _RDMA, _ETHERNET)
    phases = pipeline_phases(2, 2, activation_bytes=1e-3, gradient_bytes=1.0)
    node = subject(RankProblem(mixed, phases))
    sums = phases[-1:]
    alike = RankProblem(np.full((_NODES, _NODES), _RDMA), sums)
    return RankProblem(mixed, sums).seconds(node) / alike.seconds(node)


TECHNIQUE = Technique(
    key="holmes",
    name="Holmes (unlike network interfaces)",
    slot=None,
    kind="solver",
    source="arXiv:2312.03549",
    summary="Replicas where interfaces are alike, stages across",
    figures=(
        Figure(
            "time of gradient sums over that of a cluster with one kind of RDMA: close to it",
            1.0,
            0.01,
            "Yang et al. 2024 (arXiv:2312.03549), abstract: close to homogeneous RDMA, far from pure Ethernet",
            _slower,
        ),
    ),
    solve=solver("ranks.map_ranks", "node"),
    naive=solver("ranks.in_order"),
)
