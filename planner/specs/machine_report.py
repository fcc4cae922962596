"""What a machine says of itself: ``nvidia-smi topo -m``, ``nvidia-smi --query-gpu=…``, and SLURM's lists of nodes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from planner.errors import Problem, SpecError

__all__ = ["Gpus", "Topology", "expand_nodes", "kinds", "read_gpus", "read_topology"]

_LINK = re.compile(r"NV(\d+)|X|PIX|PXB|PHB|NODE|SYS")
_GPU = re.compile(r"GPU(\d+)")
_NIC = re.compile(r"NIC\d+|mlx\d+_\d+|bnxt_re\d+|irdma\d+|efa_\d+|rdmap\S+")
_LISTED = re.compile(r"^GPU \d+: (.+?) \(UUID: ", re.MULTILINE)
_NEAR = ("PIX", "PXB")
_MOST_NODES = 100_000


@dataclass(frozen=True, slots=True)
class Topology:
    """The links of one node.

    Attributes:
        gpus: accelerators.
        domain: accelerators that NVLink joins, each with each; 1 where there is none.
        links: NVLinks between two of them, the fewest of any pair; behind a switch, those of one accelerator.
        nics: network adapters that share a PCIe switch with an accelerator.
        far_nics: those that do not, and are taken for storage and management.
        near_names: names of the near ones, as the report's legend spells them.
    """

    gpus: int
    domain: int
    links: int
    nics: int
    far_nics: int
    near_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Gpus:
    """Accelerators of one node, as the driver names them: name, and memory in bytes and power limit where they are told."""

    name: str
    count: int
    memory_bytes: float | None
    power_limit_w: float | None


def read_topology(text: str, where: str) -> Topology:
    """Reads the matrix of ``nvidia-smi topo -m``.

    Raises:
        SpecError: there is no such matrix, or accelerators are not joined alike.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    rows = [line.split() for line in plain.splitlines() if line.strip()]
    heading = next(
        (row for row in rows if len(row) > 1 and row[0] == "GPU0" and not _LINK.fullmatch(row[1])), None
    )
    heading = heading or next((row for row in rows if row[:1] == ["GPU0"]), None)
    cells = {
        row[0]: row[1:] for row in rows if _GPU.fullmatch(row[0]) and len(row) > 1 and _LINK.fullmatch(row[1])
    }
    if heading is None or not cells:
        raise SpecError(Problem(where, "holds no matrix of links", "the output of nvidia-smi topo -m"))
    columns = heading[
        : next(
            (i for i, name in enumerate(heading) if not (_GPU.fullmatch(name) or _NIC.fullmatch(name))), None
        )
    ]
    matrix = {gpu: dict(zip(columns, links, strict=False)) for gpu, links in cells.items()}
    domains = {
        gpu: frozenset(other for other in matrix if other == gpu or row.get(other, "").startswith("NV"))
        for gpu, row in matrix.items()
    }
    if len({len(domain) for domain in domains.values()}) > 1 or any(
        domains[other] != own for own in domains.values() for other in own
    ):
        found = ", ".join(f"{gpu}: {len(domain)}" for gpu, domain in domains.items())
        raise SpecError(
            Problem(where, f"NVLink joins GPUs unevenly ({found})", "domains of one size, all joined to all")
        )
    counts = [int(link[2:]) for row in matrix.values() for link in row.values() if link.startswith("NV")]
    nics = [name for name in columns if not _GPU.fullmatch(name)]
    near = [nic for nic in nics if any(row.get(nic) in _NEAR for row in matrix.values())]
    legend = dict(re.findall(r"^\s*(NIC\d+):\s*(\S+)", plain, re.MULTILINE))
    return Topology(
        len(matrix), len(next(iter(domains.values()))), min(counts, default=0), len(near), len(nics) - len(near),
        tuple(legend.get(nic, nic) for nic in near),
    )  # fmt: skip


def read_gpus(text: str, where: str) -> Gpus:
    """Reads ``nvidia-smi --query-gpu=name,memory.total,power.limit --format=csv``, or ``nvidia-smi -L``, which tells no memory.

    Raises:
        SpecError: there is no such table, or the node holds different accelerators.
    """
    import csv

    listed = _LISTED.findall(text)
    if listed:
        return Gpus(_one_kind(set(listed), where), len(listed), None, None)
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if len(row) > 1]
    heading = (
        rows[0]
        if rows and rows[0][0].startswith("name")
        else ["name", "memory.total [MiB]", "power.limit [W]"]
    )
    body = rows[1:] if rows and rows[0][0].startswith("name") else rows
    column = {name.split(" ")[0]: index for index, name in enumerate(heading)}
    if not body or "memory.total" not in column:
        expected = "the output of nvidia-smi --query-gpu=name,memory.total,power.limit --format=csv"
        raise SpecError(Problem(where, "names no GPUs and their memory", expected))
    name = _one_kind({row[column["name"]] for row in body}, where)
    memory = _number(body[0][column["memory.total"]])
    power = _number(body[0][column["power.limit"]]) if column.get("power.limit", 99) < len(body[0]) else None
    if memory is None:
        raise SpecError(Problem(where, repr(body[0][column["memory.total"]]), "memory in MiB"))
    return Gpus(name, len(body), memory * 2**20, power)


def _one_kind(names: set[str], where: str) -> str:
    if len(names) > 1:
        raise SpecError(Problem(where, f"holds {' and '.join(sorted(names))}", "GPUs of one kind per node"))
    return names.pop()


def expand_nodes(text: str) -> list[str]:
    """Nodes of a SLURM list.

    Raises:
        SpecError: brackets do not match, or a range is no range.

    >>> expand_nodes("gpu[001-003,007],login1")
    ['gpu001', 'gpu002', 'gpu003', 'gpu007', 'login1']
    """
    found: list[str] = []
    for part in re.findall(r"[^,\[]*(?:\[[^\]]*\][^,\[]*)*", text.strip()):
        if part:
            found += _expanded(part, text)
        if len(found) > _MOST_NODES:
            raise SpecError(Problem("--nodelist", repr(text[:40]), f"at most {_MOST_NODES:,} nodes"))
    if text.count("[") != text.count("]") or not found or "[" in "".join(found) or "]" in "".join(found):
        raise SpecError(Problem("--nodelist", repr(text[:40]), "a list such as gpu[001-016,020]"))
    return found


def _expanded(part: str, text: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", part)
    if match is None:
        return [part]
    names = []
    for piece in match[1].split(","):
        first, dash, last = piece.partition("-")
        if (
            not first.isdigit()
            or (dash and not last.isdigit())
            or int(last or first) - int(first) > _MOST_NODES
        ):
            raise SpecError(
                Problem("--nodelist", repr(text[:40]), "ranges of numbers, such as gpu[001-016,020]")
            )
        names += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return [
        whole
        for name in names
        for whole in _expanded(part[: match.start()] + name + part[match.end() :], text)
    ]


def _number(text: str) -> float | None:
    match = re.match(r"\s*([\d.]+)", text)
    return float(match[1]) if match else None


def kinds(text: str) -> Mapping[str, bool]:
    """Which reports a text is: ``topology``, ``gpus``."""
    return {
        "topology": "GPU0" in text and ("SYS" in text or re.search(r"\bX\b", text) is not None),
        "gpus": "memory.total" in text
        or _LISTED.search(text) is not None
        or re.search(r"^[^,\n]+,\s*\d+ MiB", text, re.MULTILINE) is not None,
    }
