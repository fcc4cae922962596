"""Plans as files that a launcher runs: one module per launcher.

>>> from planner.export import EXPORTERS
>>> sorted(EXPORTERS)
['megatron', 'torchrun']
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from planner.errors import Problem, SpecError, did_you_mean
from planner.export.megatron import export_megatron
from planner.export.torchrun import export_torchrun
from planner.plan import Plan

__all__ = ["EXPORTERS", "export"]

EXPORTERS: Mapping[str, Callable[..., dict[str, str]]] = {
    "megatron": export_megatron,
    "torchrun": export_torchrun,
}
"""Exporters by the name that ``--to`` takes."""


def export(plan: Plan, to: str, **options: Any) -> dict[str, str]:
    """Files (name → content) that run the plan under a launcher.

    Args:
        plan: the plan.
        to: a key of :data:`EXPORTERS`.
        options: the exporter's own; all take ``model`` and ``cluster`` where the plan's names do not lead to them, and
            ``script``, the training script.

    Raises:
        ExportError: the launcher cannot express the plan; names every feature.
        SpecError: no such exporter, or the plan's model or cluster cannot be found.
    """
    if to not in EXPORTERS:
        raise SpecError(
            Problem("--to", repr(to), f"one of {', '.join(sorted(EXPORTERS))}", did_you_mean(to, EXPORTERS))
        )
    return EXPORTERS[to](plan, **options)
