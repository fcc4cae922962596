"""Hanayo: stages are dealt to devices in waves, forth and back, so that a micro-batch turns round without leaving the device.

What it does: w waves cut the model into 2wp stages; device r holds, of each wave, stages r and 2p−1−r. p micro-batches
    make a unit, in which a device runs what is ready, backwards first; more micro-batches are more units, merged where
    one ends and the next begins.
Saves: the bubble of a unit, about w-fold, with one copy of the weights; p micro-batches of activations.
Costs: 2w messages per micro-batch and direction, where 1F1B sends one; every unit idles as the first one does.
Assumes: backwards take twice the time of forwards where both are ready; messages between stages are latency on the edge.
Source: Liu et al. 2023 (arXiv:2308.15762) §3.
"""

from __future__ import annotations

from functools import lru_cache

from planner.schedule.order import DeviceOps, Generator, Placement, Shape
from planner.technique import Figure, Technique
from planner.techniques import figures
from planner.techniques.training.schedule.greedy import Greedy
from planner.techniques.training.schedule.units import Timed, merged

_SECONDS = (1.0, 2.0, 0.0)
_WAVES = Greedy(lambda shape, device: shape.p * shape.v, _SECONDS, Placement(folded=True))


@lru_cache(maxsize=64)
def _unit(p: int, v: int) -> list[list[Timed]]:
    board = _WAVES.played(Shape(p, p, v, p))
    starts = {move: end - _SECONDS[move[0]] for move, end in board.end_s.items()}
    return [[(starts[move], *move) for move in ran] for ran in board.ran]


def _device_ops(shape: Shape, device: int) -> DeviceOps:
    work = shape.p * shape.v * sum(_SECONDS)
    return merged(_unit(shape.p, shape.v)[device], shape.p, work, shape.m)


ORDER = Generator(
    "hanayo", _device_ops, lambda shape: 2 * shape.p * shape.v, chunks=lambda most: range(2, most + 1, 2),
    placement=Placement(folded=True),
)  # fmt: skip

_ELF = "github.com/topal-team/elf @e53e281, elf/scheduling/schedulers.py: the orders of generate_hanayo_schedule, played"

TECHNIQUE = Technique(
    key="hanayo",
    name="Hanayo",
    slot="schedule",
    choices=("hanayo",),
    source="arXiv:2308.15762",
    summary="Stages in waves; virtual_stages = twice the waves",
    figures=(
        Figure(
            "slots of a stage, 8 devices, 8 micro-batches, 1 wave, T_B = 2T_F",
            76.0,
            1e-9,
            _ELF,
            lambda order: 2 * figures.makespan_s(order, 8, 8, 2),
        ),
        Figure(
            "slots of a stage, 8 devices, 8 micro-batches, 4 waves, T_B = 2T_F",
            220.0,
            0.01,
            _ELF,
            lambda order: 8 * figures.makespan_s(order, 8, 8, 8),
        ),
    ),
    order=ORDER,
    searched=False,
    active=lambda ctx: ctx.mesh.pp > 1,
)
