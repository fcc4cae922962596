"""A plan under Accelerate: ``accelerate.yaml`` (FSDP2, or DDP where nothing is sharded), a measuring script, the launch.

Keys and rules are those of Accelerate 1.15 (``commands/config/config_args.py``, ``commands/launch.py``,
``parallelism_config.py``). The YAML carries no batch sizes: the script is told them, by the names of the Trainer's arguments.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from planner.export.exporter import STEP_LINES, Exporter, environment_of_torchrun
from planner.export.hf_rules import KERNEL_CHOICES, check_first, hf_rules, kernels_of, shape_of
from planner.export.hf_script import script_flags, train_script
from planner.export.rules import COMMON, make_launcher
from planner.export.sharding import mesh_dimensions, replicas_outside, replication_rule
from planner.export.target import Target, summary
from planner.export.yaml_text import yaml_text
from planner.technique import Check, Context

__all__ = ["CHOICES", "COMM_STRATEGIES", "EXPORTER", "LAUNCHER", "fsdp_rules", "settings"]

CHOICES: Mapping[str, str] = {
    **COMMON,
    **KERNEL_CHOICES,
    "precision": "bf16 fp16 fp32",
    "context": "p2p gathered_ring",
    "optimizer": "adamw sgd sgd_momentum",
    "zero_stage": "0 2 fsdp",
    "zero_group": "full node ranks",
    "recompute": "none full block",
    "optimizer_offload": "none cpu",
    "parameter_offload": "none cpu",
    "schedule": "1f1b",
}

COMM_STRATEGIES: Mapping[str, str] = {
    "p2p": "alltoall",
    "gathered_ring": "allgather",
}
"""How keys and values travel between context-parallel ranks: the plan's word → Accelerate's."""

_OPTIMIZERS: Mapping[str, str] = {"adamw": "adamw_torch_fused", "sgd": "sgd", "sgd_momentum": "sgd_momentum"}


def fsdp_rules(ctx: Context) -> Iterable[Check]:
    """What FSDP2 under Accelerate can shard, and what it combines with."""
    mesh, knobs = ctx.mesh, ctx.knobs
    yield Check("no expert parallelism", (mesh.ep == 1) & (mesh.etp == 1))
    yield replication_rule(ctx)
    stage = knobs.get("zero_stage")
    if stage is not None:
        copies = replicas_outside(ctx)
        alone = (mesh.tp * mesh.cp == 1) | (copies == 1) | (mesh.dp > copies)
        yield Check(
            "tensor and context parallelism beside replicas need shards too (ParallelismConfig)", alone
        )
        yield Check("context parallelism needs sharded states (FSDP2)", (mesh.cp == 1) | (stage != "0"))
        yield Check("tensor parallelism needs sharded states (FSDP2)", (mesh.tp == 1) | (stage != "0"))
        yield Check("sharded states need more than one replica", (mesh.dp * mesh.cp > 1) | (stage == "0"))
    if "optimizer_offload" in knobs and "parameter_offload" in knobs:
        # CPUOffloadPolicy moves parameters, gradients and states together.
        same = knobs["optimizer_offload"] == knobs["parameter_offload"]
        yield Check("parameters and optimizer states are offloaded together", same)
        yield Check("offload needs sharded states", stage != "0" or knobs["optimizer_offload"] == "none")
    for block in ctx.model.blocks.values():
        if block.attention is not None:
            plain = block.attention.causal and not block.attention.window
            yield Check("context parallelism runs full causal attention only", (mesh.cp == 1) | plain)


def _valid(ctx: Context) -> Iterable[Check]:
    yield from hf_rules(ctx)
    yield from fsdp_rules(ctx)
    yield Check(
        "sequence length not divisible by 2·cp",
        (ctx.mesh.cp == 1) | (ctx.workload.seq_len % (2 * ctx.mesh.cp) == 0),
    )
    gradient = ctx.gradient_dtype
    yield Check(
        f"{gradient} gradients of {ctx.format.activation} weights",
        gradient in ("fp32", ctx.format.activation),
    )
    if ctx.knobs.get("zero_stage") == "0":
        # DDP reduces gradients as they are, and weights are fp32 under autocast.
        yield Check("DDP reduces gradients in fp32", gradient == "fp32")


LAUNCHER = make_launcher(
    "accelerate", CHOICES, _valid, native={"zero_stage": "fsdp", "context": "gathered_ring"}
)


def settings(target: Target) -> dict[str, Any]:
    """The YAML's content for a plan that keeps the rules."""
    knobs, (nodes, _) = target.knobs, target.nodes()
    found: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": _distributed_type(target),
        "mixed_precision": "no" if knobs["precision"] == "fp32" else knobs["precision"],
        "num_machines": nodes,
        "num_processes": target.plan.devices,
        "rdzv_backend": "static",
        "main_training_function": "main",
    }
    if found["distributed_type"] == "FSDP":
        found["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_reshard_after_forward": knobs["zero_stage"] == "fsdp",
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_transformer_layer_cls_to_wrap": shape_of(target.model).layer_class,
            "fsdp_activation_checkpointing": knobs["recompute"] == "full",
            "fsdp_offload_params": knobs["parameter_offload"] == "cpu",
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": False,
        }
        found["parallelism_config"] = _parallelism(target)
    if kernels_of(knobs) == "compile":
        found["dynamo_config"] = {"dynamo_backend": "INDUCTOR", "dynamo_use_regional_compilation": True}
    return found


