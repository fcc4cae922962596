"""An Accelerate configuration as the choices of a plan.

The YAML describes how ranks are laid out and what is sharded; model, sequence, batch and kernels are the script's. Accelerate
1.15 refuses unknown keys at the top, and passes those of ``fsdp_config`` and ``parallelism_config`` on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.errors import did_you_mean
from planner.export.accelerate import COMM_STRATEGIES
from planner.export.deepspeed_import import deepspeed_run
from planner.export.hf_arguments import completed, is_script, script_arguments
from planner.export.launched import LaunchedRun, beside_or_here, degrees, ignored_note, names_in, read_json
from planner.export.yaml_text import read_yaml
from planner.specs.reader import Reader

__all__ = ["accelerate_run", "read_accelerate"]

_EXPECTED = "a configuration of accelerate launch"
_KINDS = ("FSDP", "MULTI_GPU", "NO")
_PASSIVE = names_in(
    "compute_environment debug downcast_bf16 enable_cpu_affinity gpu_ids machine_rank main_process_ip "
    "main_process_port main_training_function rdzv_backend same_network tpu_env tpu_use_cluster "
    "tpu_use_sudo use_cpu"
)
_READ = names_in(
    "distributed_type mixed_precision num_machines num_processes fsdp_config parallelism_config dynamo_config"
)
_UNMODELLED: Mapping[str, str] = {"fp8_config": "fp8 recipes", "mpirun_config": "runs on CPUs under MPI"}
_DEEPSPEED = names_in(
    "zero_stage zero3_init_flag zero3_save_16bit_model offload_optimizer_device offload_param_device offload_optimizer_nvme_path "
    "offload_param_nvme_path deepspeed_multinode_launcher deepspeed_hostfile deepspeed_exclusion_filter "
    "deepspeed_inclusion_filter gradient_accumulation_steps gradient_clipping"
)
_FSDP = names_in(
    "fsdp_version fsdp_reshard_after_forward fsdp_sharding_strategy fsdp_offload_params "
    "fsdp_activation_checkpointing fsdp_auto_wrap_policy fsdp_transformer_layer_cls_to_wrap "
    "fsdp_min_num_params fsdp_state_dict_type fsdp_cpu_ram_efficient_loading fsdp_sync_module_states "
    "fsdp_use_orig_params fsdp_forward_prefetch fsdp_backward_prefetch fsdp_backward_prefetch_policy "
    "fsdp_activation_checkpointing_offload"
)
# FSDP1's strategies: (what is sharded, over which ranks).
_STRATEGIES: Mapping[str, tuple[str, str]] = {
    "FULL_SHARD": ("fsdp", "full"), "SHARD_GRAD_OP": ("2", "full"), "HYBRID_SHARD": ("fsdp", "node"),
    "HYBRID_SHARD_ZERO2": ("2", "node"), "NO_SHARD": ("0", "full"), "1": ("fsdp", "full"), "2": ("2", "full"),
}  # fmt: skip


def read_accelerate(path: str | Path) -> LaunchedRun:
    """The run that an Accelerate YAML describes, or a shell script that launches a training script with one.

    Raises:
        SpecError: the file cannot be read, or keys are wrong or ask for what is not modelled; all at once.
    """
    if not is_script(path):
        return accelerate_run(read_yaml(path, _EXPECTED), path)
    given = script_arguments(path, "a script with accelerate launch --config_file", ("--config-file",))
    assert given.config is not None
    return completed(accelerate_run(read_yaml(given.config, _EXPECTED), given.config), given)


def accelerate_run(data: Mapping[str, Any], path: str | Path) -> LaunchedRun:
    """The run that the content of an Accelerate YAML describes; ``path`` is what problems name.

    Raises:
        SpecError: keys are wrong or ask for what is not modelled; all at once.
    """
    if data.get("distributed_type") == "DEEPSPEED":
        return _deepspeed(data, path)
    reader = Reader(data, str(path))
    notes: list[str] = []
    wasteful: list[str] = []
    kind, precision = _kind(reader), _precision(reader)
    fixed: dict[str, Any] = {
        "pp": 1, "ep": 1, "etp": 1, "schedule": "1f1b", "virtual_stages": 1, "precision": precision, "sequence_parallel": "false",
        "tensor_overlap": "none", "zero_stage": "0", "zero_group": "full", "optimizer_offload": "none",
        "parameter_offload": "none", "tp": 1, "cp": 1, "context": "p2p",
    }  # fmt: skip
    devices = reader.integer("num_processes", None)
    if kind == "FSDP":
        fixed |= _fsdp(reader, notes, wasteful)
        _parallelism(reader, fixed, devices, notes)
    fixed["gradient_dtype"] = _gradient(kind, precision, notes)
    fixed |= _kernels(reader, notes)
    devices = degrees(fixed, devices, notes)
    ignored = _unknown(reader, data)
    reader.raise_if_any()
    missing = dict.fromkeys(("micro_batch_size", "global_batch_size"), "the batch sizes are the script's")
    return LaunchedRun(
        "accelerate", None, {"precisions": (precision,)}, fixed, devices, (*notes, *ignored_note(ignored)), tuple(wasteful),
        ignored, missing,
    )  # fmt: skip


def _deepspeed(data: Mapping[str, Any], path: str | Path) -> LaunchedRun:
    """The run of DeepSpeed that Accelerate starts: by a file of DeepSpeed's own, or by the few settings of its questionnaire."""
    reader = Reader(data, str(path))
    table = reader.table("deepspeed_config", None)
    settings = dict(table.data) if table is not None else {}
    if isinstance(settings.get("deepspeed_config_file"), str):
        own = beside_or_here(path, settings["deepspeed_config_file"])
        return deepspeed_run(read_json(own, "a DeepSpeed configuration"), own)
    reader.raise_if_any()
    precision = str(data.get("mixed_precision", "no"))
    zero: dict[str, Any] = {"stage": settings.get("zero_stage", 2)}
    for key in ("offload_optimizer", "offload_param"):
        device = settings.get(f"{key}_device", "none")
        if device != "none":
            zero[key] = {"device": device}
    inner: dict[str, Any] = {"zero_optimization": zero}
    if precision in ("bf16", "fp16"):
        inner[precision] = {"enabled": True}
    run = deepspeed_run(inner, path)
    fixed, notes = dict(run.fixed), list(run.notes)
    devices = degrees(fixed, reader.integer("num_processes", None), notes)
    reader.raise_if_any()
    strange = sorted(set(settings) - _DEEPSPEED)
    return replace(
        run, fixed=fixed, devices=devices, notes=(*notes, *ignored_note(strange)), ignored=tuple(strange)
    )


