"""``planner hardware import`` and ``planner hardware detect``: a cluster file from what machines say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

_Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="The accelerator, where the reports do not name it.",
        show_default=False,
    ),
]
_Nodes = Annotated[
    str | None, typer.Option("--nodes", metavar="N", help="Nodes, all like this one [1].", show_default=False)
]
_NodeList = Annotated[
    str | None,
    typer.Option(
        "--nodelist",
        metavar="LIST",
        help="Nodes as SLURM lists them, e.g. 'gpu[001-016]'.",
        show_default=False,
    ),
]
_Nic = Annotated[
    str | None,
    typer.Option("--nic-gbit", metavar="X", help="Rate of one network adapter, Gb/s.", show_default=False),
]
_Out = Annotated[
    str | None,
    typer.Option("-o", "--out", metavar="FILE.toml", help="Write the cluster file.", show_default=False),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
_QUERIES = {
    "nvidia-smi --query-gpu": ["nvidia-smi", "--query-gpu=name,memory.total,power.limit", "--format=csv"],
    "nvidia-smi topo -m": ["nvidia-smi", "topo", "-m"],
}
_ALSO = {"ibstat": ["ibstat"], "lscpu": ["lscpu"], "/proc/meminfo": ["cat", "/proc/meminfo"]}
"""What is asked too, where it is there."""
_JOB_NODES = ("SLURM_JOB_NODELIST", "SLURM_NODELIST")
_EXPECTED = (
    "the output of nvidia-smi topo -m, nvidia-smi --query-gpu=name,memory.total,power.limit --format=csv, ibstat, lscpu or "
    "sinfo, a node list, or /proc/meminfo"
)
_PATIENCE_S = 30


def read(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE…",
            help="Output of nvidia-smi topo -m, nvidia-smi --query-gpu=name,memory.total,power.limit, ibstat, lscpu, "
            "sinfo -o '%N %G'; a node list; /proc/meminfo.",
        ),
    ],
    device: _Device = None,
    nodes: _Nodes = None,
    nodelist: _NodeList = None,
    nic_gbit: _Nic = None,
    out: _Out = None,
    as_json: _Json = False,
) -> None:
    """Make a cluster file of what nvidia-smi, ibstat, lscpu and sinfo printed.

    The content tells which report a file is. What the reports leave open is taken from the device's profile, and said. Times of
    collectives (nccl-tests) refine the file: planner calibrate fabric.
    """
    from planner.export.launched import read_text

    texts = {name: read_text(name, _EXPECTED) for name in files}
    _write(texts, device, nodes, nodelist, nic_gbit, out, as_json)


def detect(
    device: _Device = None,
    nodes: _Nodes = None,
    nodelist: _NodeList = None,
    nic_gbit: _Nic = None,
    out: _Out = None,
    as_json: _Json = False,
) -> None:
    """Make a cluster file of this machine.

    Asks nvidia-smi for the accelerators and their links, ibstat for the network, lscpu and /proc/meminfo for the host. --nodes
    says how many machines are like this one; inside a SLURM job, its node list does.
    """
    import os
    import subprocess

    from planner.errors import Problem, SpecError

    texts = {}
    for name, command in _QUERIES.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            found = f"cannot be asked ({getattr(error, 'strerror', None) or error})"
            hint = "On a machine with accelerators, or from its output: planner hardware import."
            raise SpecError(Problem("nvidia-smi", found, "NVIDIA's driver", hint)) from None
        if done.returncode:
            said = (done.stdout + done.stderr).strip().splitlines()[:1]
            raise SpecError(Problem(name, f"fails ({' '.join(said)})", "a driver that answers"))
        texts[name] = done.stdout
    silent = []
    for name, command in _ALSO.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
        except (OSError, subprocess.SubprocessError):
            silent.append(name)
            continue
        if done.returncode == 0 and done.stdout.strip():
            texts[name] = done.stdout
        else:
            silent.append(name)
    if nodes is None and nodelist is None:
        nodelist = next((os.environ[name] for name in _JOB_NODES if os.environ.get(name)), None)
    said = [f"{name} did not answer: the device's profile stands in." for name in silent]
    _write(texts, device, nodes, nodelist, nic_gbit, out, as_json, said)


def _write(
    texts: dict[str, str],
    device: str | None,
    nodes: str | None,
    nodelist: str | None,
    nic_gbit: str | None,
    out: str | None,
    as_json: bool,
    noted: Sequence[str] = (),
) -> None:
    from planner.cli.output import OutputFile, print_json
    from planner.cli.values import optional_number, optional_whole, raise_if_any
    from planner.errors import Problem, SpecError
    from planner.specs.machine_cluster import cluster_toml, device_named

    faults: list[Problem] = []
    count = optional_whole(faults, "--nodes", nodes)
    rate = optional_number(faults, "--nic-gbit", nic_gbit)
    if nodes is not None and nodelist is not None:
        faults.append(Problem("--nodelist", "beside --nodes", "one of them"))
    faults += [
        Problem(flag, repr(value), "more than 0")
        for flag, value in (("--nodes", count), ("--nic-gbit", rate))
        if value is not None and value <= 0
    ]
    raise_if_any(faults)
    if nodelist is not None:
        from planner.specs.machine_report import expand_nodes

        count = len(expand_nodes(nodelist))
    found = _reports(texts)
    listed = found.get("nodes")
    if listed is not None and count is None:
        count = listed.count
    profile = device_named(found.get("gpus"), device)
    text, said = cluster_toml(
        profile,
        count or 1,
        found.get("topology"),
        found.get("gpus"),
        rate,
        ", ".join(Path(name).name for name in texts),
        found.get("adapters"),
        found.get("processor"),
        found.get("memory"),
    )
    said += noted
    if listed is not None and listed.devices_per_node not in (None, _devices(found)):
        expected = f"{_devices(found)}, as nvidia-smi says"
        raise SpecError(Problem("reports", f"{listed.devices_per_node} GPUs per node in the list", expected))
    if out is not None:
        if not out.lower().endswith(".toml"):
            raise SpecError(Problem("-o", repr(out[:80]), "a file name that ends in .toml"))
        with OutputFile(out) as file:
            file.write(text)
    if as_json:
        print_json({"cluster": text, "assumed": said})
        return
    if out is None:  # to be copied into a file: comments of TOML, as long as they are
        print(text)
        print("\n".join(f"# {sentence}" for sentence in said))
        return
    from planner.report.terminal import Screen

    print(out)
    for sentence in said:
        Screen().line(sentence)


def _devices(found: dict[str, Any]) -> int | None:
    """Accelerators of a node, as the driver's reports say; None without one."""
    if "topology" in found:
        return int(found["topology"].gpus)
    return int(found["gpus"].count) if "gpus" in found else None


def _reports(texts: dict[str, str]) -> dict[str, Any]:
    """The reports by kind."""
    from planner.errors import Problem, SpecError
    from planner.specs.host_report import (
        host_kinds,
        read_adapters,
        read_memory,
        read_nodes,
        read_processor,
    )
    from planner.specs.machine_report import kinds, read_gpus, read_topology

    readers: dict[str, Callable[[str, str], Any]] = {
        "topology": read_topology, "gpus": read_gpus, "adapters": read_adapters, "processor": read_processor,
        "memory": read_memory, "nodes": read_nodes,
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, text in texts.items():
        held = [kind for kind, there in {**kinds(text), **host_kinds(text)}.items() if there]
        if not held:
            hint = "Times of collectives are for planner calibrate fabric."
            raise SpecError(Problem(name, "is no report that is known", _EXPECTED, hint))
        found |= {kind: readers[kind](text, name) for kind in held}
    return found
