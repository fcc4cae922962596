"""Devices and clusters: what is shipped, what a profile says, and whether it is plausible."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.machine import detect, read
from planner.cli.options import Json

if TYPE_CHECKING:
    from planner.specs.cluster import Cluster
    from planner.specs.device import Device


def list_hardware(as_json: Json = False) -> None:
    """List the shipped devices and clusters."""
    from planner.cli.output import print_json
    from planner.specs.hardware import list_clusters, list_devices, load_cluster, load_device

    if as_json:
        print_json({"devices": list_devices(), "clusters": list_clusters()})
        return
    from planner.report.catalogue import show_hardware

    show_hardware(
        [load_device(name) for name in list_devices()], [load_cluster(name) for name in list_clusters()]
    )


def show(
    name: Annotated[
        str, typer.Argument(help="A device, a cluster, NAME:NODESxDEVICES_PER_NODE, or a .toml file.")
    ],
    as_json: Json = False,
) -> None:
    """Show a device or a cluster.

    Every number of a device comes with its kind and source; a cluster with its network tiers.
    """
    from planner.cli.output import print_json
    from planner.specs.cluster import Cluster

    found = _load(name)
    if as_json:
        print_json(
            {"cluster": _cluster_fields(found)} if isinstance(found, Cluster) else {"device": _fields(found)}
        )
    elif isinstance(found, Cluster):
        from planner.report.catalogue import show_cluster

        show_cluster(found)
    else:
        from planner.report.catalogue import show_device

        show_device(found, dict(_numbers(found)))


def check(
    files: Annotated[
        list[str] | None, typer.Argument(help="Device profiles; all shipped data if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that profiles are plausible.

    Numbers have to agree with each other and with physics, and each needs a source.
    """
    from planner.cli.output import print_json
    from planner.errors import SpecError
    from planner.specs.hardware import check_hardware

    problems = check_hardware(files or None)
    if problems:
        raise SpecError(problems)
    if as_json:
        print_json({"problems": []})
    else:
        print(
            f"{', '.join(files) if files else 'all shipped profiles'}: nothing implausible, every number has a source"
        )


VERBS = {"list": list_hardware, "show": show, "check": check, "import": read, "detect": detect}


def _load(name: str) -> Device | Cluster:
    """A device where the name is one, else a cluster."""
    from planner.errors import Problem, SpecError, did_you_mean
    from planner.specs.device_file import aliases, find_device
    from planner.specs.hardware import list_clusters, list_devices, load_cluster, load_device
    from planner.specs.reader import read_file

    if find_device(name) is not None:
        return load_device(name)
    if name.endswith(".toml"):
        is_cluster = {"group", "tier"} & read_file(name).keys()
        return load_cluster(name) if is_cluster else load_device(name)
    known = list_clusters()
    if not set(":+/") & set(name) and name.lower() not in known:
        names = [*aliases("devices"), *list_devices(), *known]
        hint = did_you_mean(name.lower(), names) or "planner hardware list shows them all."
        raise SpecError(Problem("NAME", f"unknown device or cluster {name[:40]!r}", "a shipped name", hint))
    return load_cluster(name)


def _numbers(device: Any, prefix: str = "") -> Any:
    """Every sourced number by its path."""
    from planner.specs.device import Sourced

    for field in fields(device):
        value = getattr(device, field.name)
        if isinstance(value, Sourced):
            yield prefix + field.name, _fields(value)
        elif field.name == "peak_flop_per_s":
            yield from ((f"{prefix}{field.name}.{dtype}", _fields(rate)) for dtype, rate in value.items())
        elif hasattr(value, "__dataclass_fields__"):
            yield from _numbers(value, f"{prefix}{field.name}.")


def _fields(described: Any) -> dict[str, Any]:
    """Its fields, without the spread of numbers that no fit gave."""
    return asdict(
        described, dict_factory=lambda pairs: {k: v for k, v in pairs if (k, v) != ("spread", None)}
    )


def _cluster_fields(cluster: Cluster) -> dict[str, Any]:
    """The cluster as JSON fields, its devices by name."""
    groups = [
        {"device": group.device.name, "nodes": group.nodes, "devices_per_node": group.devices_per_node}
        for group in cluster.groups
    ]
    plain = {f.name: getattr(cluster, f.name) for f in fields(cluster) if f.name not in ("groups", "tiers")}
    tiers = [asdict(tier) | {"effective_bytes_per_s": tier.effective_bytes_per_s} for tier in cluster.tiers]
    return {**plain, "devices": cluster.devices, "groups": groups, "tiers": tiers}
