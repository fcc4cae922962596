"""Pipette: which rank runs on which node of a cluster whose links are not alike.

What it does: maps pipeline stages and their replicas to nodes by a measured matrix of bandwidths, so that hops and gradient sums
    take least; ``planner solve ranks``.
Saves: the slow links of a real network, where a regular mesh counts on the mean.
Costs: a rank order of the launcher's own.
Assumes: groups of one phase talk at the same time and do not share links.
Source: Yim et al. 2024 (Pipette, arXiv:2405.18093) §V.
"""

from __future__ import annotations

from typing import Any

from planner.technique import Figure, Technique
from planner.techniques.solvers import solver

# Nugent et al.'s problem of five facilities, as QAPLIB has it: distances on a grid of rooms, flows between facilities.
_DISTANCES = ((0, 1, 1, 2, 3), (1, 0, 2, 1, 2), (1, 2, 0, 1, 2), (2, 1, 1, 0, 1), (3, 2, 2, 1, 0))
_FLOWS = {(0, 1): 5, (0, 2): 2, (0, 3): 4, (0, 4): 1, (1, 2): 3, (1, 4): 2, (3, 4): 5}


def _in_order(problem: Any) -> float:
    from planner.solve.combinatorial.ranks import in_order

    return float(problem.seconds(in_order(problem)))


def _cost(subject: Any) -> float:
    """Flow times distance, each pair once: a message between two ranks takes its bytes times the distance of their nodes."""
    import numpy as np

    from planner.solve.combinatorial.ranks import Group, RankProblem

    distance = np.array(_DISTANCES, dtype=float)
    rates = np.divide(1.0, distance, out=np.ones_like(distance), where=distance > 0.0)
    phases = tuple((Group(pair, float(flow)),) for pair, flow in _FLOWS.items())
    return float(subject(RankProblem(rates, phases)))


TECHNIQUE = Technique(
    key="pipette",
    name="Pipette (rank mapping)",
    slot=None,
    kind="solver",
    source="arXiv:2405.18093",
    summary="Ranks to nodes by a matrix of bandwidths",
    figures=(
        Figure(
            "least cost of Nugent, Vollmann and Ruml's assignment of five facilities",
            25.0,
            1e-9,
            "Nugent, Vollmann, Ruml 1968 (doi:10.1287/opre.16.1.150)",
            _cost,
        ),
    ),
    solve=solver("ranks.map_ranks", "time_s"),
    naive=_in_order,
)
