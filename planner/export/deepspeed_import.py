"""A DeepSpeed configuration as a job and the choices of a plan.

The JSON does not describe the model or the sequence; ``"auto"`` is what the Transformers Trainer replaces by its own arguments,
and leaves a value open here. DeepSpeed 0.19 refuses unknown keys inside ``zero_optimization``, elsewhere it accepts them
silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from planner.errors import did_you_mean
from planner.export.deepspeed import OPTIMIZERS
from planner.export.hf_arguments import AUTO, completed, filled, is_script, script_arguments
from planner.export.launched import LaunchedRun, ignored_note, names_in, read_json
from planner.specs.reader import Reader

__all__ = ["deepspeed_run", "read_deepspeed"]

_EXPECTED = "a DeepSpeed configuration"
_CONFIGS = ("--deepspeed", "--deepspeed-config", "--ds-config", "--deepspeed-config-file", "--config-file")
_BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

# Fields and aliases of DeepSpeedZeroConfig (runtime/zero/config.py, 0.19.8) that do not change what is priced.
_ZERO_PASSIVE = names_in(
    "allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm "
    "contiguous_gradients cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks "
    "gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module legacy_stage1 "
    "load_from_fp32_weights log_trace_cache_warnings max_live_parameters max_reuse_distance "
    "memory_efficient_linear model_persistence_threshold module_granularity_threshold "
    "override_module_apply param_persistence_threshold parameter_alignment pipeline_loading_checkpoint "
    "prefetch_bucket_size reduce_bucket_size reduce_scatter round_robin_gradients "
    "save_muon_momentum_buffer_in_memory stage3_allgather_sequential "
    "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
    "stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold "
    "stage3_module_granularity_threshold stage3_param_persistence_threshold stage3_prefetch_bucket_size "
    "stage3_use_all_reduce_for_fetch_params sub_group_size use_all_reduce_for_fetch_params "
    "use_multi_rank_bucket_allreduce"
)
_ZERO_UNMODELLED: Mapping[str, str] = {
    "zenflow": "an optimizer that runs beside the step",
    "zero_quantized_gradients": "quantised collectives (ZeRO++)",
    "zero_quantized_weights": "quantised collectives (ZeRO++)",
    "zero_quantized_nontrainable_weights": "quantised collectives (ZeRO++)",
}
_PASSIVE = names_in(
    "checkpoint comms_logger communication_data_type csv_monitor dataloader_drop_last disable_allgather "
    "dump_state elasticity flops_profiler gradient_clipping gradient_predivide_factor "
    "load_universal_checkpoint memory_breakdown monitor_config prescale_gradients scheduler "
    "seq_parallel_communication_data_type steps_per_print tensorboard vocabulary_size "
    "wall_clock_breakdown wandb zero_allow_untested_optimizer zero_force_ds_cpu_optimizer"
)
_UNMODELLED: Mapping[str, str] = {
    "sparse_attention": "sparse attention",
    "compression_training": "compression",
    "curriculum_learning": "sequences of changing length",
    "progressive_layer_drop": "layers that are dropped",
    "sparse_gradients": "sparse gradients",
}


def read_deepspeed(path: str | Path) -> LaunchedRun:
    """The run that a DeepSpeed JSON describes, or a shell script that starts a training script with one.

    Raises:
        SpecError: the file cannot be read, or keys are wrong or ask for what is not modelled; all at once.
    """
    if not is_script(path):
        return deepspeed_run(read_json(path, _EXPECTED), path)
    given = script_arguments(path, "a script that names its DeepSpeed configuration", _CONFIGS)
    assert given.config is not None
    return completed(deepspeed_run(filled(read_json(given.config, _EXPECTED), given), given.config), given)


def deepspeed_run(data: Mapping[str, Any], path: str | Path) -> LaunchedRun:
    """The run that the content of a DeepSpeed JSON describes; ``path`` is what problems name.

    Raises:
        SpecError: keys are wrong or ask for what is not modelled; all at once.
    """
    reader = Reader({key: value for key, value in data.items() if value != AUTO}, str(path))
    precision, optimizer = _precision(reader), _optimizer(reader)
    fixed: dict[str, Any] = {
        "pp": 1, "schedule": "1f1b", "virtual_stages": 1, "precision": precision, "sequence_parallel": "false",
        "tensor_overlap": "none", **_zero(reader), "gradient_dtype": _gradient(reader, precision),
        "optimizer": optimizer, **_degrees(reader),
    }  # fmt: skip
    fixed |= _batches(reader)
    reader.table("activation_checkpointing", None)  # says how layers are recomputed, not whether
    ignored = _unknown(reader, data)
    reader.raise_if_any()
    workload: dict[str, Any] = {"optimizer": optimizer, "precisions": (precision,)}
    if "train_batch_size" in reader.data:
        workload["global_batch_size"] = reader.data["train_batch_size"]
    devices = fixed["dp"] * fixed["tp"] * fixed["cp"] if "dp" in fixed else None
    return LaunchedRun(
        "deepspeed", None, workload, fixed, devices, (*_notes(reader, data), *ignored_note(ignored)),
        tuple(_wasteful(data, fixed)), ignored, _missing(data),
    )  # fmt: skip


def _degrees(reader: Reader) -> dict[str, Any]:
    tp, cp = (
        _degree(reader, "tensor_parallel", "autotp_size") or 1,
        reader.integer("sequence_parallel_size", 1),
    )
    ep = _expert_degree(reader)
    return {"tp": tp, "cp": cp, "context": "a2a" if cp > 1 else "p2p", "ep": ep, "etp": tp if ep == 1 else 1}


def _batches(reader: Reader) -> dict[str, int]:
    """Size of micro-batches, and the replicas that follow from all three sizes; what is open is left out."""
    batch, micro, steps = (reader.integer(key, None) for key in _BATCHES)
    found = {} if micro is None else {"micro_batch_size": micro}
    if None in (batch, micro, steps):
        return found
    replicas, left = divmod(batch, micro * steps)
    if left or not replicas:
        what = f"{batch}, no multiple of {micro} · {steps} (micro-batch · gradient_accumulation_steps)"
        reader.problem("train_batch_size", what, "micro-batch · accumulation steps · data-parallel ranks")
    return found | {"dp": replicas}


def _missing(data: Mapping[str, Any]) -> dict[str, str]:
    """What nothing can be priced without, and what the file says instead."""
    needed = {"global_batch_size": _BATCHES[0], "micro_batch_size": _BATCHES[1]}
    said = {knob: (key, data.get(key)) for knob, key in needed.items()}
    return {
        knob: f"{key} is {'auto' if value == AUTO else 'not given'}"
        for knob, (key, value) in said.items()
        if value in (None, AUTO)
    }


def _notes(reader: Reader, data: Mapping[str, Any]) -> Iterator[str]:
    """What was left open or taken for granted."""
    autos = [key for key in _BATCHES if data.get(key) == AUTO]
    if autos:
        yield f'"auto" is left open, as the Trainer fills it in: {", ".join(autos)}.'
    yield "Whether layers are recomputed and which kernels run is the script's: none and fused ones are taken (--fix)."
    if "optimizer" not in reader.data:
        yield "No optimizer is named: adamw is taken."
    batch, micro, steps = (key in reader.data for key in _BATCHES)
    if batch and steps and not micro:
        yield "The micro-batch size follows from train_batch_size, gradient_accumulation_steps and the devices."


def _precision(reader: Reader) -> str:
    on = {}
    for name in ("bf16", "fp16"):
        table = reader.table(name, None)
        enabled = table.data.get("enabled") if table is not None else False
        if enabled == AUTO:
            table.problem("enabled", "'auto', which only the Trainer fills in", "true or false")
        on[name] = enabled is True
    if all(on.values()):
        reader.problem("fp16", "is enabled beside bf16", "one of them")
    autocast = reader.table("torch_autocast", None)
    if autocast is not None and autocast.data.get("enabled") is True:
        autocast.problem("enabled", "autocast over fp32 weights: not modelled", "bf16 or fp16")
    return "bf16" if on["bf16"] else "fp16" if on["fp16"] else "fp32"


def _zero(reader: Reader) -> dict[str, Any]:
    zero = reader.table("zero_optimization", None)
    choice = {
        "zero_stage": "0",
        "zero_group": "full",
        "optimizer_offload": "none",
        "parameter_offload": "none",
    }
    if zero is None:
        return choice
    if zero.data.get("stage") == AUTO:
        zero.problem("stage", "'auto', which only the Trainer fills in", "0, 1, 2 or 3")
        return choice
    choice["zero_stage"] = str(zero.integer("stage", 0, minimum=0, maximum=3))
    for key, slot in (("offload_optimizer", "optimizer_offload"), ("offload_param", "parameter_offload")):
        choice[slot] = _offload(zero, key)
    if zero.data.get("cpu_offload") is True:
        choice["optimizer_offload"] = "cpu"
    if choice["optimizer_offload"] == "cpu" and choice["zero_stage"] in ("2", "3"):
        choice["optimizer_offload"] = "cpu+gradients"
    if choice["parameter_offload"] != "none" and choice["zero_stage"] != "3":
        zero.problem("offload_param", f"beside stage {choice['zero_stage']}", "stage 3")
    if choice["optimizer_offload"] == "nvme" and choice["zero_stage"] != "3":
        zero.problem("offload_optimizer", f"nvme beside stage {choice['zero_stage']}", "stage 3")
    group = zero.data.get("zero_hpz_partition_size", 1)
    if isinstance(group, int) and group > 1:
        zero.problem(
            "zero_hpz_partition_size",
            f"{group}: a second copy of the weights inside nodes is not modelled",
            "1",
        )
    zero.refuse(_ZERO_UNMODELLED)
    known = {
        *_ZERO_PASSIVE,
        *_ZERO_UNMODELLED,
        "stage",
        "offload_optimizer",
        "offload_param",
        "cpu_offload",
        "overlap_comm",
    }
    known |= {"cpu_offload_param", "zero_hpz_partition_size"}
    for key in zero.data:
        if key not in known:
            zero.problem(key, "unknown key, which DeepSpeed refuses", "", did_you_mean(key, known))
    return choice


def _offload(zero: Reader, key: str) -> str:
    table = zero.table(key, None)
    if table is None:
        return "none"
    device = table.text("device", "none")
    if device not in ("cpu", "nvme", "none"):
        table.problem("device", repr(device), "cpu, nvme or none")
    if table.number("ratio", 1.0) != 1.0:
        table.problem("ratio", "offload of a part is not modelled", "1.0")
    return device if device in ("cpu", "nvme") else "none"


def _gradient(reader: Reader, precision: str) -> str:
    """Dtype in which gradients are accumulated: that of the weights unless ``data_types`` says otherwise."""
    table = reader.table("data_types", None)
    named = table.text("grad_accum_dtype", None) if table is not None else None
    if named is None:
        return precision
    if named not in ("fp32", "fp16", "bf16"):
        assert table is not None
        table.problem("grad_accum_dtype", repr(named), "fp32, fp16 or bf16")
        return precision
    return str(named)


def _optimizer(reader: Reader) -> str:
    table = reader.table("optimizer", None)
    if table is None:
        return "adamw"
    kind = table.text("type", "AdamW")
    names = {str(entry["type"]).lower(): name for name, entry in OPTIMIZERS.items() if name != "sgd_momentum"}
    names |= {"adam": "adamw"}
    if kind.lower() not in names:
        table.problem("type", f"{kind}: not modelled", f"one of {', '.join(sorted(names))}")
        return "adamw"
    name = names[kind.lower()]
    parameters = table.data.get("params")
    momentum = parameters.get("momentum", 0.0) if isinstance(parameters, Mapping) else 0.0
    return "sgd_momentum" if name == "sgd" and momentum and momentum != AUTO else name


def _degree(reader: Reader, section: str, key: str) -> int:
    table = reader.table(section, None)
    return 0 if table is None else int(table.integer(key, 0, minimum=0))


def _expert_degree(reader: Reader) -> int:
    table = reader.table("expert_parallel", None)
    if table is None or table.data.get("enabled") is not True:
        return 1
    return int(table.integer("autoep_size", 1))


def _unknown(reader: Reader, data: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys at the top that say nothing about time and memory, or that DeepSpeed does not know: it accepts both."""
    read = {
        *_BATCHES, "bf16", "fp16", "torch_autocast", "zero_optimization", "data_types", "optimizer", "tensor_parallel",
        "sequence_parallel_size", "expert_parallel", "activation_checkpointing", "pipeline",
    }  # fmt: skip
    reader.refuse(_UNMODELLED)
    found = []
    for key in data:
        if key in read or key in _UNMODELLED:
            continue
        hint = "" if key in _PASSIVE else did_you_mean(key, {*read, *_PASSIVE})
        found.append(
            f"{key} ({hint.rstrip('?').replace('Did you mean', 'DeepSpeed does not know it; perhaps')})"
            if hint
            else key
        )
    return tuple(sorted(found))


def _wasteful(data: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[str]:
    zero = data.get("zero_optimization")
    zero = zero if isinstance(zero, Mapping) else {}
    found = []
    if fixed["zero_stage"] in ("1", "2") and zero.get("overlap_comm") is not True:
        found.append("Without overlap_comm, gradients are reduced after the backward instead of beside it.")
    if fixed["optimizer_offload"] in ("cpu", "cpu+gradients") and not dict(
        zero.get("offload_optimizer") or {}
    ).get("pin_memory"):
        found.append("offload_optimizer without pin_memory copies through pageable memory.")
    if fixed["parameter_offload"] == "cpu" and not dict(zero.get("offload_param") or {}).get("pin_memory"):
        found.append("offload_param without pin_memory copies through pageable memory.")
    if fixed["zero_stage"] == "0" and fixed.get("dp", 2) > 1:
        found.append("Without zero_optimization, every replica keeps all optimizer states.")
    slow = [name for name in ("wall_clock_breakdown", "memory_breakdown") if data.get(name) is True]
    found += [f"{name} waits for the device around every phase." for name in slow]
    return found
