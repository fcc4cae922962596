"""Bamboo: every stage of a pipeline is held by two devices, so that the loss of one undoes no work.

What it does: a device holds the weights of its successor's stage too and runs its forward in the bubble; when the successor is
    lost, it runs all of it until another device is there; ``planner goodput --recovery redundant --replace TIME``.
Saves: restarts: only two neighbours that are away at once undo work.
Costs: weights of a second stage; forward work that the bubble does not hold; a pipeline whose slowest device does the work of
    two.
Assumes: devices are lost independently; the states of the second stage rest on the host, as Bamboo has them.
Source: Thorpe et al. 2023 (Bamboo, NSDI 2023, arXiv:2204.12013) §5.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.costs.reliability import adjacent_mtbf_s
from planner.technique import Figure, Technique

_DEVICES, _MTBF_S, _REPLACE_S = 64, 86400.0, 60.0


def _fatal(subject: Callable[[float, float, float], float]) -> float:
    """Of the losses within the time that a device is away, the share that hits a neighbour, times the devices."""
    between = subject(_MTBF_S, _DEVICES, _REPLACE_S)
    losses_meanwhile = _DEVICES / _MTBF_S * _REPLACE_S
    return _DEVICES * (_MTBF_S / _DEVICES) / between / losses_meanwhile if between else 0.0


TECHNIQUE = Technique(
    key="bamboo",
    name="Bamboo (redundant stages)",
    slot=None,
    kind="objective",
    source="arXiv:2204.12013",
    summary="Neighbours in the pipeline hold each other's stage",
    figures=(
        Figure(
            "devices whose loss is fatal while one is away: its two neighbours in the pipeline",
            2.0,
            1e-9,
            "Thorpe et al. 2023 (arXiv:2204.12013), abstract and section 5: each node also runs the layers of its neighbour",
            _fatal,
        ),
    ),
    compose=adjacent_mtbf_s,
)
