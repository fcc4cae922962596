"""A plan as a Megatron-Bridge recipe: ``recipe.py``, a function that returns the configuration, and the launch.

Megatron-Bridge configures Megatron-Core by fields where Megatron-LM has flags; the recipe is the plan's flags, field by field.
The model comes from a Transformers configuration of the same shape. Fields are those of megatron-bridge 0.6.2
(``training/config.py``, ``training/mixed_precision.py``, ``training/comm_overlap.py``) over megatron-core 0.19.2.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from planner.errors import ExportError, Problem
from planner.export.exporter import ITERATION_LINES, Exporter, environment_of_torchrun, torchrun_lines
from planner.export.flags import Flags
from planner.export.hf_model import hf_model
from planner.export.hf_rules import shape_of
from planner.export.megatron import differs_of_core, first_of_core, megatron_sections
from planner.export.megatron_rules import CHOICES as MEGATRON
from planner.export.megatron_rules import LAUNCHER as MEGATRON_LAUNCHER
from planner.export.rules import make_launcher
from planner.export.target import Target, summary
from planner.technique import Check, Context

__all__ = ["CHOICES", "EXPORTER", "FIELDS", "LAUNCHER", "assignments"]

CHOICES: Mapping[str, str] = {
    **MEGATRON,
    "optimizer": "adamw sgd sgd_momentum",
    "precision": "bf16 fp16 fp8 mxfp8 nvfp4",
}


def _valid(ctx: Context) -> Iterable[Check]:
    yield from MEGATRON_LAUNCHER.valid(ctx)
    shape = hf_model(ctx.model)
    yield Check("no Transformers class that is known here has this model's shape", shape is not None)
    if shape is not None:
        # AutoBridge has converters for these.
        yield Check(f"no bridge for {shape.config['model_type']}", shape.config["model_type"] != "gpt2")


LAUNCHER = make_launcher("megatron-bridge", CHOICES, _valid)

_PRECISIONS: Mapping[str, str] = {
    "bf16": "bf16_mixed",
    "fp16": "fp16_mixed",
    "fp8": "bf16_with_fp8_current_scaling_mixed",
    "mxfp8": "bf16_with_mxfp8_mixed",
    "nvfp4": "bf16_with_nvfp4_mixed",
}

FIELDS: Mapping[str, tuple[str, ...]] = {
    "--tensor-model-parallel-size": ("model.tensor_model_parallel_size",),
    "--pipeline-model-parallel-size": ("model.pipeline_model_parallel_size",),
    "--context-parallel-size": ("model.context_parallel_size",),
    "--sequence-parallel": ("model.sequence_parallel",),
    "--cp-comm-type": ("model.cp_comm_type",),
    "--hierarchical-context-parallel-sizes": ("model.hierarchical_context_parallel_sizes",),
    "--expert-model-parallel-size": ("model.expert_model_parallel_size",),
    "--expert-tensor-parallel-size": ("model.expert_tensor_parallel_size",),
    "--moe-token-dispatcher-type": ("model.moe_token_dispatcher_type",),
    "--moe-flex-dispatcher-backend": ("model.moe_flex_dispatcher_backend",),
    "--high-priority-a2a-comm-stream": ("model.high_priority_a2a_comm_stream",),
    "--moe-grouped-gemm": ("model.moe_grouped_gemm",),
    "--moe-expert-capacity-factor": ("model.moe_expert_capacity_factor",),
    "--moe-pad-expert-input-to-capacity": ("model.moe_pad_expert_input_to_capacity",),
    "--account-for-embedding-in-pipeline-split": ("model.account_for_embedding_in_pipeline_split",),
    "--account-for-loss-in-pipeline-split": ("model.account_for_loss_in_pipeline_split",),
    "--num-virtual-stages-per-pipeline-rank": ("model.virtual_pipeline_model_parallel_size",),
    "--pipeline-model-parallel-layout": ("model.pipeline_model_parallel_layout",),
    "--microbatch-group-size-per-virtual-pipeline-stage": ("model.microbatch_group_size_per_vp_stage",),
    "--micro-batch-size": ("train.micro_batch_size",),
    "--global-batch-size": ("train.global_batch_size",),
    "--optimizer": ("optimizer.optimizer",),
    "--sgd-momentum": ("optimizer.sgd_momentum",),
    "--use-distributed-optimizer": ("ddp.use_distributed_optimizer", "optimizer.use_distributed_optimizer"),
    "--use-megatron-fsdp": ("ddp.use_megatron_fsdp",),
    "--data-parallel-sharding-strategy": ("ddp.data_parallel_sharding_strategy",),
    "--ckpt-format": ("checkpoint.ckpt_format",),
    "--megatron-fsdp-main-grads-dtype": ("ddp.megatron_fsdp_main_grads_dtype",),
    "--megatron-fsdp-grad-comm-dtype": ("ddp.megatron_fsdp_grad_comm_dtype",),
    "--num-distributed-optimizer-instances": ("ddp.num_distributed_optimizer_instances",),
    "--overlap-grad-reduce": ("ddp.overlap_grad_reduce",),
    "--overlap-param-gather": ("ddp.overlap_param_gather",),
    "--optimizer-cpu-offload": ("optimizer.optimizer_cpu_offload",),
    "--optimizer-offload-fraction": ("optimizer.optimizer_offload_fraction",),
    "--use-precision-aware-optimizer": ("optimizer.use_precision_aware_optimizer",),
    "--recompute-granularity": ("model.recompute_granularity",),
    "--recompute-method": ("model.recompute_method",),
    "--recompute-num-layers": ("model.recompute_num_layers",),
    "--recompute-modules": ("model.recompute_modules",),
    "--distribute-saved-activations": ("model.distribute_saved_activations",),
    "--cross-entropy-loss-fusion": ("model.cross_entropy_loss_fusion",),
    "--cross-entropy-fusion-impl": ("model.cross_entropy_fusion_impl",),
}
"""Flag of Megatron-LM → fields of ``ConfigContainer`` that mean the same."""

_OFF = ("--no-gradient-accumulation-fusion", "--sequence-parallel", "--use-distributed-optimizer", "--use-megatron-fsdp",
        "--overlap-grad-reduce", "--overlap-param-gather", "--cross-entropy-loss-fusion")  # fmt: skip
"""Switches that a recipe's base may have turned on: written as False where the plan lacks them."""

