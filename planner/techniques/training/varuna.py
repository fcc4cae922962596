"""Varuna: a job on spot instances goes on with the replicas that can be formed of the devices that are left.

What it does: when devices are taken away or come back, the same global batch is dealt to as many whole pipelines as there are
    devices for; ``planner goodput --recovery elastic --replace TIME``.
Saves: the wait for another device.
Costs: a restart whenever the number of devices changes; a pipeline's worth of devices is idle where one is missing.
Assumes: devices are lost independently; micro-batches are dealt evenly to any number of replicas. Its order of work, which puts
    recomputation into the wait for gradients, is not modelled: the recomputation here belongs to the backward.
Source: Athlur et al. 2022 (Varuna, arXiv:2111.04007) §4; microsoft/varuna ``varuna/auto_config.py``.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.costs.reliability import whole_replicas
from planner.technique import Figure, Technique


def _formed(subject: Callable[[int, int, float], float]) -> float:
    """Replicas of 4 devices that 16 devices with one away form: the mean over whether it is, taken apart."""
    away = 1e-6  # so rare that two are never away at once
    short = 1.0 - subject(4, 4, away)
    return 4.0 - short / (16 * away) * 4.0


TECHNIQUE = Technique(
    key="varuna",
    name="Varuna (morphing on spot instances)",
    slot=None,
    kind="objective",
    source="arXiv:2111.04007",
    summary="Goes on with the replicas that can be formed",
    figures=(
        Figure(
            "replicas of 4 stages that 15 devices form: devices over stages, rounded down",
            3.0,
            1e-3,
            "Athlur et al. 2022 (arXiv:2111.04007), section 4; microsoft/varuna varuna/auto_config.py: num_gpus // pp_size",
            _formed,
        ),
    ),
    compose=whole_replicas,
)
