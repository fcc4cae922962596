"""DynaPipe: sequences of unlike lengths are cut into micro-batches so that padding and bubble together cost least.

What it does: sorts a step's sequences, and cuts them where Σ t + (p − 1)·max t is least; ``planner solve micro-batches``.
Saves: padding to the longest sequence of a step, without micro-batches so many that kernels are small.
Costs: micro-batches of unlike shapes.
Assumes: the pipeline's fill is that of its longest micro-batch; sequences of a micro-batch are padded to its longest.
Source: Jiang et al. 2024 (DynaPipe, EuroSys 2024, arXiv:2311.10418) §4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from planner.technique import Figure, Technique
from planner.techniques.solvers import solver

_STAGES, _MICRO_BATCHES = 4, 8


def _together(
    lengths: Sequence[int],
    seconds: Callable[[int, int], float],
    fits: Callable[[int, int], bool],
    stages: int,
) -> float:
    """All sequences as one micro-batch."""
    return seconds(len(lengths), max(lengths)) * stages


def _step(subject: Any) -> float:
    """Units that a pipeline of four stages takes for eight sequences of one unit each."""
    return float(
        subject([1] * _MICRO_BATCHES, lambda n, length: float(n * length), lambda n, length: True, _STAGES)
    )


TECHNIQUE = Technique(
    key="dynapipe",
    name="DynaPipe (micro-batches by length)",
    slot=None,
    kind="solver",
    source="arXiv:2311.10418",
    summary="Sequences of a step to micro-batches of a pipeline",
    figures=(
        Figure(
            "units of 8 equal micro-batches on 4 stages: m + p − 1",
            11.0,
            1e-9,
            "Narayanan et al. 2021 (arXiv:2104.04473), section 2.2.1: m·t of ideal time and (p − 1)·t of bubble",
            _step,
        ),
    ),
    solve=solver("sequences.micro_batches", "time_s"),
    naive=_together,
)
