"""What an exporter is: a launcher's files from a plan, and where the launcher's log says how long a step took."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from planner.export.target import Target

__all__ = ["ITERATION_LINES", "STEP_LINES", "Exporter", "Log", "environment_of_torchrun", "torchrun_lines"]


@dataclass(frozen=True, slots=True)
class Log:
    """Where a launcher prints what it measures.

    Attributes:
        step: regular expression whose first group is the time of a step, in units of ``step_unit_s``.
        tokens: one whose first group is tokens per second and device, where no time is printed.
        peak: one whose first group is the peak of a process's memory, in units of ``peak_unit_bytes``.
        peak_kind: what that peak counts: ``allocated`` or ``reserved``, as the allocator knows it.
    """

    step: str = ""
    step_unit_s: float = 1.0
    tokens: str = ""
    peak: str = ""
    peak_unit_bytes: float = 1.0
    peak_kind: str = "allocated"


STEP_LINES = Log(
    step=r"step \d+: ([\d.]+) s, peak",
    peak=r"step \d+: [\d.]+ s, peak ([\d.]+) GiB",
    peak_unit_bytes=2.0**30,
)
"""What the measuring scripts print: ``step 3: 1.2345 s, peak 12.345 GiB``."""

ITERATION_LINES = Log(
    step=r"elapsed time per iteration \(ms\): ([\d.]+)",
    step_unit_s=1e-3,
    peak=r"max allocated: ([\d.]+)",
    peak_unit_bytes=2.0**20,
)
"""What Megatron-LM's training loop prints, which Megatron-Bridge keeps; memory in MiB."""


@dataclass(frozen=True, slots=True)
class Exporter:
    """One launcher's files.

    Attributes:
        name: as ``--to`` takes it.
        title: the launcher's own name.
        versions: versions that its files are written for; the first is taken unless another is asked for.
        checked: how that was checked, in words.
        launcher: key of :data:`planner.export.launchers.LAUNCHERS` whose rules a plan must keep; empty: any plan will do.
        write: files by name, from a plan that keeps the rules, and the training script to start; ``run.sh`` is among them.
        script: the training script unless another is asked for.
        framework: as the column ``framework`` of a table of runs has it.
        log: where the launcher prints what it measures.
        first: what an operator is to check before a run, beyond what holds for every launcher.
        differs: where the run differs from the plan, one sentence each.
    """

    name: str
    title: str
    versions: tuple[str, ...]
    checked: str
    launcher: str
    write: Callable[[Target, str], Mapping[str, str]]
    script: str
    framework: str
    log: Log
    first: Callable[[Target], list[str]] = lambda target: []
    differs: Callable[[Target], list[str]] = lambda target: []


def environment_of_torchrun(target: Target) -> list[str]:
    """Shell lines that say how many nodes there are and which one this is; of several, each has to be told, and the first."""
    nodes, per_node = target.nodes()
    alone = nodes == 1
    rank = "0" if alone else "?set NODE_RANK to this node, from 0"
    address = "-localhost" if alone else "?set MASTER_ADDR to the first node"
    return [
        f"NNODES={nodes}",
        f"GPUS_PER_NODE={per_node}",
        f"NODE_RANK=${{NODE_RANK:-${{SLURM_NODEID:{'-' if alone else ''}{rank}}}}}",
        f"MASTER_ADDR=${{MASTER_ADDR:{address}}}",
        "MASTER_PORT=${MASTER_PORT:-29500}",
    ]


def torchrun_lines() -> list[str]:
    """The beginning of a torchrun command, over the variables of :func:`environment_of_torchrun`."""
    return [
        "torchrun --nnodes $NNODES --nproc-per-node $GPUS_PER_NODE --node-rank $NODE_RANK \\",
        "    --master-addr $MASTER_ADDR --master-port $MASTER_PORT \\",
    ]
