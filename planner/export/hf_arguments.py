"""What a script that trains with Transformers is told beside DeepSpeed's or Accelerate's file: batches, length, kernels.

Names are those of the Trainer's arguments (``transformers/training_args.py``, 5.23), which scripts that bring a loop of their own
mostly take over; what a launch leaves out is as the Trainer has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planner.errors import Problem, SpecError
from planner.export.flags import FlagReader, parse_flags
from planner.export.hf_rules import KERNELS
from planner.export.launched import LaunchedRun, beside_or_here, ignored_note, names_in, read_text
from planner.export.shell import devices_of, read_script

__all__ = ["AUTO", "Arguments", "completed", "filled", "is_script", "script_arguments"]

AUTO = "auto"
"""What a DeepSpeed file says where the Trainer's own argument is to be taken."""
_SUFFIXES = (".sh", ".bash", ".sbatch", ".slurm")
_LENGTHS = names_in(
    "--max-seq-length --max-seq-len --max-length --model-max-length --block-size --seq-length --seq-len --cutoff-len"
)
_OPTIMIZERS: Mapping[str, str] = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_apex_fused": "adamw", "adamw": "adamw", "sgd": "sgd",
    "sgd_momentum": "sgd_momentum", "adamw_bnb_8bit": "adam8bit", "adamw_8bit": "adam8bit", "adafactor": "adafactor",
    "lion_32bit": "lion",
}  # fmt: skip
"""Value of ``optim`` → optimizer."""
_PASSIVE = names_in(
    "--learning-rate --lr --weight-decay --warmup-steps --warmup-ratio --lr-scheduler-type --num-train-epochs --max-steps "
    "--logging-steps --save-strategy --save-steps --save-total-limit --eval-strategy --evaluation-strategy --output-dir "
    "--report-to --seed --disable-tqdm --overwrite-output-dir --do-train --model-name-or-path --dataset-name --run-name "
    "--logging-dir "
    "--dataloader-num-workers --preprocessing-num-workers --per-device-eval-batch-size --max-grad-norm --adam-beta1 --adam-beta2 "
    "--adam-epsilon --ddp-timeout --local-rank --gradient-checkpointing-kwargs"
)


@dataclass(slots=True)
class Arguments:
    """What a launch tells a training script.

    Attributes:
        flags: the script's arguments, with dashes for underscores.
        launch: the launcher's own, before the script.
        devices: processes that are started; None where the launch does not tell.
        config: the file of the launcher that goes with it; None: there is none.
        notes: what could not be decided in the script.
    """

    flags: FlagReader
    launch: Mapping[str, list[str]]
    devices: int | None
    config: Path | None = None
    notes: tuple[str, ...] = ()

    def on(self, flag: str) -> bool:
        """Whether a switch is given, and not as false."""
        return self.flags.present(flag) and (self.flags.flags[flag] or ["true"])[0].lower() not in (
            "false",
            "no",
            "0",
        )

    @property
    def micro_batch_size(self) -> int:
        """Sequences of a process at a time."""
        return int(self.flags.integer("--per-device-train-batch-size", 8))

    @property
    def steps(self) -> int:
        """Micro-batches of a step."""
        return int(self.flags.integer("--gradient-accumulation-steps", 1))


def is_script(path: str | Path) -> bool:
    """Whether a file is a shell script by its name.

    >>> is_script("run.sh"), is_script("zero3.json")
    (True, False)
    """
    return Path(path).suffix.lower() in _SUFFIXES


def script_arguments(path: str | Path, expected: str, config_flags: Sequence[str]) -> Arguments:
    """What the first command of a script says that names a file of the launcher, which is sought beside the script first.

    Args:
        path: the script.
        expected: what it should hold, for problems.
        config_flags: flags, one of which names the launcher's file, with dashes.

    Raises:
        SpecError: the file cannot be read, or no command names such a file.
    """
    where = str(path)
    script = read_script(read_text(path, expected), where)
    for command in script.commands:
        words = list(command.words)
        begins = _training_script(words)
        launch, given = (_dashed(parse_flags(part)) for part in (words[:begins], words[begins + 1 :]))
        named = [(launch | given).get(flag, []) for flag in config_flags]
        file = next((values[0] for values in named if values), None)
        if file is None:
            continue
        config = beside_or_here(path, file)
        flags = FlagReader(given, where)
        flags.read |= set(config_flags)
        return Arguments(flags, launch, devices_of(script, words[:begins]), config, tuple(script.notes))
    raise SpecError(Problem(where, f"names no file with {' or '.join(config_flags)}", expected))


