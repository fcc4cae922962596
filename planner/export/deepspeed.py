"""A plan as a DeepSpeed run: ``deepspeed.json``, a measuring script that builds the model with Transformers, and the launch.

The JSON carries batch sizes, precision, ZeRO, offload, tensor parallelism (AutoTP), Ulysses and experts (AutoEP). Pipelines are
written in Python (``PipelineModule``) and are refused. Keys, ranges and rules are those of DeepSpeed 0.19.8
(``runtime/config.py``, ``runtime/zero/config.py``, ``runtime/engine.py``, ``module_inject/auto_ep_folding.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from planner.export.exporter import STEP_LINES, Exporter, environment_of_torchrun, torchrun_lines
from planner.export.hf_rules import KERNEL_CHOICES, hf_rules, kernels_of, shape_of
from planner.export.hf_script import script_flags, train_script
from planner.export.rules import COMMON, has_experts, make_launcher
from planner.export.target import Target, summary
from planner.technique import Check, Context

__all__ = ["CHOICES", "EXPORTER", "LAUNCHER", "OPTIMIZERS", "SHORT_DTYPES", "settings"]

CHOICES: Mapping[str, str] = {
    **COMMON,
    **KERNEL_CHOICES,
    "precision": "bf16 fp16 fp32",
    "context": "p2p a2a",
    "optimizer": "adamw sgd sgd_momentum lion muon",
    "zero_stage": "0 1 2 3",
    "recompute": "none full block",
    "optimizer_offload": "none cpu cpu+gradients nvme",
    "parameter_offload": "none cpu nvme",
    "schedule": "1f1b",
}

OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "adamw": {"type": "AdamW", "params": {"lr": 1e-5}},
    "sgd": {"type": "SGD", "params": {"lr": 1e-5}},
    "sgd_momentum": {"type": "SGD", "params": {"lr": 1e-5, "momentum": 0.9}},
    "lion": {"type": "Lion", "params": {"lr": 1e-5}},
    "muon": {"type": "Muon", "params": {"lr": 1e-5}},
}
_KNOWN_TO_ZERO = ("adamw", "lion", "muon")  # is_zero_supported_optimizer; others need a permission

_DEVICES: Mapping[str, str] = {"cpu": "cpu", "cpu+gradients": "cpu", "nvme": "nvme"}
"""Choice of offload → ``device``; from ZeRO-2 on gradients lie beside the states (stage3.py: ``grad_partitions_flat_buffer``)."""
_DRIVES = "/local_nvme"  # where nodes mount their drives, as in DeepSpeed's own examples

SHORT_DTYPES: Mapping[str, str] = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}

_AUTO_EP: Mapping[str, str] = {
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3_moe",
    "deepseek_v3": "deepseek_v3",
}
"""``model_type`` → AutoEP preset."""


def _valid(ctx: Context) -> Iterable[Check]:
    mesh, knobs, stage = ctx.mesh, ctx.knobs, ctx.knobs.get("zero_stage")
    yield from hf_rules(ctx)
    yield Check("pipelines are written in Python (PipelineModule), not in the JSON", mesh.pp == 1)
    yield Check("Ulysses is the only context parallelism", (mesh.cp == 1) | (knobs["context"] == "a2a"))
    yield Check("tensor parallelism (AutoTP) and Ulysses exclude each other", (mesh.tp == 1) | (mesh.cp == 1))
    if has_experts(ctx.model):
        yield Check("expert groups inside data-parallel groups", mesh.dp % mesh.ep == 0)
        yield Check(
            "experts are cut as the dense layers, or not at all",
            mesh.etp == (mesh.tp if _one(mesh.ep) else 1),
        )
        yield Check("AutoEP beside AutoTP needs more than one expert rank", (mesh.tp == 1) | (mesh.ep > 1))
        if stage == "3":
            yield Check("expert parallelism without ZeRO-3", mesh.ep == 1)
        offloads = any(knobs.get(f"{what}_offload") in _DEVICES for what in ("optimizer", "parameter"))
        yield Check("no offload where AutoEP meets AutoTP", (mesh.tp == 1) | (not offloads))
    if stage == "0":
        same = ctx.gradient_dtype == ctx.format.activation
        yield Check("without ZeRO, gradients are accumulated in the format of the weights", same)
    gradient, activation = ctx.gradient_dtype, ctx.format.activation
    yield Check(f"{gradient} gradients of {activation} weights", gradient in ("fp32", activation))
    if knobs.get("optimizer_offload") == "nvme":
        yield Check("optimizer states on NVMe need ZeRO-3", stage == "3")
    if knobs.get("optimizer_offload") in _DEVICES:
        yield Check("optimizer offload needs ZeRO", stage != "0")
        apart, sharded = knobs["optimizer_offload"] == "cpu", stage in ("2", "3")
        yield Check("gradients go to the host with the optimizer from ZeRO-2 on", not (apart and sharded))
        yield Check("gradients stay on the device under ZeRO-1", apart or sharded)
        yield Check("optimizer offload runs Adam and Lion only", knobs["optimizer"] in ("adamw", "lion"))
    if knobs.get("parameter_offload") in _DEVICES:
        yield Check("parameter offload needs ZeRO-3", stage == "3")


def _one(degree: Any) -> bool:
    return bool((degree == 1).all())


LAUNCHER = make_launcher("deepspeed", CHOICES, _valid, native={"optimizer_offload": "cpu+gradients"})


def settings(target: Target) -> dict[str, Any]:
    """The JSON's content for a plan that keeps the rules."""
    plan, knobs, mesh = target.plan, target.knobs, target.plan.mesh
    gradient = knobs["gradient_dtype"]
    found: dict[str, Any] = {
        "train_batch_size": target.workload.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.knobs["micro_batch_size"],
        "gradient_accumulation_steps": plan.micro_batches,
        "bf16": {"enabled": knobs["precision"] == "bf16"},
        "fp16": {"enabled": knobs["precision"] == "fp16"},
        "communication_data_type": gradient,
        "data_types": {"grad_accum_dtype": gradient},
        "optimizer": dict(OPTIMIZERS[knobs["optimizer"]]),
        "zero_optimization": _zero(knobs),
        "steps_per_print": 1,
    }
    if knobs["optimizer"] not in _KNOWN_TO_ZERO:
        found["zero_allow_untested_optimizer"] = True
    if mesh["tp"] > 1:
        found["tensor_parallel"] = {"autotp_size": mesh["tp"]}
    if mesh["cp"] > 1:
        found["sequence_parallel_size"] = mesh["cp"]
    if mesh["ep"] > 1:
        preset = _AUTO_EP[shape_of(target.model).config["model_type"]]
        found["expert_parallel"] = {"enabled": True, "autoep_size": mesh["ep"], "preset_model": preset}
    return found


