"""A plan as flags of torchtitan: ``flags.txt`` and the launch of the recipe for the same model.

Recipes fix the model, the loss (in chunks of the sequence) and FlexAttention; flags set the rest. Names, defaults and rules are
those of torchtitan 0.3.0 (``config/configs.py``, ``models/*/config_registry.py``, ``distributed/parallel_dims.py``,
``distributed/pipeline_parallel.py``, ``trainer.py``). A batch of a pipeline is its ``local_batch_size``, cut into micro-batches;
without a pipeline it is one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any

import numpy as np

from planner.export.exporter import Exporter, Log, environment_of_torchrun, torchrun_lines
from planner.export.rules import COMMON, has_experts, make_launcher, per_model
from planner.export.sharding import mesh_dimensions, replication_rule
from planner.export.target import Target, summary
from planner.specs.model import Model
from planner.specs.models import load_model
from planner.technique import Check, Context

__all__ = [
    "CHOICES",
    "EXPORTER",
    "LAUNCHER",
    "RECIPES",
    "SCHEDULES",
    "Recipe",
    "fewer_at_ends",
    "flags",
    "stages_of",
]

CHOICES: Mapping[str, str] = {
    **COMMON,
    "attention_kernel": "flash",
    "precision": "bf16 fp32 fp8_rowwise",
    "elementwise_kernel": "fused eager",
    "loss_kernel": "fused linear_fused log_softmax",
    "gradient_accumulation": "fused separate",
    "context": "p2p gathered_ring",  # p2p is what a plan without context parallelism says
    "tensor_overlap": "none chunked",
    "optimizer": "adamw",
    "zero_stage": "0 1 2 fsdp",
    "zero_group": "full node ranks",
    "recompute": "none full per_op",
    "optimizer_offload": "none cpu",
    "parameter_offload": "none cpu",
    "schedule": "1f1b gpipe interleaved breadth_first dualpipev",
}

SCHEDULES: Mapping[str, str] = {
    "1f1b": "1F1B",
    "gpipe": "GPipe",
    "interleaved": "Interleaved1F1B",
    "breadth_first": "LoopedBFS",  # backwards run from the last micro-batch to the first, which takes as long
    "dualpipev": "DualPipeV",
}
UNLIKE: Mapping[str, str] = {
    "ZBVZeroBubble": "weight gradients follow input gradients at once and every step ends together, unlike schedule=zbv",
    "InterleavedZeroBubble": "several chunks of a device with weight gradients put off: no schedule here has both",
}
"""Schedules of PyTorch that none here is, and why."""
RECOMPUTE: Mapping[str, str] = {"none": "none", "full": "full", "per_op": "selective"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe of torchtitan, and what it sets unless a flag says otherwise.

    ``converts`` is the precision to which it converts linear layers, and ``attention`` the kernel, which no flag undoes.
    """

    module: str
    config: str
    model: str
    local_batch_size: int
    seq_len: int
    recompute: str
    tp: int = 1
    ep: int = 1
    schedule: str = "1F1B"
    compiled: bool = False
    async_tp: bool = False
    converts: str = ""
    attention: str = "flex"


RECIPES = (
    Recipe("llama3", "llama3_8b", "llama3.1-8b", 1, 8192, "selective"),
    Recipe("llama3", "llama3_70b", "llama3.1-70b", 8, 8192, "full", tp=8),
    Recipe(
        "llama3",
        "llama3_405b",
        "llama3.1-405b",
        2,
        8192,
        "full",
        tp=8,
        compiled=True,
        async_tp=True,
        converts="fp8_rowwise",
    ),
    Recipe(
        "deepseek_v3",
        "deepseek_v3_671b",
        "deepseek-v3",
        4,
        4096,
        "selective",
        ep=2,
        schedule="Interleaved1F1B",
    ),
    Recipe("qwen3", "qwen3_0_6b", "qwen3-0.6b", 4, 4096, "selective"),
    Recipe("qwen3", "qwen3_1_7b", "qwen3-1.7b", 4, 4096, "selective"),
    Recipe("qwen3", "qwen3_14b", "qwen3-14b", 4, 4096, "full"),
    Recipe("qwen3", "qwen3_32b", "qwen3-32b", 2, 4096, "full"),
    Recipe("qwen3", "qwen3_30b_a3b", "qwen3-30b-a3b", 2, 4096, "full"),
    Recipe("gpt_oss", "gpt_oss_20b", "gpt-oss-20b", 1, 8192, "full", attention="varlen"),
    Recipe("gpt_oss", "gpt_oss_120b", "gpt-oss-120b", 1, 8192, "full", attention="varlen"),
)
"""Recipes whose model is a shipped one."""


