"""What a machine says of what stands around its accelerators: ``ibstat``, ``lscpu``, ``/proc/meminfo``, and SLURM's ``sinfo``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from planner.errors import Problem, SpecError
from planner.specs.machine_report import expand_nodes

__all__ = [
    "Adapters",
    "Nodes",
    "Processor",
    "host_kinds",
    "read_adapters",
    "read_memory",
    "read_nodes",
    "read_processor",
]

_LIST = re.compile(r"[\w.-]*(?:\[[\d,-]+\][\w.-]*)*(?:,[\w.-]+(?:\[[\d,-]+\][\w.-]*)*)*")


@dataclass(frozen=True, slots=True)
class Adapters:
    """Network adapters of one node.

    Attributes:
        gbit: rate of every adapter whose link is up, Gb/s, by name.
        down: names of those that are not.
    """

    gbit: Mapping[str, float]
    down: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Processor:
    """The processors of one node: as they call themselves, sockets, cores of all of them, and domains of memory."""

    name: str
    sockets: int
    cores: int
    numa_nodes: int


@dataclass(frozen=True, slots=True)
class Nodes:
    """Nodes of a batch system: how many, and accelerators of each where it is told."""

    count: int
    devices_per_node: int | None


def read_adapters(text: str, where: str) -> Adapters:
    """Reads ``ibstat``; an adapter is as fast as the ports of it that are up together.

    Raises:
        SpecError: no adapter's link is up.

    >>> up = "CA 'mlx5_0'\\n Port 1:\\n  State: Active\\n  Rate: 400\\n"
    >>> read_adapters(up + "CA 'mlx5_1'\\n Port 1:\\n  State: Down\\n  Rate: 40\\n", "ibstat")
    Adapters(gbit={'mlx5_0': 400.0}, down=('mlx5_1',))
    """
    rates: dict[str, float] = {}
    names = []
    name, active = "", False
    for line in text.splitlines():
        stripped = line.strip()
        if found := re.match(r"CA '([^']+)'", stripped):
            name, active = found[1], False
            names.append(name)
        elif found := re.match(r"State:\s*(\w+)", stripped):
            active = found[1] == "Active"
        elif (found := re.match(r"Rate:\s*([\d.]+)", stripped)) and active and name:
            rates[name] = rates.get(name, 0.0) + float(found[1])
    if not rates:
        raise SpecError(
            Problem(where, f"none of {len(names)} adapters has a link that is up", "the output of ibstat")
        )
    return Adapters(rates, tuple(name for name in names if name not in rates))


def read_processor(text: str, where: str) -> Processor:
    """Reads ``lscpu``.

    Raises:
        SpecError: it names no cores.
    """
    fields = {
        key.strip().lower(): value.strip()
        for key, colon, value in (line.partition(":") for line in text.splitlines())
        if colon
    }

    def number(name: str, default: int) -> int:
        return int(fields[name]) if fields.get(name, "").isdigit() else default

    sockets = number("socket(s)", number("cluster(s)", 1))
    each, threads = (
        number("core(s) per socket", number("core(s) per cluster", 0)),
        number("thread(s) per core", 1),
    )
    cores = sockets * each or number("cpu(s)", 0) // threads
    if not cores:
        raise SpecError(Problem(where, "names no cores", "the output of lscpu"))
    return Processor(fields.get("model name", "unnamed"), sockets, cores, number("numa node(s)", 1))


def read_memory(text: str, where: str) -> float:
    """Bytes of memory, of ``/proc/meminfo``.

    Raises:
        SpecError: it names no total.

    >>> read_memory("MemTotal:       2113417420 kB", "")
    2164139438080.0
    """
    found = re.search(r"^MemTotal:\s*(\d+)\s*kB", text, re.MULTILINE)
    if found is None:
        raise SpecError(Problem(where, "names no MemTotal", "the content of /proc/meminfo"))
    return int(found[1]) * 1024.0


def read_nodes(text: str, where: str) -> Nodes:
    """Reads a node list, or a table of ``sinfo`` with a column NODELIST and perhaps one GRES; no node counts twice.

    Raises:
        SpecError: brackets do not match, or nodes have different numbers of accelerators.

    >>> read_nodes("gpu[001-016]", "")
    Nodes(count=16, devices_per_node=None)
    >>> read_nodes("NODELIST GRES\\ngpu[01-02] gpu:h100:8(S:0-1)\\ncpu[1-9] (null)\\n", "")
    Nodes(count=2, devices_per_node=8)
    >>> read_nodes("gpu[001-004] gpu:h100:8", "")
    Nodes(count=4, devices_per_node=8)
    """
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if len(lines) == 1 and len(lines[0]) == 1:
        return Nodes(len(set(expand_nodes(lines[0][0]))), None)
    heading = [name.upper() for name in lines[0]]
    if "NODELIST" not in heading:  # sinfo -h
        heading, lines = ["NODELIST", "GRES"], [["NODELIST", "GRES"], *lines]
    names: dict[str, int | None] = {}
    gres = heading.index("GRES") if "GRES" in heading else None
    for cells in lines[1:]:
        if len(cells) < len(heading):
            continue
        counts = None if gres is None else re.findall(r"gpu:(?:[\w.-]+:)?(\d+)", cells[gres])
        if counts == []:
            continue  # nodes without accelerators
        each = None if counts is None else sum(map(int, counts))
        names |= dict.fromkeys(expand_nodes(cells[heading.index("NODELIST")]), each)
    sizes = {each for each in names.values() if each is not None}
    if len(sizes) > 1 or not names:
        found = (
            f"nodes of {' and '.join(map(str, sorted(sizes)))} GPUs" if sizes else "lists no nodes with GPUs"
        )
        raise SpecError(Problem(where, found, "nodes of one kind: give sinfo a partition (-p)"))
    return Nodes(len(names), sizes.pop() if sizes else None)


def host_kinds(text: str) -> Mapping[str, bool]:
    """Which reports a text is: ``adapters``, ``processor``, ``memory``, ``nodes``."""
    one = text.strip()
    return {
        "adapters": re.search(r"^\s*CA '", text, re.MULTILINE) is not None,
        "processor": re.search(r"^Architecture:", text, re.MULTILINE) is not None,
        "memory": one.startswith("MemTotal:"),
        "nodes": "NODELIST" in one.partition("\n")[0]
        or re.match(r"\S+\s+(\(null\)|gpu:\S+)\s*$", one, re.MULTILINE) is not None
        or ("\n" not in one and _LIST.fullmatch(one) is not None and re.search(r"\d", one) is not None),
    }
