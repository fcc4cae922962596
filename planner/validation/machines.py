"""The cluster of a training row: its accelerator's profile, its node, and the links that it prints."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

from planner.errors import PlannerError
from planner.specs.cluster import Cluster
from planner.specs.cluster_file import build_cluster
from planner.specs.device import Device, Sourced
from planner.specs.device_file import load_device
from planner.specs.links import load_link
from planner.specs.tiers import Network
from planner.validation.cells import Cells
from planner.validation.table import Unsupported

__all__ = ["cluster_of", "device_of", "network_of"]

_GIGABIT = 1e9 / 8.0  # bytes per second
# Rate of one port in Gb/s where only the kind of the network is printed: InfiniBand Trade Association roadmap, Intel Omni-Path.
_PORT_GBIT = {
    "omni-path": 100.0,
    "opa": 100.0,
    "fdr": 56.0,
    "edr": 100.0,
    "hdr": 200.0,
    "ndr": 400.0,
    "xdr": 800.0,
}
_RATE = re.compile(
    r"""(?:(?P<before>\d+)\s*[x×]\s*(?:[a-z-]+\s+)?|(?<![\w.,-]))  # 4x200Gb/s, 8x HDR 200Gb/s; not a part's 3-40GB
    (?P<digits>\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?)\s*
    (?P<prefix>[gt])
    (?:(?P<bytes>(?-i:B)(?!it|e\b)|byte)|b)?  # a capital B is bytes, but for GBit and GBE
    (?:its?|e|s)?(?:/s|ps)?(?!\w)
    (?:\s*[x×]\s*(?P<after>\d+)(?![\w.]))?  # 400G x 8
    """,
    re.IGNORECASE | re.VERBOSE,
)
_PORTS = re.compile(r"(\d+)\s*[x×]\s*([a-z-]+)")


def device_of(name: str) -> Device:
    """The accelerator's profile.

    Raises:
        Unsupported: there is none.
    """
    if not name:
        raise Unsupported("no accelerator is named")
    try:
        return _load(name)
    except PlannerError:
        raise Unsupported(f"no profile of accelerator {name!r}") from None


def cluster_of(cells: Cells) -> Cluster:
    """The machines of a row.

    Raises:
        Unsupported: the devices cannot be dealt to nodes.
    """
    devices, per_node = cells.whole("n_devices"), cells.whole("devices_per_node")
    if devices == 0 or per_node == 0:
        raise Unsupported("no devices")
    if devices < per_node:
        per_node = devices
    if devices % per_node:
        raise Unsupported(f"{devices} devices are no whole nodes of {per_node}")
    return _build(
        cells.row.text("accelerator"),
        devices // per_node,
        per_node,
        _printed(cells, "intra_node_link"),
        _printed(cells, "inter_node_link"),
    )


def _printed(cells: Cells, column: str) -> str:
    """A link in lower case, its bytes spelled out: only a capital B tells them from bits."""
    text = cells.row.text(column) or str(cells.default(column))
    return re.sub(r"(?<=\d)(\s*[GTgt])B(?!it|[Ee]\b)", r"\1byte", text).lower()


def network_of(text: str, devices_per_node: int) -> Network:
    """What a printed network says: ports of a rate per node or per device; nothing where no rate can be read.

    >>> network_of("4x200Gb/s HDR InfiniBand per node", 8).nic_bytes_per_s
    25000000000.0
    >>> network_of("RDMA 400 Gb/s per GPU", 8).nics_per_node
    8
    """
    found, ports = _rate(text), _PORTS.search(text.lower())
    if found is not None:
        count, bytes_per_s = found
    elif ports is not None and int(ports[1]) and (kind := ports[2]) in _PORT_GBIT:
        count, bytes_per_s = int(ports[1]), _PORT_GBIT[kind] * _GIGABIT
    else:
        return Network()
    if re.search(r"(per |/)(gpu|device|accelerator)", text, re.IGNORECASE):
        count *= devices_per_node
    return Network(nics_per_node=count, nic_bytes_per_s=bytes_per_s)


def _rate(text: str) -> tuple[int, float] | None:
    """Ports, and bytes per second of each; None where the text has no rate.

    Capital B is bytes, small b bits, as are Ethernet's and InfiniBand's rates without a letter.

    >>> _rate("12.5 GB/s RoCE"), _rate("100GbE"), _rate("NVLink")
    ((1, 12500000000.0), (1, 12500000000.0), None)
    """
    found = _RATE.search(text)
    if found is None:
        return None
    count = int(found["before"] or found["after"] or 1)
    bytes_per_s = float(found["digits"].replace(",", "")) * (1e9 if found["bytes"] else _GIGABIT)
    bytes_per_s *= 1e3 if found["prefix"] in "tT" else 1.0
    return (count, bytes_per_s) if count and bytes_per_s else None


@lru_cache(maxsize=64)
def _load(name: str) -> Device:
    return load_device(name)


@lru_cache(maxsize=1024)
def _build(name: str, nodes: int, per_node: int, inside: str, outside: str) -> Cluster:
    try:
        device = _outside(_inside(_load(name), inside), outside)
        return build_cluster(device, nodes, per_node, network_of(outside, per_node))
    except PlannerError as error:
        raise Unsupported(f"{nodes} nodes of {per_node} {name}: {error}") from None


def _inside(device: Device, text: str) -> Device:
    """The device with the links inside its node as they are printed: PCIe instead of the part's own, or another rate."""
    if "pcie" not in text:
        return device
    up, found = device.scale_up, _rate(text)
    if up.kind == "pcie" and found is None:
        return device
    bytes_per_s = device.host_link_bytes_per_s if found is None else Sourced(found[1], "measured", "row")
    return replace(device, scale_up=replace(up, kind="pcie", topology="host", bytes_per_s=bytes_per_s))


def _outside(device: Device, text: str) -> Device:
    """The device with NICs on the kind of link that is printed, where that is not its own."""
    if not re.search(r"omni-path|\bopa\b", text):
        return device
    link = load_link("omni-path")
    return replace(
        device, nic_latency_s=link.latency_s, nic_efficiency=link.efficiency, nic_transport=link.transport
    )