@cache
def _shipped(name: str) -> Model:
    return load_model(name)


@per_model
def recipe_of(model: Model) -> Recipe | None:
    """The recipe that trains a model of this shape; None where there is none."""

    def shape(other: Model) -> tuple[Any, ...]:
        layers = [other.blocks[name] for name, repeat in other.layers for _ in range(repeat)]
        return other.hidden, other.vocab, other.tied_embeddings, layers

    return next((recipe for recipe in RECIPES if shape(_shipped(recipe.model)) == shape(model)), None)


def stages_of(layers: int, stages: int, first_less: int, last_less: int) -> list[int]:
    """Layers per virtual stage, as ``_generate_llm_fqn_per_model_part`` deals them.

    >>> stages_of(32, 4, 1, 1)
    [8, 9, 8, 7]
    """
    each, longer = divmod(layers + first_less + last_less, stages)
    counts = [each + (stage < longer) for stage in range(stages)]
    counts[0] -= first_less
    counts[-1] -= last_less
    return counts


def fewer_at_ends(stages: Sequence[int]) -> tuple[int, int] | None:
    """Layers fewer on the first and on the last stage with which :func:`stages_of` deals these stages; None where it cannot.

    >>> fewer_at_ends([8, 9, 8, 7]), fewer_at_ends([20, 20, 21, 20])
    ((1, 1), None)
    """
    middle = stages[1:-1] or (max(stages),)
    each = min(middle)
    first, last = max(each + (max(middle) > each) - stages[0], 0), each - stages[-1]
    if not 0 <= last <= each >= first:
        return None
    return (first, last) if stages_of(sum(stages), len(stages), first, last) == list(stages) else None


def _per_stage(stages: Sequence[int], ends: tuple[int, int]) -> int | None:
    """Layers per stage from which as many stages follow; None where no number does."""
    dealt = sum(stages) + sum(ends)
    each = ceil(dealt / len(stages))
    return each if ceil(dealt / each) == len(stages) else None


def _deals(stages: Sequence[int], pp: int) -> bool:
    """Whether flags cut layers into these stages: one or two of a rank are what schedules bring by themselves."""
    ends = fewer_at_ends(stages)
    return ends is not None and (len(stages) in (pp, 2 * pp) or _per_stage(stages, ends) is not None)


def _valid(ctx: Context) -> Iterable[Check]:
    mesh, knobs = ctx.mesh, ctx.knobs
    recipe = recipe_of(ctx.model)
    known = ", ".join(r.config for r in RECIPES)
    yield Check(f"no recipe for this model; there are {known}", recipe is not None)
    converts = recipe.converts if recipe is not None else ""
    whole = ctx.knobs["precision"] == converts if converts else ctx.knobs["precision"] in ("bf16", "fp32")
    yield Check("linear layers are multiplied in fp8 by recipes that convert them, and by no flag", whole)
    yield replication_rule(ctx)
    divisor = np.where(mesh.tp > 1, mesh.tp, 1) * np.where(mesh.cp > 1, 2 * mesh.cp, 1)
    yield Check("sequence length not divisible by tp and 2·cp", np.mod(ctx.workload.seq_len, divisor) == 0)
    yield Check("context parallelism gathers keys and values", (mesh.cp == 1) | (knobs["context"] != "p2p"))
    if ctx.model.tied_embeddings:
        yield Check("tied embeddings cannot be cut into stages", mesh.pp == 1)
    for block in ctx.model.blocks.values():
        if block.attention is not None:
            yield Check("KV heads not divisible by tp", block.attention.kv_heads % mesh.tp == 0)
            yield Check(
                "windowed attention without context parallelism",
                (mesh.cp == 1) | (not block.attention.window),
            )
    if has_experts(ctx.model):
        yield Check(
            "experts are cut over tp, or spread whole over ep", mesh.etp == np.where(mesh.ep > 1, 1, mesh.tp)
        )
    yield Check("gradients are reduced in fp32 (mixed_precision_reduce)", ctx.gradient_dtype == "fp32")
    yield from _valid_schedule(ctx, recipe)
    yield from _valid_states(ctx)


