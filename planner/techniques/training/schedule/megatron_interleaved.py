"""Interleaved 1F1B: every device holds several smaller virtual stages.

What it does: device r holds chunks r, r+p, …; micro-batches visit every device v times.
Saves: the bubble, divided by v.
Costs: messages × v; activations of p·v+p−1−2r chunks on device r instead of (p−r)·v.
Assumes: micro-batches divisible by pp; messages between stages are latency on the edge, not work on the device.
Source: Narayanan et al. 2021 (arXiv:2104.04473) §2.2.2.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.technique import Check, Context, Knob, Technique


def valid(ctx: Context) -> Iterable[Check]:
    """Whole groups of pp micro-batches."""
    yield Check("micro-batches not divisible by pp (interleaved)", ctx.micro_batches % ctx.mesh.pp == 0)


TECHNIQUE = Technique(
    key="megatron_interleaved",
    name="Interleaved 1F1B",
    slot="schedule",
    choices=("interleaved",),
    source="arXiv:2104.04473",
    summary="Several virtual stages per device",
    knobs=(Knob("virtual_stages", "model chunks per device"),),
    valid=valid,
    order="interleaved",
    active=lambda ctx: ctx.mesh.pp > 1,
)
