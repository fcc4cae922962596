"""A torchtitan launch, or a file of its flags, as a job and the choices of a plan.

What no flag sets is the recipe's, as far as :data:`planner.export.torchtitan.RECIPES` knows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.errors import Problem, SpecError, did_you_mean
from planner.export.flags import FlagReader, parse_flags
from planner.export.launched import LaunchedRun, degrees, ignored_note, read_text
from planner.export.shell import Script, devices_of, read_script
from planner.export.torchtitan import RECIPES, RECOMPUTE, SCHEDULES, UNLIKE, Recipe, stages_of
from planner.pipeline.layout import layout_name
from planner.specs.models import load_model

__all__ = ["read_torchtitan"]

_AC = "activation-checkpoint:"
_OWN = {word: knob for knob, word in SCHEDULES.items()}
_SWITCHES = (
    "parallelism.enable-sequence-parallel", "compile.enable", "compile.enable-async-tensor-parallel",
    "training.enable-cpu-offload", "training.disable-cuda-graphs",
)  # fmt: skip
_UNMODELLED: Mapping[str, str] = {
    "--parallelism.module-fqns-per-model-part": "stages that are written out",
    "--parallelism.pipeline-parallel-schedule-csv": "a schedule in a file",
}


def read_torchtitan(path: str | Path) -> LaunchedRun:
    """The run that a script or a file of flags describes.

    Raises:
        SpecError: the file cannot be read, flags are wrong or ask for what is not modelled; all at once.
    """
    where = str(path)
    script = read_script(read_text(path, "a torchtitan launch, or a file of its flags"), where)
    launch, words = _command(script, where)
    recompute_words = [word for word in words if word.startswith(_AC)]
    flags = FlagReader(_normal(parse_flags([word for word in words if not word.startswith(_AC)])), where)
    recipe = _recipe(flags, script)
    flags.refuse(_UNMODELLED)
    notes = [
        *script.notes,
        f"What no flag sets is as in the recipe {recipe.config}; its loss runs in chunks of the sequence.",
    ]
    fixed, workload = _knobs(flags, recipe, recompute_words)
    devices = degrees(fixed, devices_of(script, launch, script.variables.get("NGPU", "")), notes)
    model = load_model(recipe.model)
    fixed |= _stages(flags, fixed, model.n_layers)
    _batches(flags, recipe, fixed, workload, notes)
    flags.raise_if_any()
    ignored = tuple(flags.unread())
    wasteful = _wasteful(fixed, reshards=fixed["pp"] > 1 and _reshards(flags, fixed["pp"]))
    return LaunchedRun(
        "torchtitan", replace(model, name=recipe.model), workload, fixed, devices, (*notes, *ignored_note(ignored)),
        tuple(wasteful), ignored, {} if "global_batch_size" in workload else {"global_batch_size": "it follows from the devices"},
    )  # fmt: skip


def _command(script: Script, where: str) -> tuple[list[str], list[str]]:
    """Words before torchtitan's own, and its flags."""
    for command in script.commands:
        words = list(command.words)
        starts = [
            index for index, word in enumerate(words) if word.endswith(("torchtitan.train", "run_train.sh"))
        ]
        if starts:
            return words[: starts[0]], words[starts[0] + 1 :]
    words = [word for command in script.commands for word in command.words]
    if words and words[0].startswith("--"):
        return [], words
    expected = "torchrun … -m torchtitan.train …, or a file of flags"
    raise SpecError(Problem(where, "starts no torchtitan", expected))


