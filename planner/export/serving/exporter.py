"""What a serving exporter is: files that start a plan's pools, with an engine alone or with a layer above engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from planner.errors import Problem
from planner.export.serving.engine import Engine
from planner.export.serving.target import ServingTarget

__all__ = ["RESOURCES", "ServingExporter", "in_pods", "resource_of"]

RESOURCES = {"NVIDIA": "nvidia.com/gpu", "AMD": "amd.com/gpu", "Intel": "habana.ai/gaudi"}
"""Resource names of the vendors' device plugins for Kubernetes."""


@dataclass(frozen=True, slots=True)
class ServingExporter:
    """One way to start the pools of a plan.

    Attributes:
        name: as ``--to`` takes it.
        title: its own name.
        versions: versions that its files are written for; the first is taken unless another is asked for.
        checked: how that was checked, in words.
        engine: which engine it starts for a plan.
        write: files by name, from a plan that keeps the rules, its engine, the container image, and the version.
        rules: what it cannot express beyond its engine's rules.
        start: how to start it, one line of Markdown each.
        around: batch systems that it can be started under; keys of :data:`planner.export.serving.around.AROUND`.
        first: what to check before it is started, one sentence each.
    """

    name: str
    title: str
    versions: tuple[str, ...]
    checked: str
    engine: Callable[[ServingTarget], Engine]
    write: Callable[[ServingTarget, Engine, str, str], Mapping[str, str]]
    start: Callable[[ServingTarget], list[str]]
    rules: Callable[[ServingTarget], Iterator[Problem]] = lambda target: iter(())
    around: tuple[str, ...] = ()
    first: Callable[[ServingTarget], list[str]] = lambda target: []


def resource_of(target: ServingTarget, where: str) -> Problem | str:
    """The resource that pods ask for; a problem where no device plugin is known."""
    vendor = target.clusters[0].device.vendor
    if vendor not in RESOURCES:
        return Problem(
            where, f"no device plugin is known for devices of {vendor}", f"devices of {', '.join(RESOURCES)}"
        )
    return RESOURCES[vendor]


def in_pods(target: ServingTarget, where: str) -> Iterator[Problem]:
    """What keeps pods that fetch a checkpoint by themselves from running the plan."""
    found = resource_of(target, where)
    if isinstance(found, Problem):
        yield found
    if not target.checkpoint:
        yield Problem(
            where,
            f"which checkpoint {target.plan.model} is, is not known",
            "a model that names its config.json, or a hub id",
        )
