"""GPipe: all forwards of a step, then all backwards.

What it does: every stage runs m forwards, then m backwards.
Saves: time: p stages work on different micro-batches at once.
Costs: a bubble of (p−1)(F+B); activations of all m micro-batches on every stage.
Assumes: messages between stages are latency on the edge, not work on the device.
Source: Huang et al. 2019 (arXiv:1811.06965) §2.3.
"""

from __future__ import annotations

from planner.technique import Figure, Technique
from planner.techniques import figures

TECHNIQUE = Technique(
    key="gpipe",
    name="GPipe",
    slot="schedule",
    choices=("gpipe",),
    source="arXiv:1811.06965",
    summary="All forwards, then all backwards",
    figures=(
        Figure(
            "bubble as a fraction of the step, K = 4 stages, M = 4K micro-batches: (K − 1)/(M + K − 1)",
            3 / 19,
            1e-9,
            "Huang et al. 2019 (arXiv:1811.06965), section 2.3",
            lambda order: figures.bubble_s(order, 4, 16) / figures.makespan_s(order, 4, 16),
        ),
        Figure(
            "micro-batches held by every stage, m = 8",
            8.0,
            1e-9,
            "Narayanan et al. 2021 (arXiv:2104.04473), section 2.2.1",
            lambda order: figures.in_flight(order, 4, 8, device=3),
        ),
    ),
    order="gpipe",
    active=lambda ctx: ctx.mesh.pp > 1,
)
