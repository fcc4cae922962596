"""Plans as files that a launcher runs: one module per launcher.

>>> from planner.export import EXPORTERS
>>> sorted(EXPORTERS)
['accelerate', 'deepspeed', 'galvatron', 'megatron', 'megatron-bridge', 'torchrun', 'torchtitan', 'transformers']
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.export.exporter import Exporter
    from planner.plans.plan import Plan
    from planner.specs.cluster import Cluster
    from planner.specs.model import Model

__all__ = ["EXPORTERS", "export", "export_folder", "find_exporter", "known_version"]

EXPORTERS: Mapping[str, str] = {
    "accelerate": "planner.export.accelerate",
    "deepspeed": "planner.export.deepspeed",
    "galvatron": "planner.export.galvatron",
    "megatron": "planner.export.megatron",
    "megatron-bridge": "planner.export.megatron_bridge",
    "torchrun": "planner.export.torchrun",
    "torchtitan": "planner.export.torchtitan",
    "transformers": "planner.export.trainer",
}
"""Modules of the exporters by the name that ``--to`` takes."""


def find_exporter(to: str, version: str | None = None) -> Exporter:
    """The exporter of that name; with ``version``, for that version of the launcher.

    Raises:
        SpecError: there is no such exporter, or its files are not written for the version.
    """
    from dataclasses import replace
    from importlib import import_module

    from planner.errors import Problem, SpecError, did_you_mean

    if to not in EXPORTERS:
        raise SpecError(
            Problem("--to", repr(to), f"one of {', '.join(EXPORTERS)}", did_you_mean(to, EXPORTERS))
        )
    found: Exporter = import_module(EXPORTERS[to]).EXPORTER
    return replace(found, versions=(known_version(version, found.versions),)) if version else found


def known_version(version: str | None, versions: Sequence[str]) -> str:
    """The version to write for: the first known one unless another is asked for.

    Raises:
        SpecError: files are not written for that version.
    """
    from planner.errors import Problem, SpecError

    if version is None:
        return versions[0]
    if not any(version == known or version.startswith(f"{known}.") for known in versions):
        expected = f"{' or '.join(versions)}: files of others are not known to be right"
        raise SpecError(Problem("--launcher-version", repr(version), expected))
    return version


def export(
    plan: Plan,
    to: str,
    model: Model | None = None,
    cluster: Cluster | None = None,
    script: str | None = None,
    version: str | None = None,
) -> dict[str, str]:
    """The launcher's own files (name → content) that run the plan, and the plan.

    Args:
        plan: the plan.
        to: a key of :data:`EXPORTERS`.
        model: its model, where the plan's name does not lead to it.
        cluster: its cluster, likewise.
        script: the training script to start instead of the exporter's own.
        version: the launcher's version.

    Raises:
        ExportError: the launcher cannot express the plan; names every feature.
        SpecError: no such exporter or version, or the plan's model or cluster cannot be found.
    """
    import json

    from planner.errors import ExportError
    from planner.export.target import Target

    chosen = find_exporter(to, version)
    target = Target.of(plan, model, cluster)
    if chosen.launcher:
        from planner.export.launchers import launcher

        problems = target.refused(launcher(chosen.launcher))
        if problems:
            raise ExportError(problems)
    written = chosen.write(target, script or chosen.script)
    return {**written, "plan.json": json.dumps(plan.as_dict(), indent=2) + "\n"}


def export_folder(
    plan: Plan,
    to: str,
    model: Model | None = None,
    cluster: Cluster | None = None,
    script: str | None = None,
    version: str | None = None,
    around: Sequence[str] = (),
    image: str | None = None,
) -> dict[str, str]:
    """A runnable folder: :func:`export`'s files, a batch system's, a measuring script, and what to check first.

    Args:
        plan, to, model, cluster, script, version: as for :func:`export`.
        around: batch systems; keys of :data:`planner.export.folder.AROUND`.
        image: container image for those that need one.

    Raises:
        ExportError: the launcher or a batch system cannot run the plan.
        SpecError: as :func:`export`, or there is no such batch system.
    """
    from planner.errors import Problem, SpecError, did_you_mean
    from planner.export.folder import AROUND, NO_IMAGE, folder_files
    from planner.export.target import Target

    unknown = [
        Problem("--with", repr(name), f"one of {', '.join(AROUND)}", did_you_mean(name, AROUND))
        for name in around
        if name not in AROUND
    ]
    if unknown:
        raise SpecError(unknown)
    written = export(plan, to, model, cluster, script, version)
    target = Target.of(plan, model, cluster)
    return folder_files(target, find_exporter(to, version), written, tuple(around), image or NO_IMAGE)