def _kind(reader: Reader) -> str:
    key = "distributed_type"
    kind = str(reader.text(key, "NO"))
    if kind == "MEGATRON_LM":
        reader.problem(key, kind, "FSDP, DEEPSPEED, MULTI_GPU or NO")
    elif kind not in _KINDS:
        reader.problem(key, repr(kind), f"one of {', '.join(_KINDS)}", did_you_mean(kind, _KINDS))
    return kind


def _precision(reader: Reader) -> str:
    said = str(reader.data.get("mixed_precision", "no"))
    precision = {"no": "fp32", "False": "fp32"}.get(said, said)
    if precision in ("fp32", "bf16", "fp16"):
        return precision
    reader.problem("mixed_precision", f"{precision}: not modelled", "no, bf16 or fp16")
    return "bf16"


def _gradient(kind: str, precision: str, notes: list[str]) -> str:
    """DDP reduces fp32 gradients; FSDP2 in the format of the computation, unless a script sets a policy of its own."""
    if kind != "FSDP":
        return "fp32"
    if precision != "fp32":
        as_it_is = "as Accelerate does unless the script sets a policy"
        notes.append(f"Gradients are reduced in {precision}, {as_it_is}: --fix gradient_dtype.")
    return precision


def _kernels(reader: Reader, notes: list[str]) -> dict[str, str]:
    dynamo = reader.table("dynamo_config", None)
    if dynamo is not None and str(dynamo.data.get("dynamo_backend", "NO")).upper() not in ("NO", ""):
        return {"elementwise_kernel": "fused", "loss_kernel": "fused"}
    notes.append(
        "Kernels are taken as PyTorch runs them by itself; with Liger's: --fix elementwise_kernel=fused …"
    )
    return {"elementwise_kernel": "eager", "loss_kernel": "log_softmax"}


def _flag(reader: Reader, key: str, default: bool) -> bool:
    """A switch, which users write as true or as text."""
    value = reader.data.get(key, default)
    if str(value).lower() not in ("true", "false"):
        reader.problem(key, repr(value), "true or false")
        return default
    return str(value).lower() == "true"


