"""A plan as the arguments of the Transformers Trainer: ``training_arguments.json``, a measuring script, the launch.

Names and rules are those of Transformers 5.23 (``training_args.py``) over Accelerate 1.15, whose rules hold here too. The object
``measuring_run`` of the JSON is for the script alone; the rest are keyword arguments of ``TrainingArguments``, with
``parallelism_config`` as those of Accelerate's ``ParallelismConfig``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

from planner.export.accelerate import CHOICES as ACCELERATE
from planner.export.accelerate import COMM_STRATEGIES, fsdp_rules
from planner.export.exporter import STEP_LINES, Exporter, environment_of_torchrun, torchrun_lines
from planner.export.hf_rules import check_first, hf_rules, kernels_of, shape_of
from planner.export.rules import make_launcher
from planner.export.sharding import mesh_dimensions
from planner.export.target import Target, summary
from planner.technique import Check, Context

__all__ = ["CHOICES", "EXPORTER", "LAUNCHER", "OPTIMIZERS", "arguments"]

CHOICES: Mapping[str, str] = {
    **ACCELERATE,
    "optimizer": "adamw adam8bit sgd adafactor lion",
    "recompute": "none full",
}

OPTIMIZERS: Mapping[str, str] = {
    "adamw": "adamw_torch_fused", "adam8bit": "adamw_bnb_8bit", "sgd": "sgd", "adafactor": "adafactor", "lion": "lion_32bit",
}  # fmt: skip
"""Optimizer → value of ``optim``."""


def _valid(ctx: Context) -> Iterable[Check]:
    yield from hf_rules(ctx)
    yield from fsdp_rules(ctx)
    cp, gradient = ctx.mesh.cp, ctx.gradient_dtype
    yield Check("sequence length not divisible by 2·cp", (cp == 1) | (ctx.workload.seq_len % (2 * cp) == 0))
    yield Check(
        f"{gradient} gradients of {ctx.format.activation} weights",
        gradient in ("fp32", ctx.format.activation),
    )
    if ctx.knobs.get("zero_stage") == "0":
        yield Check("DDP reduces gradients in fp32", gradient == "fp32")
    elif ctx.knobs["optimizer"] in ("adam8bit", "lion"):
        yield Check("bitsandbytes' optimizers do not work on DTensor shards", False)


LAUNCHER = make_launcher(
    "transformers", CHOICES, _valid, native={"zero_stage": "fsdp", "context": "gathered_ring"}
)


def arguments(target: Target) -> dict[str, Any]:
    """Keyword arguments of ``TrainingArguments`` for a plan that keeps the rules; ``parallelism_config`` as a map."""
    plan, knobs = target.plan, target.knobs
    found: dict[str, Any] = {
        "output_dir": "output",
        "per_device_train_batch_size": plan.knobs["micro_batch_size"],
        "gradient_accumulation_steps": plan.micro_batches,
        "bf16": knobs["precision"] == "bf16",
        "fp16": knobs["precision"] == "fp16",
        "optim": OPTIMIZERS[knobs["optimizer"]],
        "learning_rate": 1e-5,
        "torch_compile": kernels_of(knobs) == "compile",
        "use_liger_kernel": kernels_of(knobs) == "liger",
        "max_steps": 30,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if knobs["zero_stage"] == "0":
        found["activation_checkpointing"] = knobs["recompute"] == "full"
        return found
    found["fsdp"] = True
    found["fsdp_config"] = {
        "version": 2,
        "reshard_after_forward": knobs["zero_stage"] == "fsdp",
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": [shape_of(target.model).layer_class],
        "activation_checkpointing": knobs["recompute"] == "full",
        "cpu_offload": knobs["parameter_offload"] == "cpu",
        "state_dict_type": "SHARDED_STATE_DICT",
    }
    sizes = mesh_dimensions(target)
    found["parallelism_config"] = {
        f"{name}_size": sizes[name] for name in ("dp_replicate", "dp_shard", "tp", "cp")
    }
    return found


def _write(target: Target, script: str) -> dict[str, str]:
    knobs = target.knobs
    run = {
        "max_seq_length": target.workload.seq_len,
        "attn_implementation": {"flash": "sdpa", "eager": "eager"}[knobs["attention_kernel"]],
        "reduce_dtype": knobs["gradient_dtype"],
    }
    environment = environment_of_torchrun(target)
    if target.plan.mesh["cp"] > 1:
        # The Trainer's arguments have no word for it; ParallelismConfig reads it from here.
        environment.append(f"export PARALLELISM_CONFIG_CP_COMM_STRATEGY={COMM_STRATEGIES[knobs['context']]}")
    lines = [
        "#!/usr/bin/env bash",
        "# Transformers 5.23; plan.json holds the whole plan.",
        *(f"# {line}" for line in summary(target.plan)),
        "# Run it once per node.",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        "",
        *environment,
        "",
        *torchrun_lines(),
        f'    {script} training_arguments.json "$@"',
    ]
    template = files("planner.export").joinpath("templates", "trainer.py.txt").read_text(encoding="utf-8")
    return {
        "run.sh": "\n".join(lines) + "\n",
        "training_arguments.json": json.dumps({**arguments(target), "measuring_run": run}, indent=2) + "\n",
        "config.json": json.dumps(dict(shape_of(target.model).config), indent=2) + "\n",
        "train.py": template.replace("@SUMMARY@", "\n".join(summary(target.plan))),
    }


def _first(target: Target) -> list[str]:
    found = check_first(target)
    if target.knobs["optimizer"] in ("adam8bit", "lion"):
        found.append("`pip show bitsandbytes`: the plan counts on its optimizer.")
    return found


EXPORTER = Exporter(
    name="transformers",
    title="Transformers",
    versions=("5.23",),
    checked="TrainingArguments",
    launcher="transformers",
    write=_write,
    script="train.py",
    framework="HF Trainer",
    log=STEP_LINES,
    first=_first,
)
