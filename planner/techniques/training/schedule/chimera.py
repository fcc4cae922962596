"""Chimera: two pipelines through the same devices, one down and one up, each with half of the micro-batches.

What it does: device r holds stages r and p−1−r, of two copies of the model. p micro-batches make a unit, in which
    forwards and backwards of both directions never meet on a device; more micro-batches are more units, merged where one
    ends and the next begins. Where backwards take twice the time of forwards, gaps stay between units:
    ``chimera_doubling`` runs two micro-batches wherever ``chimera`` runs one, so that they close.
Saves: the bubble: p−2 slots of a forward where both take as long, 2(p−2) forwards of the first unit where backwards take
    twice as long; 1F1B idles for p−1 forwards and backwards. Activations are even: p/2+1 to p micro-batches.
Costs: weights, gradients and states twice; an all-reduce of gradients between the copies; with doubling, activations
    twice.
Assumes: every copy updates itself; an even number of devices and micro-batches; messages between stages are latency on
    the edge. The authors' runtime doubles forwards alone, two before each backward: as fast, as much on the fullest device,
    and more on the first (13 micro-batches in place of 10 where p is 8).
Source: Li, Hoefler 2021 (arXiv:2107.06925) §3.1–3.5, Table 2; their runtime, github.com/Shigangli/Chimera.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from planner.schedule.order import DeviceOps, Generator, Op, Shape
from planner.technique import Figure, Technique
from planner.techniques import figures
from planner.techniques.training.schedule.bidirectional import (
    BIDIRECTIONAL,
    EVEN_DEVICES,
    EVEN_MICRO_BATCHES,
    sum_copies,
)
from planner.techniques.training.schedule.rules import accepts
from planner.techniques.training.schedule.units import merged


def _device_ops(shape: Shape, device: int, together: int) -> DeviceOps:
    unit = [
        (slot, op, stage, 2 * (together * j + i) + up)
        for slot, op, stage, j, up in _slots(shape.p, device)
        for i in range(together)
    ]
    return merged(unit, together * shape.p, 2 * shape.p, shape.m)


def _slots(p: int, device: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(slot, operation, stage, number within its direction, direction) of one unit, every operation one slot long."""
    for up in (0, 1):
        depth = p - 1 - device if up else device
        for j in range(p // 2):
            yield depth + 2 * j, int(Op.F), up * p + depth, j, up
            yield 2 * p - 1 - depth + 2 * j, int(Op.B), up * p + depth, j, up


def _generator(name: str, together: int) -> Generator:
    return Generator(
        name, partial(_device_ops, together=together), lambda shape: 2 * together * shape.p,
        rules=(EVEN_DEVICES, EVEN_MICRO_BATCHES), chunks=lambda most: (2,), placement=BIDIRECTIONAL,
    )  # fmt: skip


_RUNTIME = "the authors' runtime (github.com/Shigangli/Chimera, chimera/chimera_bert/bert)"

CONCATENATED, DOUBLED = _generator("chimera", 1), _generator("chimera_doubling", 2)

TECHNIQUES = (
    Technique(
        key="chimera",
        name="Chimera",
        slot="schedule",
        choices=("chimera",),
        source="arXiv:2107.06925",
        summary="Two pipelines in opposite directions, with two copies of the weights",
        figures=(
            Figure(
                "slots of 8 stages and 16 micro-batches, T_B = T_F",
                38.0,
                1e-9,
                "github.com/Shigangli/Chimera @6b78ac7, chimera_pipeline_rank.py: rows of get_schedule, 8, 2, 16, with work",
                lambda order: figures.makespan_s(order, 8, 16, 2, 1.0, 1.0),
            ),
            Figure(
                "micro-batches held by the first device, D = 8: D/2 + 1",
                5.0,
                1e-9,
                f"{_RUNTIME}, main_with_runtime_direct.py: the order of rank 0",
                lambda order: figures.in_flight(order, 8, 16, 2),
            ),
        ),
        valid=accepts(CONCATENATED, copies=True),
        apply=sum_copies,
        order=CONCATENATED,
        searched=False,
        active=lambda ctx: ctx.mesh.pp > 1,
    ),
    Technique(
        key="chimera_doubling",
        name="Chimera with forward doubling",
        slot="schedule",
        choices=("chimera_doubling",),
        source="arXiv:2107.06925",
        summary="Chimera without gaps between its units, for twice the activations",
        figures=(
            Figure(
                "micro-batches held by the fullest device, D = 8: 2D",
                16.0,
                1e-9,
                f"{_RUNTIME}, main_with_runtime_forward_doubling.py: the order of rank D/2 − 1",
                lambda order: figures.in_flight(order, 8, 32, 2, None),
            ),
        ),
        valid=accepts(DOUBLED, copies=True),
        apply=sum_copies,
        order=DOUBLED,
        searched=False,
        active=lambda ctx: ctx.mesh.pp > 1,
    ),
)