def _valid_schedule(ctx: Context, recipe: Recipe | None) -> Iterable[Check]:
    """What PyTorch's schedules ask of micro-batches, and of a backward that they cut in two."""
    mesh, knobs = ctx.mesh, ctx.knobs
    schedule = knobs.get("schedule")
    if schedule in ("1f1b", "gpipe"):
        yield Check("fewer micro-batches than stages", (mesh.pp == 1) | (ctx.micro_batches >= mesh.pp))
    if schedule == "interleaved":
        rounds = np.maximum(ctx.micro_batches // mesh.pp, 1)
        yield Check(
            "micro-batches do not divide into rounds (Interleaved1F1B)",
            np.mod(ctx.micro_batches, rounds) == 0,
        )
    if schedule == "dualpipev":
        # torch 2.13, _check_torch_compile_compatibility; a compiled region's backward frees what the second part would read.
        whole = knobs.get("elementwise_kernel", "eager") == "eager"
        yield Check("a compiled backward is not cut in two: DualPipeV needs eager kernels", whole)
        compiled = recipe is not None and recipe.attention == "flex"
        yield Check(
            "FlexAttention is always compiled, and no backward of it is cut in two (DualPipeV)", not compiled
        )
        once = knobs.get("recompute", "none") == "none"
        yield Check("what is recomputed is recomputed again for weight gradients (DualPipeV)", once)


def _valid_states(ctx: Context) -> Iterable[Check]:
    """What is compiled, offloaded and sharded beside what."""
    mesh, knobs = ctx.mesh, ctx.knobs
    compiled = knobs.get("elementwise_kernel", "fused") == "fused"
    if knobs.get("tensor_overlap") == "chunked":
        yield Check("overlapped tensor parallelism needs compiled models (fused kernels)", compiled)
    if "optimizer_offload" in knobs and "parameter_offload" in knobs:
        same = knobs["optimizer_offload"] == knobs["parameter_offload"]
        yield Check("parameters and optimizer states are offloaded together", same)
        yield Check(
            "offload needs sharded states",
            knobs.get("zero_stage") != "0" or knobs["optimizer_offload"] == "none",
        )
    if knobs.get("zero_stage") == "1":
        yield Check("states alone are sharded beside a pipeline only (else ZeRO 2)", mesh.pp > 1)
    if knobs.get("zero_stage") in ("2", "fsdp"):
        # set_requires_gradient_sync(False), set_reshard_after_backward(False) in torch.distributed.pipelining.
        yield Check(
            "a pipeline keeps weights gathered and gradients whole until the last micro-batch (ZeRO 1)",
            mesh.pp == 1,
        )
    if knobs.get("zero_stage") == "0":
        # DDP is composed with nothing else (dp_replicate is a dimension of FSDP's mesh otherwise).
        yield Check(
            "replicated states beside other parallelism need shards",
            (mesh.tp * mesh.cp * mesh.pp == 1) | (mesh.dp * mesh.cp == 1),
        )


LAUNCHER = make_launcher(
    "torchtitan",
    CHOICES,
    _valid,
    _deals,
    native={"zero_stage": "fsdp", "context": "gathered_ring"},
)


def flags(target: Target) -> list[str]:
    """The flags for a plan that keeps the rules, one per entry; the choice of recomputation stands last."""
    plan, knobs, sizes = target.plan, target.knobs, mesh_dimensions(target)
    recipe = recipe_of(target.model)
    assert recipe is not None
    pipelined = sizes["pp"] > 1
    micro_batch = int(plan.knobs["micro_batch_size"])
    found = [
        f"--module {recipe.module}",
        f"--config {recipe.config}",
        f"--training.local-batch-size {micro_batch * (plan.micro_batches if pipelined else 1)}",
        f"--training.global-batch-size {target.workload.global_batch_size}",
        f"--training.seq-len {target.workload.seq_len}",
        f"--training.mixed-precision-param {'float32' if knobs['precision'] == 'fp32' else 'bfloat16'}",
        "--training.disable-cuda-graphs",
        f"--parallelism.data-parallel-replicate-degree {sizes['dp_replicate']}",
        f"--parallelism.data-parallel-shard-degree {sizes['dp_shard']}",
        f"--parallelism.fsdp-reshard-after-forward {'never' if knobs['zero_stage'] in ('1', '2') else 'always'}",
        f"--parallelism.tensor-parallel-degree {sizes['tp']}",
        f"--parallelism.{'' if knobs['sequence_parallel'] == 'true' else 'no-'}enable-sequence-parallel",
        f"--parallelism.context-parallel-degree {sizes['cp']}",
        f"--parallelism.pipeline-parallel-degree {sizes['pp']}",
        f"--parallelism.expert-parallel-degree {plan.mesh['ep']}",
        *(_pipeline(target, micro_batch) if pipelined else ()),
        f"--compile.{'' if knobs['elementwise_kernel'] == 'fused' else 'no-'}enable",
        "--compile.components model,loss",
        f"--compile.{'' if knobs['tensor_overlap'] == 'chunked' else 'no-'}enable-async-tensor-parallel",
        f"--training.{'' if knobs['parameter_offload'] == 'cpu' else 'no-'}enable-cpu-offload",
    ]
    return [*found, f"activation-checkpoint:{RECOMPUTE[knobs['recompute']]}"]


def _pipeline(target: Target, micro_batch: int) -> list[str]:
    plan = target.plan
    ends = fewer_at_ends(plan.stages)
    assert ends is not None
    per_stage = _per_stage(plan.stages, ends)
    return [
        f"--parallelism.pipeline-parallel-schedule {SCHEDULES[target.knobs['schedule']]}",
        f"--parallelism.pipeline-parallel-microbatch-size {micro_batch}",
        *([f"--parallelism.pipeline-parallel-layers-per-stage {per_stage}"] if per_stage else ()),
        f"--parallelism.pipeline-parallel-first-stage-less-layers {ends[0]}",
        f"--parallelism.pipeline-parallel-last-stage-less-layers {ends[1]}",
    ]


def _write(target: Target, script: str) -> dict[str, str]:
    # Every step is logged, nothing is saved or validated: the run measures.
    measure = [
        "--training.steps ${STEPS:-30}",
        "--metrics.log-freq 1",
        "--validator.no-enable",
        "--checkpoint.no-enable",
    ]
    *options, recompute = flags(target)
    lines = [
        "#!/usr/bin/env bash",
        "# torchtitan 0.3; plan.json holds the whole plan.",
        *(f"# {line}" for line in summary(target.plan)),
        "# Run it once per node. HF_ASSETS is the folder of the model's tokenizer, DATASET one that torchtitan knows (or C4's).",
        "set -euo pipefail",
        "",
        *environment_of_torchrun(target),
        "",
        *torchrun_lines(),
        f"    {script} \\",
        *(f"    {flag} \\" for flag in (*options, *measure)),
        "    --hf-assets-path ${HF_ASSETS:-./assets/hf/tokenizer} --dataloader.dataset ${DATASET:-c4} \\",
        f'    "$@" {recompute}',
    ]
    return {"run.sh": "\n".join(lines) + "\n", "flags.txt": "\n".join([*options, recompute]) + "\n"}


_LOSS = "The loss is on the pipeline's first rank, where its V ends: torchtitan 0.3 looks for it on the last, and shows none."


def _first(target: Target) -> list[str]:
    return [
        "Tokenizer and data: `HF_ASSETS` must hold the model's tokenizer, and the data set must be reachable from the nodes.",
        *([_LOSS] if target.knobs["schedule"] == "dualpipev" else []),
    ]


def _differs(target: Target) -> list[str]:
    if target.knobs["loss_kernel"] == "linear_fused":
        return []
    return [
        "The recipe computes the loss in eight chunks of the sequence: its logits take less memory than the plan counts"
        f" (`loss_kernel={target.knobs['loss_kernel']}`)."
    ]


EXPORTER = Exporter(
    name="torchtitan",
    title="torchtitan",
    versions=("0.3",),
    checked="ConfigManager, ParallelDims and the pipeline's own split",
    launcher="torchtitan",
    write=_write,
    script="-m torchtitan.train",
    framework="PyTorch FSDP2 (torchtitan)",
    log=Log(
        tokens=r"tps: ([\d,]+)", peak=r"memory:\s+([\d.]+)GiB", peak_unit_bytes=2.0**30, peak_kind="reserved"
    ),
    first=_first,
    differs=_differs,
)
