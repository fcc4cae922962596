"""What a serving engine is to an exporter: its configuration of a pool, and the command that starts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from planner.export.serving.target import ServingTarget
from planner.serving.plan import Pool

__all__ = [
    "NO_CHECKPOINT",
    "Engine",
    "checkpoint_of",
    "eagle_method",
    "needed_beside",
    "number_format",
    "quantized_checkpoint",
]

NO_CHECKPOINT = "name-your-checkpoint"
"""What a manifest says where the plan does not know which checkpoint is served."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine.

    Attributes:
        name: as ``--to`` takes it, and as a stack's name begins.
        title: the engine's own name, as the column ``engine`` of a table of runs has it.
        versions: versions that its files are written for; the first is taken unless another is asked for.
        checked: how that was checked, in words.
        settings: the configuration file of a pool: the engine's own keys.
        command: the words that start one node's share of a replica, over the shell variables MODEL, PORT, RANK and LEADER; the
            last argument is the configuration's file name.
        environment: lines of shell in front of the command.
        router: the command that spreads requests over the replicas, over the arrays PREFILL and DECODE of addresses (one pool:
            DECODE); lines of shell.
        online: number formats that it makes of a 16-bit checkpoint while it loads it → the value of its setting.
        differs: where it runs otherwise than the plan, one sentence each.
        needs: what has to be installed beside it, one sentence each.
        router_package: what has to be installed for its router; empty where nothing has.
    """

    name: str
    title: str
    versions: tuple[str, ...]
    checked: str
    settings: Callable[[ServingTarget, Pool], Mapping[str, Any]]
    command: Callable[[ServingTarget, Pool, str], list[str]]
    router: Callable[[ServingTarget], list[str]]
    online: Mapping[str, str]
    environment: Callable[[ServingTarget, Pool], list[str]] = lambda target, pool: []
    differs: Callable[[ServingTarget], list[str]] = lambda target: []
    needs: Callable[[ServingTarget], list[str]] = lambda target: []
    router_package: str = ""


def eagle_method(head: str) -> str:
    """Which kind of draft head a checkpoint is, by its name: ``eagle``, or ``eagle3``, which reads hidden states of three layers.

    >>> eagle_method("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B")
    'eagle3'
    """
    return "eagle3" if "eagle3" in head.lower().replace("-", "") else "eagle"


def needed_beside(target: ServingTarget) -> list[str]:
    """What an engine of Python packages needs for pools and expert exchange."""
    found = []
    if target.plan.mode == "disaggregated":
        found.append(
            "`pip show nixl`: caches travel from prefill to decode through it (RDMA; `ucx_info -d` names the devices)."
        )
    if any(pool.knobs["experts"] == "exchanged" for pool in target.plan.pools):
        found.append("`python -c 'import deep_ep'`: tokens travel to experts through DeepEP.")
    return found


def number_format(engine: Engine, target: ServingTarget, pool: Pool) -> str | None:
    """The setting that narrows a 16-bit checkpoint to the plan's format; None where the checkpoint says it itself."""
    wanted = str(pool.knobs["weights"])
    return None if wanted == target.model.checkpoint else engine.online.get(wanted)


def quantized_checkpoint(engine: Engine, target: ServingTarget) -> str:
    """The format in which a checkpoint has to be found, as the engine does not make it itself; empty where there is none."""
    formats = {str(pool.knobs["weights"]) for pool in target.plan.pools}
    missing = [
        name
        for name in sorted(formats)
        if name not in ("bf16", "fp16", target.model.checkpoint) and name not in engine.online
    ]
    return ", ".join(missing)


def checkpoint_of(engine: Engine, target: ServingTarget) -> str:
    """The hub id of what is served; empty where none is known, or where the plan's format is that of another checkpoint."""
    return "" if quantized_checkpoint(engine, target) else target.checkpoint
