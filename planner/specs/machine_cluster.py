"""A cluster file from what its machines say of themselves, with every assumption in words."""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import Problem, SpecError
from planner.specs.device import Device, ScaleUp
from planner.specs.device_file import find_device, load_device
from planner.specs.host_report import Adapters, Processor
from planner.specs.machine_report import Gpus, Topology
from planner.units import counted

__all__ = ["cluster_toml", "device_named"]

_GIGABIT = 1e9 / 8.0
_POWER_TOLERANCE = 0.02


def device_named(gpus: Gpus | None, given: str | None) -> Device:
    """The profile of the accelerators: as given, or as the driver names them.

    Raises:
        SpecError: neither tells, or there is no such profile.
    """
    if given is not None:
        return load_device(given)
    if gpus is None:
        raise SpecError(
            Problem("--device", "is missing", "a device, as the reports do not name the accelerators")
        )
    # Where one name has several sizes of memory, the profile's name carries the size.
    sized = [] if gpus.memory_bytes is None else [f"{gpus.name}-{round(gpus.memory_bytes / 2**30 / 8) * 8}gb"]
    spellings = (
        gpus.name,
        *sized,
        *(gpus.name.replace(word, "") for word in (" HBM3", " HBM3e", "NVIDIA ")),
    )
    name = next((found for spelled in spellings if (found := find_device(spelled.strip()))), None)
    if name is None:
        raise SpecError(
            Problem(
                "--device",
                f"no profile is known for {gpus.name!r}",
                "a shipped name",
                "planner hardware list",
            )
        )
    return load_device(name)


def cluster_toml(
    device: Device,
    nodes: int,
    topology: Topology | None,
    gpus: Gpus | None,
    nic_gbit: float | None,
    source: str,
    adapters: Adapters | None = None,
    processor: Processor | None = None,
    host_memory_bytes: float | None = None,
    listed: int | None = None,
) -> tuple[str, list[str]]:
    """The text of a cluster file, and what it assumes, one sentence each.

    Args:
        device: the accelerators' profile.
        nodes: how many nodes, all alike.
        topology: links of one node; None takes those of the profile.
        gpus: what the driver says of them.
        nic_gbit: rate of one network adapter in Gb/s; None takes the profile's.
        source: where the reports come from, for the file's notes.
        adapters: network adapters and their rates; ``nic_gbit`` goes before them.
        processor: the host's processors.
        host_memory_bytes: memory of a node's host; None takes the profile's.
        listed: accelerators of a node, as a list of nodes has them.

    Raises:
        SpecError: the reports contradict each other.
    """
    told = {
        "the matrix": None if topology is None else topology.gpus,
        "the table": None if gpus is None else gpus.count,
        "the list": listed,
    }
    counts = {report: count for report, count in told.items() if count is not None}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} GPUs in {report}" for report, count in counts.items())
        raise SpecError(Problem("reports", found, "all of one node"))
    per_node = next(iter(counts.values()), device.devices_per_node)
    usual = "" if counts else f"; {per_node} per node, as usual around this part"
    said = [f"{nodes} node{'s' * (nodes > 1)} of {per_node} × {device.name}, all alike{usual}."]
    if gpus is not None:
        said += _about(gpus, device)
    lines = ["[[group]]", f'device = "{device.name}"', f"nodes = {nodes}", f"devices_per_node = {per_node}"]
    domain = per_node if topology is None else topology.domain
    if topology is not None:
        said.append(_links(topology, device))
    nics = None if nic_gbit is None else _Nics(None, nic_gbit, "as given")
    if nics is None and adapters is not None and nodes > 1:
        nics, assumed = _up(adapters, topology)
        said += assumed
    own = _fast(device, domain)
    bridged = own is not device.scale_up
    if own.kind == "pcie" or per_node == 1 or (domain >= min(per_node, own.domain) and not bridged):
        lines += _network(device, per_node, nodes, topology, nics, said)
    else:
        lines += _tiers(device, per_node, nodes, domain, topology, nics, said)
    said += _host(processor, host_memory_bytes, per_node, device)
    if host_memory_bytes is not None:
        lines += ["", "[host]", f"memory_bytes = {host_memory_bytes:.6g}"]
    notes = f"From {source}."
    return "\n".join([f'notes = "{notes}"', "", *lines]) + "\n", said


def _up(adapters: Adapters, topology: Topology | None) -> tuple[_Nics, list[str]]:
    """The adapters near the accelerators whose link is up, and what that assumes."""
    said = []
    near = [name for name in adapters.gbit if topology is not None and name in topology.near_names]
    if not near:
        fastest = max(adapters.gbit.values())
        near = [name for name, rate in adapters.gbit.items() if rate == fastest]
        slow = [name for name in adapters.gbit if name not in near]
        why = (
            "The matrix names no adapter as ibstat does"
            if topology is not None
            else "No matrix tells which adapters are near"
        )
        said.append(
            f"{why}: those of {fastest:g} Gb/s are taken to serve the accelerators"
            + (f", {', '.join(slow)} for storage and management." if slow else ".")
        )
    down = [name for name in adapters.down if topology is None or name in topology.near_names]
    if down:
        said.append(f"The link of {', '.join(down)} is down: not counted.")
    rates = [adapters.gbit[name] for name in near]
    if len(set(rates)) > 1:
        shown = ", ".join(f"{name} {rate:g}" for name, rate in zip(near, rates, strict=True))
        said.append(f"Adapters differ in rate ({shown} Gb/s): the slowest is taken for all.")
    return _Nics(len(near), min(rates), "as ibstat says"), said


