"""Every launcher's abilities, by the name that ``--for`` takes.

Rules on states, recompute and schedule apply where the recipe names them.
"""

from __future__ import annotations

from collections.abc import Mapping

from planner.errors import Problem, SpecError, did_you_mean
from planner.export import (
    accelerate,
    deepspeed,
    fsdp_rules,
    galvatron,
    megatron_bridge,
    megatron_rules,
    torchtitan,
    trainer,
)
from planner.technique import Launcher

__all__ = ["CHOICES", "LAUNCHERS", "launcher"]

_MODULES = (
    accelerate,
    deepspeed,
    fsdp_rules,
    galvatron,
    megatron_bridge,
    megatron_rules,
    torchtitan,
    trainer,
)

LAUNCHERS: Mapping[str, Launcher] = {module.LAUNCHER.name: module.LAUNCHER for module in _MODULES}
CHOICES: Mapping[str, Mapping[str, str]] = {module.LAUNCHER.name: module.CHOICES for module in _MODULES}
"""Launcher → slot → values that it can express, between spaces."""


def launcher(name: str) -> Launcher:
    """The launcher of that name.

    Raises:
        SpecError: there is none.
    """
    if name not in LAUNCHERS:
        known = ", ".join(sorted(LAUNCHERS))
        raise SpecError(Problem("--for", repr(name), f"one of {known}", did_you_mean(name, LAUNCHERS)))
    return LAUNCHERS[name]
