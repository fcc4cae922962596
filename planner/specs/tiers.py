"""Builds a cluster's network tiers, innermost first, from its devices' links and the network around them.

Inside a node (or a rack that is one scale-up domain) the device profiles decide; beyond it, NICs join
everything in one tier, or in two where a leaf holds only some of the nodes. In a mixed cluster each tier runs
at its slowest member.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from planner.errors import Problem, SpecError
from planner.specs.cluster import NodeGroup, Tier
from planner.specs.device import ScaleUp

__all__ = ["Network", "build_tiers", "check_nesting", "inside"]


@dataclass(frozen=True, slots=True)
class Network:
    """What a cluster says about its scale-out network; ``None`` leaves the device profile's value.

    ``nic_bytes_per_s`` is per NIC and direction; ``nics_per_node`` serve a node (``None``: one per device).
    """

    nics_per_node: int | None = None
    nic_bytes_per_s: float | None = None
    latency_s: float | None = None
    efficiency: float | None = None
    nodes_per_leaf: int | None = None
    spine_oversubscription: float = 1.0
    source: str = ""


def build_tiers(groups: Sequence[NodeGroup], network: Network, where: str) -> tuple[Tier, ...]:
    """The tiers of these groups; the last spans all devices, and each size divides the next.

    Raises:
        SpecError: nodes cannot be dealt to equal domains, or a leaf cuts a scale-up domain.
    """
    inner = _slowest_ladder([_inside(group, where) for group in groups])
    devices = sum(group.devices for group in groups)
    outer = [] if inner and inner[-1].size == devices else _outside(groups, network, where)
    tiers = [tier for tier in (*inner, *outer) if tier.size > 1] or [_tier(groups[0].device.scale_up, 1)]
    check_nesting(tiers, devices, where)
    return tuple(tiers)


def check_nesting(tiers: Sequence[Tier], devices: int, where: str) -> None:
    """Raises a SpecError unless each tier's size divides the next, and the last holds all devices."""
    problems = [
        Problem(
            where,
            f"tier {outer.name!r} of {outer.size} devices after {inner.name!r} of {inner.size}",
            "sizes that grow and divide each other, innermost first",
        )
        for inner, outer in pairwise(tiers)
        if outer.size <= inner.size or outer.size % inner.size
    ]
    last = tiers[-1]
    if last.size != devices:
        problems.append(
            Problem(where, f"the last tier {last.name!r} holds {last.size} devices", f"all {devices}")
        )
    if problems:
        raise SpecError(problems)


def inside(tiers: Sequence[Tier], devices: int, where: str) -> tuple[Tier, ...]:
    """The tiers that some consecutive devices of a larger machine reach each other through.

    Raises:
        SpecError: the devices fill no whole number of a tier's domains.
    """
    smaller = [tier for tier in tiers if tier.size < devices]
    around = next(tier for tier in tiers if tier.size >= devices)
    found = (*smaller, replace(around, size=devices))
    check_nesting(found, devices, where)
    return found


def _inside(group: NodeGroup, where: str) -> list[Tier]:
    """The tiers of one group below its NICs."""
    device, per_node = group.device, group.devices_per_node
    up = device.scale_up
    if up.domain > device.devices_per_node:  # a domain of several nodes, such as an NVL72 rack or a TPU slice
        what = f"{up.kind} domains of {device.name}"
        nodes = _equal_share(group.nodes, max(up.domain // per_node, 1), what, where)
        return [_tier(up, nodes * per_node)]
    ladder = [_tier(up, _share_of_node(up.domain, per_node))]
    if ladder[0].size < per_node and device.within_node is not None:
        ladder.append(_tier(device.within_node, per_node))
    return ladder


def _share_of_node(domain: int, per_node: int) -> int:
    return per_node if domain >= per_node else math.gcd(domain, per_node)


def _equal_share(nodes: int, most: int, what: str, where: str) -> int:
    """Nodes per domain when ``nodes`` are dealt to the fewest equal domains of at most ``most`` nodes."""
    if nodes <= most:
        return nodes
    low = [k for k in range(1, math.isqrt(nodes) + 1) if nodes % k == 0]
    share = max(k for k in (*low, *(nodes // k for k in low)) if k <= most)
    if 2 * share < most:  # far from what the hardware would do
        whole = nodes - nodes % most
        found, hint = (
            f"{nodes} nodes do not divide into equal {what}",
            f"Try {whole} or {whole + most} nodes.",
        )
        raise SpecError(Problem(where, found, f"domains of {most} nodes or a little less", hint))
    return share


def _outside(groups: Sequence[NodeGroup], network: Network, where: str) -> list[Tier]:
    """One tier of NICs over everything, or a leaf and a spine."""
    devices = sum(group.devices for group in groups)
    fabric = _slowest(_nic(group, network, devices) for group in groups)
    per_node = math.gcd(*(group.devices_per_node for group in groups))
    if network.nodes_per_leaf is None or network.nodes_per_leaf * per_node >= devices:
        return [fabric]
    share = _equal_share(devices // per_node, network.nodes_per_leaf, "leaves", where)
    return [
        replace(fabric, name="leaf", size=share * per_node),
        replace(fabric, name="spine", oversubscription=network.spine_oversubscription),
    ]


def _nic(group: NodeGroup, network: Network, size: int) -> Tier:
    device = group.device
    rate, source = device.nic_bytes_per_s.value, device.nic_bytes_per_s.source
    if network.nic_bytes_per_s is not None:
        nics = network.nics_per_node or group.devices_per_node
        rate, source = network.nic_bytes_per_s * nics / group.devices_per_node, network.source
    return Tier(
        name="nic",
        size=size,
        bytes_per_s=rate,
        latency_s=device.nic_latency_s.value if network.latency_s is None else network.latency_s,
        topology="fabric",
        efficiency=device.nic_efficiency.value if network.efficiency is None else network.efficiency,
        source=source,
        transport=device.nic_transport,
    )


def _tier(link: ScaleUp, size: int) -> Tier:
    return Tier(
        name=link.kind,
        size=size,
        bytes_per_s=link.bytes_per_s.value,
        latency_s=link.latency_s.value,
        topology=link.topology,
        efficiency=link.efficiency.value,
        source=link.bytes_per_s.source,
        transport=link.transport,
    )


def _slowest_ladder(ladders: Sequence[list[Tier]]) -> list[Tier]:
    """Several groups' ladders as one: level by level where the sizes agree, else one level that fits all."""
    if len({tuple(tier.size for tier in ladder) for ladder in ladders}) == 1:
        return [_slowest(level) for level in zip(*ladders, strict=True)]
    size = math.gcd(*(ladder[-1].size for ladder in ladders))
    return [replace(_slowest(tier for ladder in ladders for tier in ladder), size=size)]


def _slowest(tiers: Iterable[Tier]) -> Tier:
    tiers = list(tiers)
    slow = min(tiers, key=lambda tier: tier.effective_bytes_per_s)
    return replace(slow, latency_s=max(tier.latency_s for tier in tiers))
