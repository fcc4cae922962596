"""What is said of what stands around a machine's accelerators: ``ibstat``, ``lscpu``, ``/proc/meminfo``; SLURM's nodes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
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

_OUT = re.compile(
    "down|drain|drng|fail|maint|not_responding|[*]$", re.IGNORECASE
)  # words of states; * does not answer
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
    """Nodes of a batch system.

    Attributes:
        count: how many.
        devices_per_node: accelerators of each; None where it is not told.
        memory_bytes: memory of each, of the node that has least; None where it is not told.
        out: how many of them are down, or being drained.
    """

    count: int
    devices_per_node: int | None
    memory_bytes: float | None = None
    out: int = 0


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
    """Reads a node list, what ``scontrol show nodes`` says, or a table of ``sinfo`` with a column NODELIST and perhaps GRES and
    STATE; no node counts twice.

    Raises:
        SpecError: brackets do not match, or nodes have different numbers of accelerators.

    >>> read_nodes("gpu[001-016]", "")
    Nodes(count=16, devices_per_node=None, memory_bytes=None, out=0)
    >>> read_nodes("NODELIST GRES\\ngpu[01-02] gpu:h100:8(S:0-1)\\ncpu[1-9] (null)\\n", "").count
    2
    >>> read_nodes("gpu[001-004] gpu:h100:8", "").devices_per_node
    8
    """
    if "NodeName=" in text:
        return _controlled(text, where)
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if len(lines) == 1 and len(lines[0]) == 1:
        return Nodes(len(set(expand_nodes(lines[0][0]))), None)
    heading = [name.upper() for name in lines[0]]
    if "NODELIST" not in heading:  # sinfo -h
        heading, lines = ["NODELIST", "GRES"], [["NODELIST", "GRES"], *lines]
    names: dict[str, int | None] = {}
    out: set[str] = set()
    gres = heading.index("GRES") if "GRES" in heading else None
    for cells in lines[1:]:
        if len(cells) < len(heading):
            continue
        counts = None if gres is None else re.findall(r"gpu:(?:[\w.-]+:)?(\d+)", cells[gres])
        if counts == []:
            continue  # nodes without accelerators
        each, listed = (
            None if counts is None else sum(map(int, counts)),
            expand_nodes(cells[heading.index("NODELIST")]),
        )
        names |= dict.fromkeys(listed, each)
        if "STATE" in heading and _OUT.search(cells[heading.index("STATE")]):
            out |= set(listed)
    return Nodes(len(names), _alike(names.values(), where), out=len(out))


def _alike(sizes: Iterable[int | None], where: str) -> int | None:
    """Accelerators of a node, of nodes that have equally many.

    Raises:
        SpecError: there are no nodes, or they differ.
    """
    found = list(sizes)
    told = {each for each in found if each is not None}
    if len(told) > 1 or not found:
        what = f"nodes of {' and '.join(map(str, sorted(told)))} GPUs" if told else "lists no nodes with GPUs"
        raise SpecError(
            Problem(where, what, "nodes of one kind: give sinfo a partition (-p), or scontrol their names")
        )
    return told.pop() if told else None


def _controlled(text: str, where: str) -> Nodes:
    """Reads ``scontrol show nodes``, of one line per node (``-o``) or of many; nodes without accelerators do not count.

    >>> _controlled("NodeName=a CPUTot=9\\n   Gres=gpu:h100:8(S:0-1)\\n RealMemory=1000 State=IDLE+DRAIN", "")
    Nodes(count=1, devices_per_node=8, memory_bytes=1048576000.0, out=1)
    """
    sizes: dict[str, int] = {}
    memory: list[float] = []
    out = 0
    for entry in re.split(r"(?=\bNodeName=)", text)[1:]:
        fields = dict(re.findall(r"(\w+)=(\S*)", entry))
        counts = re.findall(r"gpu:(?:[\w.-]+:)?(\d+)", fields.get("Gres", ""))
        if not counts:
            continue
        sizes[fields["NodeName"]] = sum(map(int, counts))
        out += _OUT.search(fields.get("State", "")) is not None
        if fields.get("RealMemory", "").isdigit():
            memory.append(int(fields["RealMemory"]) * 2.0**20)
    return Nodes(len(sizes), _alike(sizes.values(), where), min(memory, default=None), out)


def host_kinds(text: str) -> Mapping[str, bool]:
    """Which reports a text is: ``adapters``, ``processor``, ``memory``, ``nodes``."""
    one = text.strip()
    return {
        "adapters": re.search(r"^\s*CA '", text, re.MULTILINE) is not None,
        "processor": re.search(r"^Architecture:", text, re.MULTILINE) is not None,
        "memory": one.startswith("MemTotal:"),
        "nodes": one.startswith("NodeName=")
        or "NODELIST" in one.partition("\n")[0]
        or re.match(r"\S+\s+(\(null\)|gpu:\S+)\s*$", one, re.MULTILINE) is not None
        or ("\n" not in one and _LIST.fullmatch(one) is not None and re.search(r"\d", one) is not None),
    }