_LISTS = ("--recompute-modules", "--hierarchical-context-parallel-sizes")
_DTYPES = ("--megatron-fsdp-main-grads-dtype", "--megatron-fsdp-grad-comm-dtype")
_TORCH: Mapping[str, str] = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}
_EXPERT_OVERLAP = "--overlap-moe-expert-parallel-comm"
_SAID_OTHERWISE = frozenset(
    {
        _EXPERT_OVERLAP,
        "--bf16", "--fp16", "--fp8-format", "--fp8-recipe", "--fp4-format", "--fp4-recipe", "--grad-reduce-in-bf16",
        "--accumulate-allreduce-grads-in-fp32", "--attention-backend", "--tp-comm-overlap", "--no-gradient-accumulation-fusion",
    }
)  # fmt: skip


def assignments(target: Target) -> dict[str, str]:
    """Field → Python expression, in order, for a plan that keeps the rules.

    Raises:
        ExportError: a flag of the plan has no field.
    """
    sections = megatron_sections(target)
    flags: Flags = {
        flag: values
        for name, held in sections.items()
        if name != "MODEL_ARGS"
        for flag, values in held.items()
    }
    unknown = sorted(set(flags) - set(FIELDS) - _SAID_OTHERWISE)
    if unknown:
        raise ExportError([Problem("--to megatron-bridge", f"has no field for {flag}") for flag in unknown])
    found: dict[str, str] = {
        "model.seq_length": str(target.workload.seq_len),
        "dataset.seq_length": str(target.workload.seq_len),
    }
    for flag, fields in FIELDS.items():
        if flag in flags or flag in _OFF:
            found |= dict.fromkeys(fields, _expression(flag, flags.get(flag)))
    if any(block.moe and block.moe.shared_ffn for block in target.model.blocks.values()):
        found["model.moe_shared_expert_overlap"] = "False"  # some of the bridges turn it on
    fused = "--no-gradient-accumulation-fusion" not in flags
    found["model.gradient_accumulation_fusion"] = str(fused)
    found["model.attention_backend"] = f"AttnBackend.{flags['--attention-backend'][0]}"
    found["mixed_precision"] = f"get_mixed_precision_config({_PRECISIONS[target.knobs['precision']]!r})"
    found["mixed_precision.grad_reduce_in_fp32"] = str(target.knobs["gradient_dtype"] == "fp32")
    experts = ", overlap_moe_expert_parallel_comm=True" if _EXPERT_OVERLAP in flags else ""
    found["comm_overlap"] = f"CommOverlapConfig(tp_comm_overlap={'--tp-comm-overlap' in flags}{experts})"
    if target.plan.mesh["pp"] > 1:
        found["model.pipeline_dtype"] = _TORCH["fp16" if target.knobs["precision"] == "fp16" else "bf16"]
    return found


