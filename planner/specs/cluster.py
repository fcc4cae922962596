"""Machines as the planner sees them: node groups, and a hierarchy of network tiers.

A tier is a domain of devices that talk at one bandwidth; tiers are listed innermost first, and their ``size`` is the
number of devices in one domain of that tier. Bandwidth is per device and per direction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

from planner.specs.device import Device, Transport

__all__ = ["Cluster", "NodeGroup", "Tier"]


@dataclass(frozen=True, slots=True)
class Tier:
    """One level of the network.

    ``oversubscription`` divides the bandwidth of traffic that leaves the tier below (1 = full bisection).
    """

    name: str
    size: int
    bytes_per_s: float
    latency_s: float
    topology: str  # switch | mesh | torus | host | fabric
    efficiency: float = 1.0
    oversubscription: float = 1.0
    source: str = ""
    transport: Transport | None = None  # how a communication library drives the link

    @property
    def effective_bytes_per_s(self) -> float:
        """What a large collective reaches per device and direction."""
        return self.bytes_per_s * self.efficiency / self.oversubscription


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Nodes of one kind."""

    device: Device
    nodes: int
    devices_per_node: int

    @property
    def devices(self) -> int:
        """Accelerators in this group."""
        return self.nodes * self.devices_per_node


@dataclass(frozen=True, slots=True)
class Cluster:
    """Node groups joined by tiers (innermost first; the last tier spans everything)."""

    name: str
    groups: tuple[NodeGroup, ...]
    tiers: tuple[Tier, ...]
    host_memory_bytes: float  # per device
    host_memory_bytes_per_s: float  # per device
    host_link_bytes_per_s: float  # per device
    nvme_bytes: float  # per device
    nvme_bytes_per_s: float  # per device
    notes: str = ""
    source: str = ""  # key in SOURCES.toml of what describes the machine
    cxl_bytes: float = 0.0  # per device
    cxl_bytes_per_s: float = 0.0  # per device
    parts: tuple[Cluster, ...] = ()  # of several groups: the nodes of each by themselves
    links: tuple[
        tuple[Tier, ...], ...
    ] = ()  # and the tier through which each (row) meets each other one (column)

    @property
    def devices(self) -> int:
        """Accelerators in the cluster."""
        return sum(group.devices for group in self.groups)

    @property
    def slower_bytes(self) -> dict[str, float]:
        """Capacity per device of the tiers below device memory."""
        return {"host": self.host_memory_bytes, "cxl": self.cxl_bytes, "nvme": self.nvme_bytes}

    @property
    def device(self) -> Device:
        """What a plan that treats all devices alike may count on: in a mixed cluster, the least of each kind of part."""
        first, *others = {group.device.name: group.device for group in self.groups}.values()
        return reduce(_weaker, others, first)

    def part(self, group: int) -> Cluster:
        """The nodes of one group by themselves; a cluster of one group is its own part."""
        return self.parts[group] if self.parts else self

    @property
    def mixed(self) -> bool:
        """Whether the cluster holds more than one kind of device."""
        return len({group.device.name for group in self.groups}) > 1


def _weaker(one: Device, other: Device) -> Device:
    """The device that has no more of anything than either."""
    least = {name: min(getattr(one, name), getattr(other, name), key=float) for name in _LESS_IS_WEAKER}
    peaks = {
        dtype: min(rate, other.peak_flop_per_s[dtype], key=float)
        for dtype, rate in one.peak_flop_per_s.items()
        if dtype in other.peak_flop_per_s
    }
    return replace(one, name=f"{one.name}+{other.name}", peak_flop_per_s=peaks, **least)


_LESS_IS_WEAKER = (
    "vector_flop_per_s",
    "memory_bytes",
    "memory_bytes_per_s",
    "l2_bytes",
    "multiprocessors",
    "nic_bytes_per_s",
    "host_link_bytes_per_s",
    "host_memory_bytes",
    "host_memory_bytes_per_s",
)