def _fsdp(reader: Reader, notes: list[str], wasteful: list[str]) -> dict[str, Any]:
    table = reader.table("fsdp_config", None)
    if table is None:
        if "fsdp_config" not in reader.data:
            reader.problem("fsdp_config", "is missing", "a map, as distributed_type is FSDP")
        return {}
    notes += _strangers(table, "fsdp_config", _FSDP)
    version = (
        int(table.data.get("fsdp_version", 1)) if str(table.data.get("fsdp_version", 1)).isdigit() else 0
    )
    if version not in (1, 2):
        table.problem("fsdp_version", repr(table.data.get("fsdp_version")), "1 or 2")
    found: dict[str, Any] = {"zero_group": "full"}
    if version == 2:
        found["zero_stage"] = "fsdp" if _flag(table, "fsdp_reshard_after_forward", True) else "2"
    else:
        strategy = str(
            table.data.get(
                "fsdp_reshard_after_forward", table.data.get("fsdp_sharding_strategy", "FULL_SHARD")
            )
        ).upper()
        if strategy not in _STRATEGIES:
            table.problem(
                "fsdp_sharding_strategy",
                strategy,
                f"one of {', '.join(_STRATEGIES)}",
                did_you_mean(strategy, _STRATEGIES),
            )
        found["zero_stage"], found["zero_group"] = _STRATEGIES.get(strategy, ("fsdp", "full"))
        wasteful.append("FSDP1 keeps weights flat and is deprecated: fsdp_version: 2 shards each weight.")
    found["recompute"] = "full" if _flag(table, "fsdp_activation_checkpointing", False) else "none"
    if found["recompute"] == "none":
        notes.append("If the script itself recomputes (gradient_checkpointing): --fix recompute=full.")
    if _flag(table, "fsdp_activation_checkpointing_offload", False):
        table.problem(
            "fsdp_activation_checkpointing_offload", "activations on the host: not modelled", "false"
        )
    offload = "cpu" if _flag(table, "fsdp_offload_params", False) else "none"
    if str(table.data.get("fsdp_auto_wrap_policy", "NO_WRAP")).upper() == "NO_WRAP":
        wasteful.append("Without fsdp_auto_wrap_policy, the whole model is one unit: it is gathered at once.")
    return {**found, "optimizer_offload": offload, "parameter_offload": offload}


def _parallelism(reader: Reader, fixed: dict[str, Any], devices: int | None, notes: list[str]) -> None:
    table = reader.table("parallelism_config", None)
    if table is None:
        return
    prefix = "parallelism_config_"
    known = {f"{prefix}{name}" for name in ("cp_backend", "sp_backend", "cp_comm_strategy", "sp_seq_length")}
    sizes = {
        name: table.integer(f"{prefix}{name}_size", 1)
        for name in ("dp_replicate", "dp_shard", "tp", "cp", "sp")
    }
    if sizes["sp"] > 1:
        table.problem(
            f"{prefix}sp_size",
            "Ulysses runs under DeepSpeed",
            "1",
            "Read the DeepSpeed file with --from deepspeed.",
        )
    product = sizes["dp_replicate"] * sizes["dp_shard"] * sizes["tp"] * sizes["cp"]
    if devices is not None and product != devices:
        reader.problem(
            "num_processes",
            f"{devices}, while the sizes of parallelism_config make {product}",
            "their product",
        )
    strategy = str(table.data.get(f"{prefix}cp_comm_strategy", "allgather"))
    named = {word: knob for knob, word in COMM_STRATEGIES.items()}
    if strategy not in named:
        table.problem(f"{prefix}cp_comm_strategy", repr(strategy), f"one of {', '.join(named)}")
    if sizes["cp"] > 1:
        fixed["context"] = named.get(strategy, "p2p")
    fixed |= {"tp": sizes["tp"], "cp": sizes["cp"]}
    if sizes["dp_replicate"] > 1:
        _replicas(fixed, sizes)
    notes += _strangers(table, "parallelism_config", {*known, *(f"{prefix}{name}_size" for name in sizes)})


def _strangers(table: Reader, section: str, known: Collection[str]) -> list[str]:
    """Keys of a section that are passed on and not understood, one sentence each."""
    strange = [key for key in table.data if key not in known]
    return [
        f"{section}.{key} is passed on and not understood. {did_you_mean(key, known)}".rstrip()
        for key in strange
    ]


def _replicas(fixed: dict[str, Any], sizes: Mapping[str, int]) -> None:
    """Hybrid sharding: groups of neighbouring ranks, whose size the plan names."""
    group = sizes["dp_shard"] * sizes["cp"]
    if group == 1:
        fixed |= {"zero_stage": "0", "zero_group": "full"}
    else:
        fixed |= {"zero_group": "ranks", "zero_group_ranks": group}


def _unknown(reader: Reader, data: Mapping[str, Any]) -> tuple[str, ...]:
    reader.refuse(_UNMODELLED)
    for key in data:
        if key not in _PASSIVE | _READ | _UNMODELLED.keys():
            hint = did_you_mean(key, _PASSIVE | _READ)
            reader.problem(key, "unknown key, which Accelerate refuses", "", hint)
    return tuple(sorted(key for key in data if key in _PASSIVE))