def _normal(found: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Flags with dashes; a switch as true or false under its own name."""
    flags: dict[str, list[str]] = {}
    for flag, values in found.items():
        section, dot, name = flag.removeprefix("--").replace("_", "-").partition(".")
        off = f"{section}.{name.removeprefix('no-')}"
        if name.startswith("no-") and off in _SWITCHES:
            flags[f"--{off}"] = ["false"]
        elif f"{section}.{name}" in _SWITCHES:
            flags[f"--{section}.{name}"] = values[:1] or ["true"]
        else:
            flags[f"--{section}{dot}{name}"] = values
    return flags


def _recipe(flags: FlagReader, script: Script) -> Recipe:
    flags.read.add("--module")
    name = flags.text("--config", script.variables.get("CONFIG", ""))
    known = {recipe.config: recipe for recipe in RECIPES}
    if name not in known:
        flags.fault("--config", repr(name), f"one of {', '.join(known)}", did_you_mean(name, known))
        flags.raise_if_any()
    return known[name]


def _switch(flags: FlagReader, name: str, default: bool) -> bool:
    return flags.choice(
        f"--{name}",
        "true" if default else "false",
        {"true": True, "false": False, "True": True, "False": False},
    )


def _knobs(
    flags: FlagReader, recipe: Recipe, recompute_words: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    section = "--parallelism."
    tp = flags.integer(f"{section}tensor-parallel-degree", recipe.tp)
    cp, pp = (flags.integer(f"{section}{name}-parallel-degree", 1) for name in ("context", "pipeline"))
    ep = flags.integer(f"{section}expert-parallel-degree", recipe.ep)
    replicate = flags.integer(f"{section}data-parallel-replicate-degree", 1)
    shard = flags.integer(f"{section}data-parallel-shard-degree", -1)
    words = {word: knob for knob, word in RECOMPUTE.items()}
    chosen = recompute_words[-1].removeprefix(_AC) if recompute_words else recipe.recompute
    if chosen not in words:
        flags.fault(_AC, f"{chosen}: not modelled", f"one of {', '.join(words)}")
    compiled = _switch(flags, "compile.enable", recipe.compiled)
    overlaps = _switch(flags, "compile.enable-async-tensor-parallel", recipe.async_tp)
    flags.read.add("--compile.components")
    offload = "cpu" if _switch(flags, "training.enable-cpu-offload", False) else "none"
    dtype = flags.choice(
        "--training.mixed-precision-param",
        "bfloat16",
        {"bfloat16": recipe.converts or "bf16", "float32": "fp32"},
    )
    flags.read.add("--training.disable-cuda-graphs")
    fixed: dict[str, Any] = {
        "tp": tp, "cp": cp, "pp": pp, "ep": ep, "etp": 1 if ep > 1 else tp, "context": "gathered_ring" if cp > 1 else "p2p",
        "sequence_parallel": "true" if _switch(flags, "parallelism.enable-sequence-parallel", True) and tp > 1 else "false",
        "tensor_overlap": "chunked" if overlaps and tp > 1 else "none",
        "zero_stage": _stage(flags, pp), "zero_group": "full", "recompute": words.get(chosen, "none"),
        "elementwise_kernel": "fused" if compiled else "eager", "optimizer_offload": offload, "parameter_offload": offload,
        "precision": dtype, "gradient_dtype": "fp32", "optimizer": "adamw", "attention_kernel": "flash",
        "schedule": _schedule(flags, recipe, pp),
    }  # fmt: skip
    if not any(block.moe for block in load_model(recipe.model).blocks.values()):
        fixed |= {"ep": 1, "etp": 1}
    if replicate > 1 and shard == 1 and cp == 1:
        fixed["zero_stage"] = "0"
    elif replicate > 1 and shard > 0:
        fixed |= {"zero_group": "ranks", "zero_group_ranks": shard * cp}
    elif replicate > 1:
        flags.fault(f"{section}data-parallel-shard-degree", "is left open beside replicas", "a number")
    workload: dict[str, Any] = {
        "seq_len": flags.integer("--training.seq-len", recipe.seq_len), "precisions": (dtype,), "optimizer": "adamw",
    }  # fmt: skip
    return fixed, workload


def _schedule(flags: FlagReader, recipe: Recipe, pp: int) -> str:
    flag = "--parallelism.pipeline-parallel-schedule"
    asked = flags.text(flag, recipe.schedule)
    if pp > 1 and asked in UNLIKE:
        flags.fault(flag, f"{asked}: {UNLIKE[asked]}", f"one of {', '.join(_OWN)}")
    elif pp > 1:
        return flags.choice(flag, recipe.schedule, _OWN)
    return "1f1b"


def _reshards(flags: FlagReader, pp: int) -> bool:
    """Whether weights are dropped after a block's forward, to be gathered again for its backward."""
    policies = {"default": pp == 1, "always": True, "never": False}
    return bool(flags.choice("--parallelism.fsdp-reshard-after-forward", "default", policies))


def _stage(flags: FlagReader, pp: int) -> str:
    """The ZeRO stage; PyTorch's pipelines keep weights gathered and gradients whole until the last micro-batch."""
    reshards = _reshards(flags, pp)
    return "1" if pp > 1 else "fsdp" if reshards else "2"


def _batches(
    flags: FlagReader, recipe: Recipe, fixed: dict[str, Any], workload: dict[str, Any], notes: list[str]
) -> None:
    """Batch sizes: a pipeline's local batch is cut into micro-batches, without one it is a micro-batch."""
    local = flags.integer("--training.local-batch-size", recipe.local_batch_size)
    total = flags.integer("--training.global-batch-size", -1)
    piece = flags.integer("--parallelism.pipeline-parallel-microbatch-size", 1)
    fixed["micro_batch_size"] = piece if fixed["pp"] > 1 else local
    if total > 0:
        workload["global_batch_size"] = total
        if fixed["pp"] > 1 and "dp" in fixed and total != local * fixed["dp"]:
            notes.append("Several pipeline runs per step are priced as one with all of their micro-batches.")
    elif "dp" in fixed:
        workload["global_batch_size"] = local * fixed["dp"]


def _stages(flags: FlagReader, fixed: dict[str, Any], layers: int) -> dict[str, Any]:
    """Virtual stages and their layout."""
    section = "--parallelism.pipeline-parallel-"
    per_stage = flags.integer(f"{section}layers-per-stage", None)
    first, last = (flags.integer(f"{section}{end}-stage-less-layers", 1) for end in ("first", "last"))
    pp, looped = fixed["pp"], fixed["schedule"] not in ("1f1b", "gpipe")
    if pp == 1:
        return {"virtual_stages": 1, "pipeline_layout": "even"}
    stages = pp * (2 if looped else 1)
    if per_stage is not None:
        stages = -(-(layers + first + last) // max(per_stage, 1))
    found = f"{stages} stages of {layers} layers, {first} and {last} fewer on the ends"
    folded = fixed["schedule"] == "dualpipev"
    if stages % pp or (stages > pp) != looped or (folded and stages != 2 * pp):
        each = "two stages" if folded else "several stages" if looped else "one stage"
        expected = f"{each} for each of {pp} ranks"
        flags.fault(f"{section}layers-per-stage", found, expected)
    elif not 0 <= min(first, last) <= max(first, last, 1) <= (layers + first + last) // stages:
        flags.fault(f"{section}first-stage-less-layers", found, "ends that have as many layers to lack")
    else:
        dealt = layout_name(stages_of(layers, stages, first, last))
        return {"virtual_stages": stages // pp, "pipeline_layout": dealt}
    return {"virtual_stages": 1, "pipeline_layout": "even"}


def _wasteful(fixed: Mapping[str, Any], *, reshards: bool) -> list[str]:
    found = []
    if fixed["tp"] > 1 and fixed["sequence_parallel"] == "false":
        found.append(
            "Without sequence parallelism, every tensor-parallel rank keeps the same norms' activations."
        )
    if fixed["elementwise_kernel"] == "eager":
        found.append("Without --compile.enable, norms, rotations and activations are several kernels each.")
    if reshards:
        found.append(
            "Resharding after forward beside a pipeline gathers the weights again for every micro-batch: not priced."
        )
    return found
