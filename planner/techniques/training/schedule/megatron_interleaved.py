"""Interleaved 1F1B: every device holds several smaller virtual stages.

What it does: device r holds chunks r, r+p, …; micro-batches visit every device v times. A chunk runs pp micro-batches before
    the device turns to its next chunk; where these do not divide the micro-batches, as few more as leave no rest below pp.
Saves: the bubble, divided by v.
Costs: messages × v; activations of p·v+p−1−2r chunks on device r instead of (p−r)·v.
Assumes: at least pp micro-batches; messages between stages are latency on the edge, not work on the device.
Source: Narayanan et al. 2021 (arXiv:2104.04473) §2.2.2; activations: Korthikanti et al. 2022 (arXiv:2205.05198) §4.2.3; groups:
    Megatron-Core ``--microbatch-group-size-per-virtual-pipeline-stage``.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.technique import Check, Context, Figure, Knob, Technique
from planner.techniques import figures


def valid(ctx: Context) -> Iterable[Check]:
    """A group of at least pp micro-batches."""
    yield Check("fewer micro-batches than pp (interleaved)", ctx.micro_batches >= ctx.mesh.pp)


TECHNIQUE = Technique(
    key="megatron_interleaved",
    name="Interleaved 1F1B",
    slot="schedule",
    choices=("interleaved",),
    source="arXiv:2104.04473",
    summary="Several virtual stages per device",
    knobs=(Knob("virtual_stages", "model chunks per device"),),
    figures=(
        Figure(
            "bubble relative to the ideal step, p = 8, m = 32, v = 2: (p − 1)/(v·m)",
            7 / 64,
            1e-9,
            "Narayanan et al. 2021 (arXiv:2104.04473), section 2.2.2",
            lambda order: figures.bubble_s(order, 8, 32, 2) / (32 * 3.0),
        ),
        Figure(
            "activations of the first device, relative to p stages of 1F1B, p = 8, v = 3: 1 + (p − 1)/(p·v)",
            1 + 7 / 24,
            1e-9,
            "Korthikanti et al. 2022 (arXiv:2205.05198), section 4.2.3",
            lambda order: figures.in_flight(order, 8, 32, 3) / (8 * 3),
        ),
    ),
    valid=valid,
    order="interleaved",
    active=lambda ctx: ctx.mesh.pp > 1,
)
