"""How far serving predictions may be off at a source that no constant has seen: the intervals of a serving estimate.

``serving_residuals.json`` is written by ``benchmarks/fit_serving.py --residuals``, never by hand: spreads of measured over
predicted within sources, by kind of run, and between sources, by how requests come and what is new
(``planner/validation/serving_spreads.py``). Every deployment is a new source.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import exp, hypot
from pathlib import Path
from typing import NamedTuple

from planner.specs.device import Device
from planner.specs.reader import Reader, read_file
from planner.specs.stack import Stack

__all__ = ["FILE", "LOADS", "NOVELTIES", "QUANTITIES", "kind_of", "novelty_of", "serving_interval"]

FILE = Path(__file__).with_name("serving_residuals.json")
QUANTITIES = ("tpot_s", "ttft_s", "output_tokens_per_s_per_device")
LOADS = ("closed", "open")
"""How requests come, the better known first: from clients that wait for their answers, or as one batch; or whenever they do,
which may be all at once."""
NOVELTIES = ("source", "engine", "device")
"""What is new of a job, the least first: who runs it; besides, the engine on such a device; besides, the device's kernels."""


class _Spread(NamedTuple):
    """Half-widths in logarithms: ``between`` sources by load and what is new, and ``within`` them by kind of run."""

    between: Mapping[str, Mapping[str, float]]
    within: Mapping[str, float]


def kind_of(*, experts: bool, pools: bool) -> str:
    """Runs whose errors are alike: ``pools``, else ``with experts`` or ``dense``."""
    return "pools" if pools else "with experts" if experts else "dense"


def novelty_of(stack: Stack, device: Device) -> str:
    """What is new of an engine on a device: were constants fitted to its runs there, else, were the device's kernels measured?"""
    if stack.serving is not None and device.generation in stack.serving.on:
        return "source"
    return "device" if device.efficiency.matmul.kind == "assumed" else "engine"


def serving_interval(
    experts: bool, pools: bool, load: str, novelty: str, predicted: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """What holds 80 % of measurements, by quantity, in the unit of the prediction: ``predicted · exp(±√(within² + between²))``.

    Args:
        experts: whether the model has any.
        pools: whether prompts and generation have pools of their own.
        load: one of :data:`LOADS`.
        novelty: one of :data:`NOVELTIES`.
        predicted: means of quantities among :data:`QUANTITIES`; others are left out.

    Raises:
        SpecError: the shipped residuals are wrong.

    >>> low, high = serving_interval(False, False, "closed", "source", {"tpot_s": 0.01})["tpot_s"]
    >>> low < 0.01 < high
    True
    """
    found = {}
    for quantity, value in predicted.items():
        if quantity in QUANTITIES:
            between, within = _residuals()[quantity]
            # No rate of pools was published: it is what their tokens' times say, as elsewhere.
            kind = next(k for p in (pools, False) if (k := kind_of(experts=experts, pools=p)) in within)
            factor = exp(hypot(between[load][novelty], within[kind]))
            found[quantity] = (value / factor, value * factor)
    return found


@cache
def _residuals() -> Mapping[str, _Spread]:
    reader = Reader(read_file(FILE), str(FILE))
    reader.text("about")
    found = {}
    for quantity in QUANTITIES:
        entry: Reader = reader.table(quantity)
        within: Reader = entry.table("within")
        between: Reader = entry.table("between")
        kinds = within.keys()
        found[quantity] = _Spread(
            {load: _by_novelty(between.table(load)) for load in LOADS},
            {kind: within.number(kind, positive=True) for kind in kinds},
        )
        entry.ignore("rows", "sources")
        for part in (within, between, entry):
            part.finish()
    reader.finish()
    reader.raise_if_any()
    return found


def _by_novelty(reader: Reader) -> Mapping[str, float]:
    found = {novelty: reader.number(novelty) for novelty in NOVELTIES}
    reader.finish()
    return found