def _host(
    processor: Processor | None, memory_bytes: float | None, per_node: int, device: Device
) -> list[str]:
    found = []
    if processor is not None:
        found.append(
            f"Host: {processor.sockets} × {processor.name}, {processor.cores} cores, NUMA nodes: {processor.numa_nodes}; "
            f"{processor.cores / per_node:.3g} cores per device. Its memory's bandwidth is the profile's."
        )
    if memory_bytes is not None:
        found.append(f"Host memory: {memory_bytes / 2**30:.0f} GiB per node, all of it for offloading.")
    else:
        ours = float(device.host_memory_bytes) / 2**30
        found.append(
            f"Host memory: {ours:.0f} GiB per node, as usual around this part (/proc/meminfo tells)."
        )
    return found


def _about(gpus: Gpus, device: Device) -> list[str]:
    found = []
    ours = float(device.memory_bytes) / 2**30
    theirs = ours if gpus.memory_bytes is None else gpus.memory_bytes / 2**30
    if abs(theirs / ours - 1) > 0.05:
        found.append(
            f"{gpus.name} reports {theirs:.1f} GiB; the profile has {ours:.1f}, which is what plans are held against."
        )
    limit = device.power_w.value
    if gpus.power_limit_w is not None and gpus.power_limit_w < limit * (1 - _POWER_TOLERANCE):
        found.append(
            f"The power limit is {gpus.power_limit_w:.0f} W of {limit:.0f}: rates of the profile are of the full limit."
        )
    return found


def _fast(device: Device, domain: int) -> ScaleUp:
    """The link that joins a domain: the profile's own, or the bridge that the part may be bought with."""
    bridged = device.scale_up.kind == "pcie" and domain > 1 and device.bridge is not None
    return device.bridge if bridged and device.bridge is not None else device.scale_up


def _links(topology: Topology, device: Device) -> str:
    link = _fast(device, topology.domain)
    rate = link.bytes_per_s.value
    if topology.domain == 1:
        return "No NVLink: devices of a node reach each other over PCIe."
    if link.kind == "pcie":
        return f"NVLink joins {topology.domain} devices, and the profile knows of none: PCIe's {rate / 1e9:.0f} GB/s are taken."
    each = rate / topology.links / 1e9
    return (
        f"NVLink joins {topology.domain} devices, {topology.links} links each: {rate / 1e9:.0f} GB/s per direction of the "
        f"profile, {each:.1f} per link. Check that all links are up (nvidia-smi nvlink --status)."
    )


@dataclass(frozen=True, slots=True)
class _Nics:
    """What is known of network adapters: how many (None: the matrix or the device tells), the rate of one, and by whom."""

    count: int | None
    gbit: float
    source: str


def _rate(
    device: Device, per_node: int, topology: Topology | None, known: _Nics | None, said: list[str]
) -> tuple[int, float]:
    """Adapters of a node, and bytes/s of one."""
    nics = topology.nics if topology is not None and topology.nics else per_node
    if topology is not None and topology.far_nics and (known is None or known.count is None):
        said.append(
            f"Adapters that share no PCIe switch with a GPU: {topology.far_nics}, taken for storage and management, not counted."
        )
    if known is not None:
        nics = known.count or nics
        said.append(f"{counted(nics, 'adapter')} of {known.gbit:g} Gb/s per node, {known.source}.")
        return nics, known.gbit * _GIGABIT
    rate = device.nic_bytes_per_s.value
    said.append(
        f"{nics} adapters per node at {rate / _GIGABIT:.0f} Gb/s each, as usual around this part (--nic-gbit; ibstat tells)."
    )
    return nics, rate


def _network(
    device: Device,
    per_node: int,
    nodes: int,
    topology: Topology | None,
    known: _Nics | None,
    said: list[str],
) -> list[str]:
    if nodes == 1:
        return []
    nics, rate = _rate(device, per_node, topology, known, said)
    return ["", "[network]", f"nics_per_node = {nics}", f"nic_bytes_per_s = {rate:.6g}"]


def _tiers(
    device: Device,
    per_node: int,
    nodes: int,
    domain: int,
    topology: Topology | None,
    known: _Nics | None,
    said: list[str],
) -> list[str]:
    """Tiers written out, where NVLink joins fewer devices than the profile has it."""
    own, host = _fast(device, domain), device.host_link_bytes_per_s.value
    rows = []
    if domain > 1:
        rows.append(
            (own.kind, domain, own.bytes_per_s.value, own.latency_s.value, own.topology, own.efficiency.value)
        )
    said.append(
        f"Between them, PCIe at the host link's {host / 1e9:.0f} GB/s, with the latency and efficiency of the network."
    )
    latency_s, efficiency = device.nic_latency_s.value, device.nic_efficiency.value
    rows.append(("pcie", per_node, host, latency_s, "host", efficiency))
    if nodes > 1:
        nics, rate = _rate(device, per_node, topology, known, said)
        rows.append(("nic", per_node * nodes, nics * rate / per_node, latency_s, "fabric", efficiency))
    lines = []
    for name, size, bytes_per_s, latency, shape, reached in rows:
        lines += ["", "[[tier]]", f'name = "{name}"', f"size = {size}", f"bytes_per_s = {bytes_per_s:.6g}"]
        lines += [f"latency_s = {latency:.6g}", f'topology = "{shape}"', f"efficiency = {reached:.6g}"]
    return lines
