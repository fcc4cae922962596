"""What a measured call ran on, as far as its row tells: devices, how many, what joins them; and its path through the network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from planner.costs.collectives import Level
from planner.engine.pricer import Pricer
from planner.ledger import Group
from planner.specs.cluster import Cluster
from planner.specs.cluster_file import build_cluster
from planner.specs.device import Device
from planner.specs.device_file import find_device, load_device
from planner.specs.library import canonical
from planner.specs.stack import load_stack
from planner.specs.tiers import Network
from planner.units import GB
from planner.validation.table import Unsupported

__all__ = ["Machine", "cluster_of", "device_name", "levels_of"]

# Between nodes, where a row does not say what joins them: data-centre Ethernet. Fitted to the multi-node rows of vidur's a100_dgx
# tables (microsoft/vidur@7d47513), all-reduce and send: one device reaches 6.9 GB/s, a node of four or eight about three times
# that. A part whose usual node has less keeps its own.
_ETHERNET_BYTES_PER_S, _ETHERNET_PER_NODE, _ETHERNET_LATENCY_S = 6.9 * GB, 3, 17e-6


@dataclass(frozen=True, slots=True)
class Machine:
    """What a call ran on.

    Attributes:
        device: the accelerator as the row names it.
        nodes: how many nodes take part.
        devices_per_node: devices of each that take part.
        inside: the link inside the node as printed; empty where it is not.
        rdma: whether the software needs remote direct memory access, so that the part's usual NICs join the nodes.
    """

    device: str
    nodes: int
    devices_per_node: int
    inside: str = ""
    rdma: bool = False


@lru_cache(maxsize=256)
def levels_of(machine: Machine) -> tuple[list[Level], Device]:
    """The way of a group of all the machine's devices through its network, and the devices' profile.

    Raises:
        Unsupported: no profile of the device.
        SpecError: the nodes make no cluster.
    """
    cluster = cluster_of(machine)
    ranks = np.array(machine.nodes * machine.devices_per_node)
    pricer = Pricer(cluster, load_stack("default"))
    return pricer.levels(Group("call", ranks, np.array(1))), cluster.device


def cluster_of(machine: Machine) -> Cluster:
    """The cluster that the machine's devices make.

    Raises:
        Unsupported: no profile of the device.
        SpecError: the nodes make no cluster.
    """
    name = device_name(machine)
    device = load_device(name)
    if "pairwise" in machine.inside.lower():
        if device.bridge is None:
            raise Unsupported(f"no NVLink bridge is known of {device.name}")
        device = replace(device, scale_up=device.bridge)
    if machine.rdma:
        return build_cluster(device, machine.nodes, machine.devices_per_node)
    usual = device.nic_bytes_per_s.value * device.nic_efficiency.value
    share = min(
        _ETHERNET_BYTES_PER_S, _ETHERNET_BYTES_PER_S * _ETHERNET_PER_NODE / machine.devices_per_node, usual
    )
    network = Network(machine.devices_per_node, share, _ETHERNET_LATENCY_S, 1.0)
    return build_cluster(device, machine.nodes, machine.devices_per_node, network)


def device_name(machine: Machine) -> str:
    """Name of the shipped profile; of a part that is sold as a card and as a module, the card where the row says so.

    Raises:
        Unsupported: there is none.
    """
    names = [machine.device]
    if "pcie" in machine.inside.lower():
        names.insert(0, f"{machine.device}-pcie")
    for name in names:
        # Product names go on behind the part's: a form factor, a memory size, an edition.
        words = canonical(name).split("-")
        for end in range(len(words), 0, -1):
            if (found := find_device("-".join(words[:end]))) is not None:
                return found
    raise Unsupported(f"no profile of accelerator {machine.device!r}")
