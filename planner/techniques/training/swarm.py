"""SWARM: a pipeline of unlike peers, as many on every stage as make the slowest stage fast.

What it does: peers of a stage share its micro-batches, and are dealt so that the slowest stage is as fast as can be; ``planner
    solve peers``.
Saves: the wait for a stage whose peers are slow.
Costs: a stage's weights on every one of its peers, and the sum of their gradients.
Assumes: a steady state; peers that come and go ask for another allocation. SWARM itself moves one peer at a time to the slowest
    stage.
Source: Ryabinin et al. 2023 (SWARM parallelism, ICML 2023, arXiv:2301.11913) §3.2.
"""

from __future__ import annotations

from planner.technique import Figure, Technique
from planner.techniques.solvers import solver

_PEERS = {3.0: 2, 2.0: 3}
_STAGES = (1.0, 1.0)
_LONGEST_FIRST = solver("peers.longest_first")

TECHNIQUE = Technique(
    key="swarm",
    name="SWARM (unlike peers)",
    slot=None,
    kind="solver",
    source="arXiv:2301.11913",
    summary="Unlike peers to the stages of a pipeline",
    figures=(
        Figure(
            "best minimum of two stages with peers of 3, 3, 2, 2, 2, over that of longest-first: (4m − 2)/(3m − 1)",
            6.0 / 5.0,
            1e-9,
            "Csirik, Kellerer, Woeginger 1992 (Operations Research Letters 11): the exact bound, reached for m = 2",
            lambda subject: float(subject(_PEERS, _STAGES)) / _LONGEST_FIRST(_PEERS, _STAGES),
        ),
    ),
    solve=solver("peers.staff", "rate"),
    naive=_LONGEST_FIRST,
)