def _expression(flag: str, values: list[Any] | None) -> str:
    """A flag's values as Python; a switch is True, one that is not given False."""
    if values is None:
        return "False"
    if not values:
        return "True"
    if flag in _LISTS:
        return repr(values)
    if flag in _DTYPES:
        return _TORCH[str(values[0])]
    value = values[0]
    try:
        return repr(value if isinstance(value, int) else float(value))
    except ValueError:
        return repr(value)


def _write(target: Target, script: str) -> dict[str, str]:
    body = "\n".join(f"    cfg.{field} = {expression}" for field, expression in assignments(target).items())
    fsdp = target.knobs["zero_stage"] in ("2", "3")
    blackwell = target.cluster.device.generation.startswith("blackwell")
    ordered = not fsdp and not blackwell and target.plan.mesh["tp"] * target.plan.mesh["cp"] > 1
    lines = [
        "#!/usr/bin/env bash",
        "# Megatron-Bridge 0.6; plan.json holds the whole plan.",
        *(f"# {line}" for line in summary(target.plan)),
        "# Run it once per node.",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        "",
        *environment_of_torchrun(target),
        *(
            [
                "export CUDA_DEVICE_MAX_CONNECTIONS=1  # launches stay in order, so that communication starts first"
            ]
            if ordered
            else []
        ),
        *(
            ["unset CUDA_DEVICE_MAX_CONNECTIONS  # Megatron-FSDP overlaps its gathers on queues of their own"]
            if fsdp
            else []
        ),
        "",
        *torchrun_lines(),
        f'    {script} "$@"',
    ]
    return {
        "run.sh": "\n".join(lines) + "\n",
        "recipe.py": _RECIPE.format(summary="\n".join(summary(target.plan)), body=body),
        "config.json": json.dumps(dict(shape_of(target.model).config), indent=2) + "\n",
    }


_RECIPE = '''"""A plan as a recipe of Megatron-Bridge; run as a script it measures the plan on mock data.

{summary}
"""

import os
from pathlib import Path

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.recipes.common import _pretrain_common
from megatron.bridge.training.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.mixed_precision import get_mixed_precision_config
from megatron.bridge.training.pretrain import pretrain
from megatron.core.transformer.enums import AttnBackend
from transformers import AutoConfig

FOLDER = Path(__file__).parent  # holds config.json


def plan_config() -> ConfigContainer:
    """The plan's configuration over Megatron-Bridge's defaults; nothing is saved."""
    cfg = _pretrain_common()
    cfg.model = AutoBridge.from_hf_config(AutoConfig.from_pretrained(FOLDER)).to_megatron_provider(load_weights=False)
    cfg.tokenizer.tokenizer_type = "NullTokenizer"
    cfg.tokenizer.vocab_size = cfg.model.vocab_size
    cfg.dataset.blend = None
{body}
    cfg.train.train_iters = int(os.environ.get("STEPS", "30"))
    cfg.validation.eval_iters = 0
    cfg.logger.log_interval = 1
    cfg.checkpoint.save = None
    cfg.checkpoint.load = None
    return cfg


if __name__ == "__main__":
    pretrain(config=plan_config(), forward_step_func=forward_step)
'''


EXPORTER = Exporter(
    name="megatron-bridge",
    title="Megatron-Bridge",
    versions=("0.6",),
    checked="field names against the published wheels (ast); it cannot be imported without Transformer Engine",
    launcher="megatron-bridge",
    write=_write,
    script="recipe.py",
    framework="Megatron-Core",
    log=ITERATION_LINES,
    first=lambda target: [
        "Container: one of NVIDIA's NeMo images with megatron-bridge 0.6 (`pip show megatron-bridge`).",
        *first_of_core(target),
    ],
    differs=differs_of_core,
)
