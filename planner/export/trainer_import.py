"""Arguments of the Transformers Trainer as a job and the choices of a plan: a JSON or YAML of ``TrainingArguments``.

The Trainer hands what it is told about FSDP and the mesh on to Accelerate, so that this is Accelerate's file under other names,
beside the arguments that a launch script gives otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.errors import Problem, SpecError
from planner.export.accelerate_import import accelerate_run
from planner.export.deepspeed_import import deepspeed_run
from planner.export.flags import FlagReader
from planner.export.hf_arguments import Arguments, completed, filled
from planner.export.launched import LaunchedRun, beside_or_here, read_json
from planner.export.yaml_text import read_yaml

__all__ = ["read_trainer"]

_EXPECTED = "arguments of the Transformers Trainer (JSON or YAML)"
_OURS = "measuring_run"  # of an exported folder: what its script is told beside the Trainer
_ACCELERATE = ("fsdp", "fsdp_config", "parallelism_config")
_DEGREES = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size")


def read_trainer(path: str | Path) -> LaunchedRun:
    """The run that a file of the Trainer's arguments describes.

    Raises:
        SpecError: the file cannot be read, or holds what is wrong or not modelled; all at once.
    """
    data = read_yaml(path, _EXPECTED)  # JSON is YAML
    if "per_device_train_batch_size" not in data:
        raise SpecError(Problem(str(path), "names no per_device_train_batch_size", _EXPECTED))
    given = _arguments(data, str(path))
    if isinstance(data.get("deepspeed"), str):
        config = beside_or_here(path, data["deepspeed"])
        return completed(
            deepspeed_run(filled(read_json(config, "a DeepSpeed configuration"), given), config), given
        )
    return replace(completed(accelerate_run(_settings(data), path), given), launcher="transformers")


def _arguments(data: Mapping[str, Any], where: str) -> Arguments:
    """What a command line would say."""
    script = data.get(_OURS)
    told = {**data, **(script if isinstance(script, Mapping) else {})}
    flags = {
        f"--{key.replace('_', '-')}": []
        if value is True
        else [value if isinstance(value, str) else json.dumps(value, default=str)]
        for key, value in told.items()
        if value not in (None, False, "") and key not in (*_ACCELERATE, _OURS, "deepspeed")
    }
    mesh = data.get("parallelism_config")
    sizes = [mesh.get(name, 1) for name in _DEGREES] if isinstance(mesh, Mapping) else []
    devices = None
    if sizes and all(isinstance(size, int) and size > 0 for size in sizes):
        devices = sizes[0] * sizes[1] * sizes[2] * sizes[3]
    found = Arguments(FlagReader(flags, where), {}, devices)
    found.flags.read |= {"--bf16", "--fp16"}
    return found


def _settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """The same for Accelerate: its own names have prefixes."""
    found: dict[str, Any] = {
        "distributed_type": "FSDP" if data.get("fsdp") else "MULTI_GPU",
        "mixed_precision": "bf16" if data.get("bf16") else "fp16" if data.get("fp16") else "no",
    }
    if data.get("torch_compile"):
        found["dynamo_config"] = {"dynamo_backend": str(data.get("torch_compile_backend", "inductor"))}
    for name, prefix in (("fsdp_config", "fsdp_"), ("parallelism_config", "parallelism_config_")):
        table = data.get(name)
        if isinstance(table, Mapping):
            found[name] = {f"{prefix}{_own(str(key), prefix)}": _plain(value) for key, value in table.items()}
        elif table is not None and not (name == "fsdp_config" and not data.get("fsdp")):
            found[name] = table
    return found


def _own(key: str, prefix: str) -> str:
    """Accelerate's name without its prefix."""
    return {"cpu_offload": "offload_params"}.get(key, key.removeprefix(prefix))


def _plain(value: Any) -> Any:
    """The Trainer takes classes as a list, Accelerate as words."""
    return ",".join(map(str, value)) if isinstance(value, list) else value
