"""Clusters: from a short spec such as ``h100-sxm:8x8``, the name of a shipped machine, or a TOML file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from planner.errors import Problem, SpecError, did_you_mean
from planner.specs.cluster import Cluster, NodeGroup, Tier
from planner.specs.device import Device
from planner.specs.device_file import TOPOLOGIES, aliases, find_device, list_devices, load_device
from planner.specs.library import canonical, hardware_folder, resolve
from planner.specs.links import read_transport
from planner.specs.reader import Reader, read_file
from planner.specs.sourced import read_optional, read_sourced
from planner.specs.tiers import Network, build_tiers, check_nesting, inside

__all__ = ["MAX_DEVICES", "build_cluster", "list_clusters", "load_cluster"]

MAX_DEVICES = 10_000_000
_GROUP = re.compile(r"([^:+]+):([0-9]+)x([0-9]+)", re.IGNORECASE)
_FULL_BISECTION = "1 (full bisection) or more"
_MOST = f"at most {MAX_DEVICES:,} devices"
_FORM = "NAME:NODESxDEVICES_PER_NODE, such as h100-sxm:8x8, joined by + where there are several kinds"


def list_clusters() -> list[str]:
    """Names of the shipped clusters, sorted; no file is read."""
    return sorted(path.stem for path in (hardware_folder() / "clusters").glob("*.toml"))


def load_cluster(spec: str | Path) -> Cluster:
    """The cluster that ``spec`` describes.

    ``spec`` is ``NAME:NODESxDEVICES_PER_NODE`` with the name (or profile file) of a device, several such
    groups joined by ``+``, the name of a shipped cluster (with ``:NODESxDEVICES_PER_NODE`` to resize one of a
    single group), or a ``.toml`` file.

    Raises:
        SpecError: the spec or the file is wrong (all problems at once).

    >>> [(tier.name, tier.size) for tier in load_cluster("h100-sxm:8x8").tiers]
    [('nvlink', 8), ('nic', 64)]
    >>> [(tier.name, tier.size) for tier in load_cluster("gb200-nvl72:36x4").tiers]
    [('nvlink', 72), ('nic', 144)]
    """
    text = str(spec)
    if text.endswith((".toml", ".json")):
        return _from_file(Path(text))
    name, _, counts = text.partition(":")
    shipped = _find_cluster(name) if "+" not in text and find_device(name) is None else None
    if shipped is None:
        return _from_spec(text)
    path = hardware_folder() / "clusters" / f"{shipped}.toml"
    return _from_file(path, _parsed([text])[0][1:] if counts else None)


def build_cluster(
    device: Device, nodes: int, devices_per_node: int, network: Network | None = None
) -> Cluster:
    """A cluster of equal nodes, which may hold more devices than the part is sold with.

    Args:
        device: the profile.
        nodes: how many nodes.
        devices_per_node: devices in one node.
        network: what is known about the scale-out network; the rest is the device profile's.

    Raises:
        SpecError: nodes cannot be dealt to equal scale-up domains.
    """
    group, name = NodeGroup(device, nodes, devices_per_node), f"{device.name}:{nodes}x{devices_per_node}"
    return _cluster(name, [group], build_tiers([group], network or Network(), f"cluster {name!r}"), {})


def _find_cluster(name: str) -> str | None:
    return resolve(name, list_clusters(), aliases("clusters"))


def _from_spec(text: str) -> Cluster:
    parsed = _parsed(text.split("+"))
    problems: list[Problem] = []
    groups: list[NodeGroup] = []
    for name, nodes, per_node in parsed:
        if not name.endswith(".toml") and find_device(name) is None:
            problems.append(_unknown(name))
            continue
        group = NodeGroup(load_device(name), nodes, per_node)
        problems += _size_problems(group, f"cluster {text!r}")
        groups.append(group)
    if problems:
        raise SpecError(problems)
    label = "+".join(map(_label, groups))
    return _with_parts(
        _cluster(label, groups, build_tiers(groups, Network(), f"cluster {text!r}"), {}), {}, Network()
    )


def _parsed(parts: Sequence[str]) -> list[tuple[str, int, int]]:
    """Name, nodes and devices per node of each group of a spec."""
    problems: list[Problem] = []
    found: list[tuple[str, int, int]] = []
    for part in parts:
        match = _GROUP.fullmatch(part.strip())
        if match is None:
            bare = find_device(part)
            hint = f"Try {bare}:1x{load_device(bare).devices_per_node}." if bare else ""
            problems.append(Problem("cluster", f"{part[:60]!r}", _FORM, hint))
            continue
        # The lengths come first: Python refuses to read a number of thousands of digits.
        if max(len(match[2]), len(match[3])) > 12 or int(match[2]) * int(match[3]) > MAX_DEVICES:
            problems.append(Problem("cluster", f"{part[:60]!r} is too large", _MOST))
        elif int(match[2]) * int(match[3]) == 0:
            problems.append(Problem("cluster", f"{part!r} has no devices", "one node of one device or more"))
        else:
            found.append((match[1], int(match[2]), int(match[3])))
    if not problems and sum(nodes * per_node for _, nodes, per_node in found) > MAX_DEVICES:
        problems.append(Problem("cluster", "the groups are too large together", _MOST))
    if problems:
        raise SpecError(problems)
    return found


def _unknown(name: str) -> Problem:
    if _find_cluster(name) is not None:
        return Problem("cluster", f"{name!r} is a cluster, and only devices are joined by +", "a device")
    known = [*list_devices(), *aliases("devices"), *list_clusters()]
    hint = did_you_mean(canonical(name), known)
    return Problem("cluster", f"unknown device {name!r}", "a shipped device, cluster or .toml file", hint)


def _size_problems(group: NodeGroup, where: str) -> list[Problem]:
    """A short spec knows only the node that the part is sold in; other nodes need a file with tiers."""
    most = group.device.devices_per_node
    if group.devices_per_node <= most:
        return []
    nodes = -(-group.devices // most)
    hint = f"Try {group.device.name}:{nodes}x{most}, or describe the node with [[tier]] in a file."
    found = f"{group.devices_per_node} devices per node"
    return [Problem(where, found, f"at most {most} per node of {group.device.name}", hint)]


def _from_file(path: Path, counts: tuple[int, ...] | None = None) -> Cluster:
    """The cluster in a file; ``counts`` replace nodes and devices per node of its only group."""
    reader = Reader(read_file(path), str(path))
    groups = [_group(row, path.parent) for row in reader.tables("group")]
    network, host = _network(reader.table("network", None)), _host(reader.table("host", None))
    rows = reader.tables("tier", [])
    tiers = [_explicit_tier(row) for row in rows]
    name, notes, source = reader.text("name", path.stem), reader.text("notes", ""), reader.text("source", "")
    if tiers and reader.has("network"):
        reader.problem("network", "tiers are listed as well", "either [network] or [[tier]]")
    if counts is not None and (len(groups) != 1 or tiers):
        found = f"cannot be resized to {counts[0]}x{counts[1]}"
        reader.problem("group", found, "a file of one group and no tiers")
    if not reader.problems and not groups:
        reader.problem("group", "is empty", "at least one [[group]]")
    reader.finish()
    reader.raise_if_any()
    if counts is not None:
        groups = [replace(groups[0], nodes=counts[0], devices_per_node=counts[1])]
        name = f"{name}:{counts[0]}x{counts[1]}"
    devices = sum(group.devices for group in groups)
    if devices > MAX_DEVICES:
        raise SpecError(Problem(str(path), f"{devices:,} devices", _MOST))
    if tiers:
        check_nesting(tiers, devices, str(path))
        whole = _with_parts(_cluster(name, groups, tuple(tiers), host), host, None)
        return replace(whole, notes=notes, source=source)
    if problems := [problem for group in groups for problem in _size_problems(group, str(path))]:
        raise SpecError(problems)
    built = build_tiers(groups, network, str(path))
    whole = _with_parts(_cluster(name, groups, built, host), host, network)
    return replace(whole, notes=notes, source=source)


def _group(reader: Reader, folder: Path) -> NodeGroup:
    name = reader.text("device")
    price = read_optional(reader, "usd_per_hour", maximum=1e4)
    nodes = reader.integer("nodes", maximum=MAX_DEVICES)
    per_node = reader.integer("devices_per_node", maximum=MAX_DEVICES)
    reader.finish()
    device = _group_device(reader, name, folder)
    if price is not None:
        device = replace(device, usd_per_hour=price)
    return NodeGroup(device, nodes, per_node)


def _group_device(reader: Reader, name: str, folder: Path) -> Device:
    try:
        return load_device(folder / name if name.endswith(".toml") else name)
    except SpecError as error:
        # Noted with the file's other problems, which are raised at its end; until then any device will do.
        where = f"{reader.where}: {reader.path}"
        reader.problems.extend(p._replace(where=f"{where}.{p.where}") for p in error.problems)
        return load_device(list_devices()[0])


def _network(reader: Reader | None) -> Network:
    if reader is None:
        return Network()
    rate = read_optional(reader, "nic_bytes_per_s")
    latency_s = read_optional(reader, "latency_s", maximum=1.0)
    efficiency = read_optional(reader, "efficiency", maximum=1.0)
    oversubscription = read_optional(reader, "spine_oversubscription", maximum=1e3)
    network = Network(
        nics_per_node=reader.integer("nics_per_node", None, maximum=1024),
        nic_bytes_per_s=None if rate is None else rate.value,
        latency_s=None if latency_s is None else latency_s.value,
        efficiency=None if efficiency is None else efficiency.value,
        nodes_per_leaf=reader.integer("nodes_per_leaf", None, maximum=MAX_DEVICES),
        spine_oversubscription=1.0 if oversubscription is None else oversubscription.value,
        source="" if rate is None else rate.source,
    )
    if network.nics_per_node is not None and rate is None:
        reader.problem("nics_per_node", "has no rate beside it", "nic_bytes_per_s, the rate of one NIC")
    if network.spine_oversubscription < 1:
        reader.problem("spine_oversubscription", f"{network.spine_oversubscription:g}", _FULL_BISECTION)
    if oversubscription is not None and network.nodes_per_leaf is None:
        reader.problem("spine_oversubscription", "there is no spine without leaves", "nodes_per_leaf")
    reader.finish()
    return network


_CXL = ("cxl_bytes", "cxl_bytes_per_s")


def _host(reader: Reader | None) -> dict[str, float]:
    """Overrides of the host: per node, but for the link, which is per device."""
    if reader is None:
        return {}
    keys = ("memory_bytes", "memory_bytes_per_s", "link_bytes_per_s", "nvme_bytes", "nvme_bytes_per_s", *_CXL)
    found = {key: number.value for key in keys if (number := read_optional(reader, key)) is not None}
    if len(missing := [key for key in _CXL if key not in found]) == 1:
        reader.problem(missing[0], "is not given", "both the size and the rate of CXL memory")
    reader.finish()
    return found


def _explicit_tier(reader: Reader) -> Tier:
    rate = read_sourced(reader, "bytes_per_s")
    efficiency = read_optional(reader, "efficiency", maximum=1.0)
    oversubscription = read_optional(reader, "oversubscription", maximum=1e3)
    tier = Tier(
        name=reader.text("name"),
        size=reader.integer("size", maximum=MAX_DEVICES),
        bytes_per_s=rate.value,
        latency_s=read_sourced(reader, "latency_s", maximum=1.0).value,
        topology=reader.text("topology", choices=TOPOLOGIES),
        efficiency=1.0 if efficiency is None else efficiency.value,
        oversubscription=1.0 if oversubscription is None else oversubscription.value,
        source=rate.source,
        transport=read_transport(reader),
    )
    if tier.oversubscription < 1:
        reader.problem("oversubscription", f"{tier.oversubscription:g}", _FULL_BISECTION)
    reader.finish()
    return tier


def _cluster(
    name: str, groups: Sequence[NodeGroup], tiers: tuple[Tier, ...], host: Mapping[str, float]
) -> Cluster:
    """The cluster with host resources per device: of a full node, unless ``host`` says otherwise."""

    def share(field: str, override: str) -> float:
        # In a mixed cluster the poorest node decides.
        return min(
            host[override] / group.devices_per_node
            if override in host
            else float(getattr(group.device, field)) / group.device.devices_per_node
            for group in groups
        )

    link = min(group.device.host_link_bytes_per_s.value for group in groups)
    most = max(group.devices_per_node for group in groups)
    return Cluster(
        name=name,
        groups=tuple(groups),
        tiers=tiers,
        host_memory_bytes=share("host_memory_bytes", "memory_bytes"),
        host_memory_bytes_per_s=share("host_memory_bytes_per_s", "memory_bytes_per_s"),
        host_link_bytes_per_s=host.get("link_bytes_per_s", link),
        nvme_bytes=share("nvme_bytes", "nvme_bytes"),
        nvme_bytes_per_s=share("nvme_bytes_per_s", "nvme_bytes_per_s"),
        cxl_bytes=host.get("cxl_bytes", 0.0) / most,
        cxl_bytes_per_s=host.get("cxl_bytes_per_s", 0.0) / most,
    )


def _with_parts(whole: Cluster, host: Mapping[str, float], network: Network | None) -> Cluster:
    """The cluster with each of its groups by itself, where it has several, and how they meet.

    ``network`` is what the tiers were built from; None where a file lists them.
    """
    groups = whole.groups
    if len(groups) == 1:
        return whole
    parts, links = [], []
    for group in groups:
        where = f"{whole.name}: {_label(group)}"
        alone = (
            inside(whole.tiers, group.devices, where)
            if network is None
            else build_tiers([group], network, where)
        )
        parts.append(_cluster(_label(group), [group], alone, host))
        meeting = [
            whole.tiers[-1] if network is None else build_tiers([group, other], network, where)[-1]
            for other in groups
        ]
        links.append(tuple(meeting))
    return replace(whole, parts=tuple(parts), links=tuple(links))


def _label(group: NodeGroup) -> str:
    return f"{group.device.name}:{group.nodes}x{group.devices_per_node}"
