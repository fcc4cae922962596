"""MixPipe: Chimera's two pipelines with more micro-batches under way than stages.

What it does: as Chimera, two copies of the model run down and up through the same devices; K micro-batches, here three halves of
    the stages, may be under way in a device's chunks. A device runs what is ready, backwards first.
Saves: the gaps between Chimera's units, for half of the memory that forward doubling takes to close them.
Costs: as Chimera; activations of up to K micro-batches.
Assumes: backwards take twice the time of forwards where the order is made. The authors mix one and two forwards per backward by a
    rule that is not public; what is ready first stands for it. An even number of devices and micro-batches.
Source: Zhang et al. 2023 (MixPipe, DAC 2023), abstract; placement: Li, Hoefler 2021 (arXiv:2107.06925) §3.1.
"""

from __future__ import annotations

import numpy as np

from planner.schedule.order import Generator, Shape
from planner.technique import Figure, Technique
from planner.techniques import figures
from planner.techniques.training.schedule.bidirectional import (
    BIDIRECTIONAL,
    EVEN_DEVICES,
    EVEN_MICRO_BATCHES,
    sum_copies,
)
from planner.techniques.training.schedule.greedy import Greedy
from planner.techniques.training.schedule.rules import accepts


def _injected(shape: Shape, device: int) -> int:
    """Micro-batches that a device may hold: halfway between Chimera's and those of forward doubling."""
    return 3 * shape.p // 2


_READY = Greedy(_injected, (1.0, 2.0, 0.0), BIDIRECTIONAL)
ORDER = Generator(
    "mixpipe", _READY.device_ops, lambda shape: 0, rules=(EVEN_DEVICES, EVEN_MICRO_BATCHES), chunks=lambda most: (2,),
    placement=BIDIRECTIONAL, saturates=lambda p, v, m: np.minimum(m, 8 * p),
)  # fmt: skip

TECHNIQUE = Technique(
    key="mixpipe",
    name="MixPipe",
    slot="schedule",
    choices=("mixpipe",),
    source="DAC 2023 (Zhang et al.)",
    summary="Two pipelines in opposite directions, with more micro-batches under way than stages",
    figures=(
        Figure(
            "slots of as many micro-batches as stages, D = 8, T_B = 2T_F, which K does not change",
            36.0,
            1e-9,
            "github.com/Shigangli/Chimera @6b78ac7, chimera_pipeline_rank.py: its orders played; both place alike",
            lambda order: figures.makespan_s(order, 8, 8, 2),
        ),
    ),
    valid=accepts(ORDER, copies=True),
    apply=sum_copies,
    order=ORDER,
    searched=False,
    active=lambda ctx: ctx.mesh.pp > 1,
)
