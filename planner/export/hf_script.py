"""Measuring scripts that build a model with Transformers, and their flags, which have the names of the Trainer's arguments."""

from __future__ import annotations

from importlib.resources import files

from planner.export.hf_rules import kernels_of
from planner.export.target import Target, summary

__all__ = ["script_flags", "train_script"]

_ATTENTION = {"flash": "sdpa", "eager": "eager"}
_SET_FLAGS = {"plain": [], "compile": ["--torch_compile"], "liger": ["--use_liger_kernel"]}


def script_flags(target: Target) -> list[str]:
    """What a script is told beside the launcher's own configuration, one flag each."""
    plan, knobs = target.plan, target.knobs
    flags = [
        f"--per_device_train_batch_size {plan.knobs['micro_batch_size']}",
        f"--gradient_accumulation_steps {plan.micro_batches}",
        f"--max_seq_length {target.workload.seq_len}",
        f"--attn_implementation {_ATTENTION[knobs['attention_kernel']]}",
        *_SET_FLAGS[kernels_of(knobs)],
    ]
    if knobs["recompute"] == "full":
        flags.append("--gradient_checkpointing")
    if knobs["recompute"] == "block":
        flags.append(f"--gradient_checkpointing --gradient_checkpointing_layers {knobs['recompute_layers']}")
    return flags


def train_script(launcher: str, target: Target) -> str:
    """The script of a launcher: ``accelerate`` or ``deepspeed``."""
    folder = files("planner.export").joinpath("templates")
    text = folder.joinpath(f"{launcher}.py.txt").read_text(encoding="utf-8")
    model = folder.joinpath("model.py.txt").read_text(encoding="utf-8")
    return text.replace("@SUMMARY@", "\n".join(summary(target.plan))).replace("@MODEL@\n", model)