def _zero(knobs: Mapping[str, str]) -> dict[str, Any]:
    stage = int(knobs["zero_stage"])
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero |= {"overlap_comm": True, "contiguous_gradients": True}
    for key, slot in (("offload_optimizer", "optimizer_offload"), ("offload_param", "parameter_offload")):
        if knobs[slot] in _DEVICES:
            zero[key] = {"device": _DEVICES[knobs[slot]], "pin_memory": True}
            if knobs[slot] == "nvme":
                zero[key]["nvme_path"] = _DRIVES
    return zero


def _write(target: Target, script: str) -> dict[str, str]:
    flags = ["--deepspeed deepspeed.json", *script_flags(target)]
    lines = [
        "#!/usr/bin/env bash",
        "# DeepSpeed 0.19; plan.json holds the whole plan.",
        *(f"# {line}" for line in summary(target.plan)),
        "# Run it once per node; further arguments are passed on to the script.",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        "",
        *environment_of_torchrun(target),
        "",
        *torchrun_lines(),
        f"    {script} \\",
        *(f"    {flag} \\" for flag in flags),
        '    "$@"',
    ]
    return {
        "run.sh": "\n".join(lines) + "\n",
        "deepspeed.json": json.dumps(settings(target), indent=2) + "\n",
        "config.json": json.dumps(dict(shape_of(target.model).config), indent=2) + "\n",
        "train.py": train_script("deepspeed", target),
    }


def _first(target: Target) -> list[str]:
    found = []
    if kernels_of(target.knobs) == "liger":
        found.append("`pip show liger-kernel`: the plan counts on its fused loss.")
    if any(target.knobs[f"{what}_offload"] in _DEVICES for what in ("optimizer", "parameter")):
        found.append(
            "`ds_report`: cpu_adam must be built (or buildable) on the nodes, and pinned memory allowed (`ulimit -l`)."
        )
    if "nvme" in (target.knobs["optimizer_offload"], target.knobs["parameter_offload"]):
        found.append(f"`ds_report`: async_io must be built on the nodes, and {_DRIVES} be their own drives.")
    return found


EXPORTER = Exporter(
    name="deepspeed",
    title="DeepSpeed",
    versions=("0.19",),
    checked="DeepSpeedConfig",
    launcher="deepspeed",
    write=_write,
    script="train.py",
    framework="DeepSpeed",
    log=STEP_LINES,
    first=_first,
)
