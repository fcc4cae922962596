"""Ring all-reduce: every collective runs as the cheapest of ring, tree and hierarchical algorithm for its group.

What it does: nothing to the ledger; the engine prices every collective with the algorithm that is fastest for its size and for
    the tiers that its group crosses, as communication libraries do at run time.
Saves: bandwidth: a ring sends 2(G−1)/G·n per rank however many ranks there are.
Costs: 2(G−1) latencies, where a tree needs 2·log2(G).
Assumes: the library picks the fastest algorithm.
Source: Patarasu, Yuan 2009 (JPDC 69(2), doi:10.1016/j.jpdc.2008.09.002); Gibiansky 2017 (Baidu).
"""

from __future__ import annotations

from planner.technique import Figure, Technique


def _volume(algorithm: str) -> float:
    """Bytes per byte that a rank of 16 sends; without an algorithm, everything to everybody."""
    from planner.costs.collectives import Level, all_reduce_s

    if not algorithm:
        return 15.0
    return float(all_reduce_s(1e12, [Level(16, 1e12, 0.0)], algorithm))


TECHNIQUE = Technique(
    key="ring_allreduce",
    name="Collective algorithms (ring all-reduce)",
    slot=None,
    source="doi:10.1016/j.jpdc.2008.09.002",
    summary="The fastest of ring, tree and hierarchical algorithm, per group and size",
    figures=(
        Figure(
            "bytes sent per rank and byte reduced, 16 ranks: 2(G − 1)/G",
            1.875,
            1e-9,
            "Patarasu, Yuan 2009 (doi:10.1016/j.jpdc.2008.09.002)",
            _volume,
        ),
    ),
    order="ring",
)
