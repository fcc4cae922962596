"""``planner hardware import`` and ``planner hardware detect``: a cluster file from what machines say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.options import Json, option, with_options
from planner.errors import Problem, SpecError

if TYPE_CHECKING:
    import subprocess

_QUERIES = {
    "nvidia-smi --query-gpu": ["nvidia-smi", "--query-gpu=name,memory.total,power.limit", "--format=csv"],
    "nvidia-smi topo -m": ["nvidia-smi", "topo", "-m"],
}
_ALSO = {"ibstat": ["ibstat"], "lscpu": ["lscpu"], "/proc/meminfo": ["cat", "/proc/meminfo"]}
"""What is asked too, where it is there."""
_JOB_NODES = ("SLURM_JOB_NODELIST", "SLURM_NODELIST")
_EXPECTED = (
    "the output of nvidia-smi topo -m, nvidia-smi --query-gpu=name,memory.total,power.limit --format=csv, nvidia-smi -L, ibstat, "
    "lscpu, sinfo or scontrol show nodes, a node list, or /proc/meminfo"
)
_PATIENCE_S = 30


@dataclass(frozen=True)
class MachineOptions:
    """What reports leave open, and the file to write; None means that the option was left out."""

    device: Annotated[
        str | None,
        option("--device", text="The accelerator, where the reports do not name it.", metavar="NAME"),
    ] = None
    nodes: Annotated[str | None, option("--nodes", text="Nodes, all like this one [1].", metavar="N")] = None
    nodelist: Annotated[
        str | None,
        option("--nodelist", text="Nodes as SLURM lists them, e.g. 'gpu[001-016]'.", metavar="LIST"),
    ] = None
    nic_gbit: Annotated[
        str | None, option("--nic-gbit", text="Rate of one network adapter, Gb/s.", metavar="X")
    ] = None
    out: Annotated[str | None, option("-o", "--out", text="Write the cluster file.", metavar="FILE.toml")] = (
        None
    )

    def numbers(self) -> tuple[int | None, float | None]:
        """How many nodes there are, and the rate of an adapter in Gb/s, where they are given.

        Raises:
            SpecError: they are no numbers above 0, or contradict each other.
        """
        from planner.cli.values import optional_number, optional_whole, raise_if_any
        from planner.specs.machine_report import expand_nodes

        faults: list[Problem] = []
        count = optional_whole(faults, "--nodes", self.nodes)
        rate = optional_number(faults, "--nic-gbit", self.nic_gbit)
        if self.nodes is not None and self.nodelist is not None:
            faults.append(Problem("--nodelist", "beside --nodes", "one of them"))
        faults += [
            Problem(name, repr(value), "more than 0")
            for name, value in (("--nodes", count), ("--nic-gbit", rate))
            if value is not None and value <= 0
        ]
        raise_if_any(faults)
        return (count if self.nodelist is None else len(expand_nodes(self.nodelist))), rate


@with_options
def read(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE…",
            help="Output of nvidia-smi topo -m, nvidia-smi --query-gpu=name,memory.total,power.limit, ibstat, lscpu, "
            "sinfo -o '%N %G', scontrol show nodes; a node list; /proc/meminfo.",
        ),
    ],
    asked: MachineOptions,
    as_json: Json = False,
) -> None:
    """Make a cluster file of what nvidia-smi, ibstat, lscpu, sinfo and scontrol printed.

    The content tells which report a file is. What the reports leave open is taken from the device's profile, and said. Times of
    collectives (nccl-tests) refine the file: planner calibrate fabric.
    """
    from planner.export.launched import read_text

    texts = {name: read_text(name, _EXPECTED) for name in files}
    _write(texts, asked, as_json)


@with_options
def detect(
    asked: MachineOptions,
    as_json: Json = False,
) -> None:
    """Make a cluster file of this machine.

    Asks nvidia-smi for the accelerators and their links, ibstat for the network, lscpu and /proc/meminfo for the host. --nodes
    says how many machines are like this one; inside a SLURM job, its node list does.
    """
    import os

    texts = {}
    for name, command in _QUERIES.items():
        done = _answer(command)
        if isinstance(done, Exception):
            found = f"cannot be asked ({getattr(done, 'strerror', None) or done})"
            hint = "On a machine with accelerators, or from its output: planner hardware import."
            raise SpecError(Problem("nvidia-smi", found, "NVIDIA's driver", hint))
        if done.returncode:
            said = (done.stdout + done.stderr).strip().splitlines()[:1]
            raise SpecError(Problem(name, f"fails ({' '.join(said)})", "a driver that answers"))
        texts[name] = done.stdout
    silent = []
    for name, command in _ALSO.items():
        done = _answer(command)
        if isinstance(done, Exception) or done.returncode or not done.stdout.strip():
            silent.append(name)
        else:
            texts[name] = done.stdout
    if asked.nodes is None and asked.nodelist is None:
        listed = next((os.environ[name] for name in _JOB_NODES if os.environ.get(name)), None)
        asked = replace(asked, nodelist=listed)
    noted = [f"{name} did not answer: the device's profile stands in." for name in silent]
    _write(texts, asked, as_json, noted)


def _answer(command: list[str]) -> subprocess.CompletedProcess[str] | Exception:
    """What a program of the machine says; why it cannot be asked."""
    import subprocess

    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return error


def _write(texts: dict[str, str], asked: MachineOptions, as_json: bool, noted: Sequence[str] = ()) -> None:
    """Writes and prints the cluster that the reports describe, and what had to be assumed of it."""
    from planner.cli.output import OutputFile, print_json

    text, said = _cluster(texts, asked)
    said += noted
    out = asked.out
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


def _cluster(texts: dict[str, str], asked: MachineOptions) -> tuple[str, list[str]]:
    """The cluster file, and what in it no report says."""
    from planner.specs.machine_cluster import cluster_toml, device_named
    from planner.units import counted

    count, gbit_per_s = asked.numbers()
    found = _reports(texts)
    listed = found.get("nodes")
    if listed is not None and count is None:
        count = listed.count
    text, said = cluster_toml(
        device_named(found.get("gpus"), asked.device),
        count or 1,
        found.get("topology"),
        found.get("gpus"),
        gbit_per_s,
        ", ".join(Path(name).name for name in texts),
        found.get("adapters"),
        found.get("processor"),
        found.get("memory", None if listed is None else listed.memory_bytes),
        None if listed is None else listed.devices_per_node,
    )
    if listed is not None and listed.out:
        said.append(
            f"{counted(listed.out, 'node')} down or drained: counted too, unless --nodes says how many there are."
        )
    return text, said


def _reports(texts: dict[str, str]) -> dict[str, Any]:
    """The reports by kind."""
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
