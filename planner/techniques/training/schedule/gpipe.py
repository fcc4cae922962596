"""GPipe: all forwards of a step, then all backwards.

What it does: cuts the layers into pp stages; every stage runs m forwards, then m backwards.
Saves: weights and activations per device, divided by pp.
Costs: a bubble of (p−1)(F+B); activations of all m micro-batches on every stage.
Assumes: messages between stages are latency on the edge, not work on the device.
Source: Huang et al. 2019 (arXiv:1811.06965).
"""

from __future__ import annotations

from planner.technique import Knob, Technique

TECHNIQUE = Technique(
    key="gpipe",
    name="GPipe",
    slot="schedule",
    choices=("gpipe",),
    source="arXiv:1811.06965",
    summary="All forwards, then all backwards",
    knobs=(Knob("schedule", "order of forwards and backwards", ("1f1b", "gpipe", "interleaved"), "1f1b"),),
    order="gpipe",
    active=lambda ctx: ctx.mesh.pp > 1,
)
