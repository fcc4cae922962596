"""1F1B with flush: each stage alternates one forward and one backward once its warm-up is done.

What it does: stage i runs p−i−1 warm-up forwards, then alternates, then drains.
Saves: activations: min(m, p−i) micro-batches on stage i instead of m.
Costs: the bubble of GPipe, (p−1)(F+B).
Assumes: messages between stages are latency on the edge, not work on the device.
Source: Fan et al. 2021 (DAPPLE, arXiv:2007.01045); Narayanan et al. 2021 (PipeDream-Flush, arXiv:2006.09503).
"""

from __future__ import annotations

from planner.technique import Figure, Knob, Technique
from planner.techniques import figures

TECHNIQUE = Technique(
    key="dapple_1f1b",
    name="1F1B (DAPPLE, PipeDream-Flush)",
    slot="schedule",
    choices=("1f1b",),
    default=True,
    source="arXiv:2007.01045",
    summary="One forward, one backward after a warm-up",
    knobs=(Knob("schedule", "order of forwards and backwards", ("1f1b", "gpipe", "interleaved"), "1f1b"),),
    figures=(
        Figure(
            "bubble relative to the ideal step, p = 8, m = 32: (p − 1)/m",
            7 / 32,
            1e-9,
            "Narayanan et al. 2021 (arXiv:2104.04473), section 2.2.1",
            lambda order: figures.bubble_s(order, 8, 32) / (32 * 3.0),
        ),
        Figure(
            "micro-batches held by the first of 4 stages, m = 8",
            4.0,
            1e-9,
            "Narayanan et al. 2021 (arXiv:2104.04473), section 2.2.1: at most the pipeline's depth",
            lambda order: figures.in_flight(order, 4, 8),
        ),
    ),
    order="1f1b",
)