def _training_script(words: Sequence[str]) -> int:
    """Where in a command the training script, or its module, stands."""
    for index, word in enumerate(words):
        if word.endswith(".py") or (index and words[index - 1] in ("-m", "--module")):
            return index
    return len(words)


def _dashed(flags: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {flag.replace("_", "-"): values for flag, values in flags.items()}


def filled(data: Mapping[str, Any], given: Arguments) -> dict[str, Any]:
    """A DeepSpeed file with its ``"auto"`` replaced as the Trainer does it, as far as time and memory go."""
    found = dict(data)
    for key, value in (
        ("train_micro_batch_size_per_gpu", given.micro_batch_size), ("gradient_accumulation_steps", given.steps)
    ):  # fmt: skip
        if found.get(key, AUTO) == AUTO:
            found[key] = value
    for name in ("bf16", "fp16"):
        table = found.get(name)
        if isinstance(table, Mapping) and table.get("enabled") == AUTO:
            found[name] = {**table, "enabled": given.on(f"--{name}")}
    if found.get("train_batch_size") == AUTO:
        del found["train_batch_size"]
    return found


def completed(run: LaunchedRun, given: Arguments) -> LaunchedRun:
    """A launcher's file together with what the script is told.

    Raises:
        SpecError: what is wrong with the script's arguments, all at once.
    """
    flags = given.flags
    fixed: dict[str, Any] = {**run.fixed, **_kernels(run, given), **_recomputed(run, given)}
    fixed.setdefault("micro_batch_size", given.micro_batch_size)
    workload, notes = dict(run.workload), [*_kept(run, given), *given.notes]
    optimizer = _OPTIMIZERS.get(str(flags.text("--optim", "")))
    if optimizer is not None and run.launcher != "deepspeed":
        workload["optimizer"] = fixed["optimizer"] = optimizer
    reduced = flags.text("--reduce-dtype", None)
    if reduced in ("fp32", "bf16", "fp16"):
        fixed["gradient_dtype"] = reduced
    lengths = [flag for flag in sorted(_LENGTHS) if flags.present(flag)]
    if lengths:
        workload["seq_len"] = flags.integer(lengths[0])
    devices = run.devices if run.devices is not None else given.devices
    ranks = fixed["tp"] * fixed["cp"] * fixed["pp"]
    if devices is not None and devices % ranks == 0:
        fixed["dp"] = devices // ranks
        workload.setdefault("global_batch_size", fixed["dp"] * fixed["micro_batch_size"] * given.steps)
    steps = None if "global_batch_size" in workload else given.steps
    flags.raise_if_any()
    flags.read |= _PASSIVE
    ignored = (*run.ignored, *flags.unread())
    said = {"global_batch_size": workload, "micro_batch_size": fixed}
    missing = {name: why for name, why in run.missing.items() if name not in said.get(name, {})}
    return replace(
        run, workload=workload, fixed=fixed, devices=devices, notes=(*notes, *ignored_note(ignored)), ignored=ignored,
        missing=missing, micro_batches=steps,
    )  # fmt: skip


def _kept(run: LaunchedRun, given: Arguments) -> Iterator[str]:
    """Notes that still hold once the script's arguments are known."""
    answered = ["Whether layers are", "If the script", "Kernels are", "Ignored:", '"auto"']
    answered += ["Gradients are reduced in"] * given.flags.present("--reduce-dtype")
    answered += ["The number of devices"] * (given.devices is not None)
    for note in run.notes:
        if not note.startswith(tuple(answered)):
            yield note


def _kernels(run: LaunchedRun, given: Arguments) -> dict[str, str]:
    """Attention and the set of kernels; without a word those that Transformers takes."""
    found = {
        "attention_kernel": "eager"
        if given.flags.text("--attn-implementation", "sdpa") == "eager"
        else "flash"
    }
    usual = "" if "elementwise_kernel" in run.fixed else "plain"
    named = "liger" if given.on("--use-liger-kernel") else "compile" if given.on("--torch-compile") else usual
    for (element, loss), name in KERNELS.items():
        if name == named:
            found |= {"elementwise_kernel": element, "loss_kernel": loss}
    return found


def _recomputed(run: LaunchedRun, given: Arguments) -> dict[str, Any]:
    layers = given.flags.integer("--gradient-checkpointing-layers", None)
    if not any(
        [given.on("--gradient-checkpointing"), given.on("--activation-checkpointing")]
    ):  # old name, new name
        return {} if run.fixed.get("recompute") else {"recompute": "none"}
    return {"recompute": "full"} if layers is None else {"recompute": "block", "recompute_layers": layers}