def _distributed_type(target: Target) -> str:
    if target.knobs["zero_stage"] != "0":
        return "FSDP"
    return "MULTI_GPU" if target.plan.devices > 1 else "NO"


def _parallelism(target: Target) -> dict[str, Any]:
    """Sizes of the mesh; keys carry the prefix."""
    sizes = mesh_dimensions(target)
    found: dict[str, Any] = {
        f"parallelism_config_{name}_size": sizes[name] for name in ("dp_replicate", "dp_shard", "tp", "cp")
    }
    if sizes["cp"] > 1:
        found["parallelism_config_cp_backend"] = "torch"
        found["parallelism_config_cp_comm_strategy"] = COMM_STRATEGIES[target.knobs["context"]]
    return found


def _write(target: Target, script: str) -> dict[str, str]:
    knobs = target.knobs
    # The YAML compiles, and checkpoints whole models; the script is told what it has no key for.
    flags = [
        flag for flag in script_flags(target) if flag not in ("--torch_compile", "--gradient_checkpointing")
    ]
    if knobs["recompute"] == "full" and _distributed_type(target) != "FSDP":
        flags.append("--gradient_checkpointing")
    flags.append(f"--optim {_OPTIMIZERS[knobs['optimizer']]}")
    if knobs["zero_stage"] != "0":
        flags.append(f"--reduce_dtype {knobs['gradient_dtype']}")
    lines = [
        "#!/usr/bin/env bash",
        "# Accelerate 1.15; plan.json holds the whole plan.",
        *(f"# {line}" for line in summary(target.plan)),
        "# Run it once per node; further arguments are passed on to the script.",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        "",
        *environment_of_torchrun(target)[2:],
        "",
        "accelerate launch --config_file accelerate.yaml \\",
        "    --machine_rank $NODE_RANK --main_process_ip $MASTER_ADDR --main_process_port $MASTER_PORT \\",
        f"    {script} \\",
        *(f"    {flag} \\" for flag in flags),
        '    "$@"',
    ]
    return {
        "run.sh": "\n".join(lines) + "\n",
        "accelerate.yaml": yaml_text(settings(target)),
        "config.json": json.dumps(dict(shape_of(target.model).config), indent=2) + "\n",
        "train.py": train_script("accelerate", target),
    }


EXPORTER = Exporter(
    name="accelerate",
    title="Accelerate",
    versions=("1.15",),
    checked="accelerate launch's parser and ParallelismConfig",
    launcher="accelerate",
    write=_write,
    script="train.py",
    framework="PyTorch FSDP2 (Accelerate)",
    log=STEP_LINES,
    first=check_first,
)
