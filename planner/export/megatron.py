"""A plan as a Megatron-LM run: ``run.sh``, the same arguments as ``args.txt``, and the plan.

Every choice of the plan becomes flags; one that Megatron-LM cannot express is an error that names it. Flags are those of
Megatron-LM 0.19 (megatron-core 0.19.2), whose parser and validator accept them; 0.20 takes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from planner.export.exporter import ITERATION_LINES, Exporter, environment_of_torchrun, torchrun_lines
from planner.export.flags import Flags, words
from planner.export.megatron_model import model_flags
from planner.export.rules import distributed_optimizer_instances
from planner.export.target import Target, recomputed_layers, summary
from planner.pipeline.layout import layout_name
from planner.plans.plan import Plan
from planner.schedule.order import micro_batch_group

__all__ = [
    "EXPORTER",
    "LAYOUT_FLAGS",
    "OPTIMIZERS",
    "PRECISIONS",
    "RECOMPUTE",
    "differs_of_core",
    "first_of_core",
    "layout_text",
    "megatron_sections",
]

PRECISIONS: Mapping[str, Flags] = {
    "fp32": {},
    "bf16": {"--bf16": []},
    "fp16": {"--fp16": []},
    "fp8": {"--bf16": [], "--fp8-format": ["hybrid"], "--fp8-recipe": ["tensorwise"]},
    "mxfp8": {"--bf16": [], "--fp8-format": ["e4m3"], "--fp8-recipe": ["mxfp8"]},
    "nvfp4": {"--bf16": [], "--fp4-format": ["e2m1"], "--fp4-recipe": ["nvfp4"]},
}

OPTIMIZERS: Mapping[str, Flags] = {
    "adamw": {"--optimizer": ["adam"]},
    "sgd": {"--optimizer": ["sgd"], "--sgd-momentum": ["0.0"]},
    "sgd_momentum": {"--optimizer": ["sgd"]},
    "lion": {"--optimizer": ["lion"]},
    "muon": {"--optimizer": ["muon"]},
}

RECOMPUTE: Mapping[str, tuple[str, ...]] = {
    "selective": ("core_attn",),
    "norm": ("layernorm",),
    "act": ("moe_act",),
    "norm+act": ("layernorm", "moe_act"),
    "norm+mla_up": ("layernorm", "mla_up_proj"),
    "mlp": ("mlp", "moe"),
}
"""Recompute choice → values of ``--recompute-modules``."""

LAYOUT_FLAGS: Mapping[str, tuple[str, ...]] = {
    "even": (),
    "short_first": ("--account-for-embedding-in-pipeline-split",),
    "short_last": ("--account-for-loss-in-pipeline-split",),
    "short_ends": ("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"),
}
"""Layouts with flags of their own; every other becomes a layout text."""

_MEASURE = "--train-iters 50 --lr 1e-5 --eval-iters 0 --log-interval 1 --log-throughput"
_MOCK = "--mock-data --tokenizer-type NullTokenizer"


def megatron_sections(target: Target) -> dict[str, Flags]:
    """Flags of a plan that keeps Megatron-LM's rules, by the array of ``run.sh`` that holds them."""
    sections = {
        "MODEL_ARGS": model_flags(target.model, target.workload.seq_len),
        "PARALLEL_ARGS": _parallel(target),
        "BATCH_ARGS": _batch(target),
        "PRECISION_ARGS": _precision(target),
        "STATE_ARGS": _states(target),
        "RECOMPUTE_ARGS": _recompute(target),
        "KERNEL_ARGS": _kernels(target),
    }
    return {name: flags for name, flags in sections.items() if flags}


def layout_text(stages: tuple[int, ...]) -> str:
    """Megatron-LM's layout of virtual stages: E embedding, t layers, L loss, a bar between stages.

    >>> layout_text((3, 4, 4, 0))
    'Et*3|t*4|t*4|L'
    """
    parts = [f"t*{layers}" if layers else "" for layers in stages]
    parts[0], parts[-1] = f"E{parts[0]}", f"{parts[-1]}L"
    return "|".join(parts)


# -- sections ----------------------------------------------------------------------------------------------------------


def _parallel(target: Target) -> Flags:
    plan, mesh, knobs = target.plan, target.plan.mesh, target.knobs
    flags: Flags = {
        "--tensor-model-parallel-size": [mesh["tp"]],
        "--pipeline-model-parallel-size": [mesh["pp"]],
        "--context-parallel-size": [mesh["cp"]],
    }
    if mesh["tp"] > 1 and knobs["sequence_parallel"] == "true":
        flags["--sequence-parallel"] = []
    if mesh["cp"] > 1:
        flags["--cp-comm-type"] = [knobs["context"]]
        if knobs["context"] == "a2a+p2p":
            flags["--hierarchical-context-parallel-sizes"] = _hierarchy(target)
    if any(block.moe for block in target.model.blocks.values()):
        flags |= {
            "--expert-model-parallel-size": [mesh["ep"]],
            "--expert-tensor-parallel-size": [mesh["etp"]],
            **_dispatcher(target),
            "--moe-grouped-gemm": [],
        }
        capacity = target.workload.capacity_factor
        if capacity is not None:
            flags |= {"--moe-expert-capacity-factor": [capacity], "--moe-pad-expert-input-to-capacity": []}
    return flags | _pipeline(plan)


_DISPATCHERS: Mapping[str, Flags] = {
    "copied": {"--moe-token-dispatcher-type": ["alltoall"]},
    "deepep": {"--moe-token-dispatcher-type": ["flex"], "--moe-flex-dispatcher-backend": ["deepep"]},
    "fused": {"--moe-token-dispatcher-type": ["flex"], "--moe-flex-dispatcher-backend": ["hybridep"]},
}


def _dispatcher(target: Target) -> Flags:
    """What brings tokens to experts on other ranks."""
    from planner.techniques.training.expert.moe_folding import dispatcher

    return _DISPATCHERS[dispatcher(target.context()) if target.plan.mesh["ep"] > 1 else "copied"]


def _hierarchy(target: Target) -> list[int]:
    """Ranks that swap heads, and positions in the ring."""
    from planner.techniques.training.context.usp import swap_degree

    swapped = int(swap_degree(target.context()).flat[0])
    return [swapped, target.plan.mesh["cp"] // swapped]


def _pipeline(plan: Plan) -> Flags:
    """Virtual stages and how layers are dealt to them; a layout text where no other flags give the same stages."""
    if plan.mesh["pp"] == 1:
        return {}
    chunks, stages = int(plan.knobs["virtual_stages"]), plan.stages
    groups: Flags = {}
    if chunks > 1 and plan.micro_batches % plan.mesh["pp"]:
        group = micro_batch_group(plan.mesh["pp"], plan.micro_batches)
        groups["--microbatch-group-size-per-virtual-pipeline-stage"] = [group]
    named = LAYOUT_FLAGS.get(layout_name(stages))
    if named is None:
        return {"--pipeline-model-parallel-layout": [layout_text(stages)]} | groups
    flags: Flags = {flag: [] for flag in named}
    flags |= {"--num-virtual-stages-per-pipeline-rank": [chunks]} if chunks > 1 else {}
    return flags | groups


def _batch(target: Target) -> Flags:
    flags: Flags = {
        "--micro-batch-size": [target.plan.knobs["micro_batch_size"]],
        "--global-batch-size": [target.workload.global_batch_size],
    }
    if target.workload.document_len is not None:
        flags["--dataloader-inter-document-masking"] = []
    return flags


def _precision(target: Target) -> Flags:
    precision, gradient = target.knobs["precision"], target.knobs["gradient_dtype"]
    flags: Flags = dict(PRECISIONS[precision])
    if target.knobs["zero_stage"] in ("2", "3"):
        # Megatron-FSDP takes gradient dtypes from flags of its own.
        return flags | {
            "--megatron-fsdp-main-grads-dtype": [gradient],
            "--megatron-fsdp-grad-comm-dtype": [gradient],
        }
    if gradient == "bf16":
        flags["--grad-reduce-in-bf16"] = []
    if precision == "fp16" and gradient == "fp32":
        flags["--accumulate-allreduce-grads-in-fp32"] = []
    return flags


def _states(target: Target) -> Flags:
    """Optimizer, what is sharded over the data-parallel ranks, and what hides its traffic."""
    knobs, stage = target.knobs, target.knobs["zero_stage"]
    offload = knobs["optimizer_offload"] == "cpu"
    flags: Flags = dict(OPTIMIZERS[knobs["optimizer"]])
    if stage != "0" or offload:
        flags["--use-distributed-optimizer"] = []
    if stage in ("2", "3"):
        flags |= {
            "--use-megatron-fsdp": [],
            "--data-parallel-sharding-strategy": ["optim_grads" if stage == "2" else "optim_grads_params"],
            "--ckpt-format": ["fsdp_dtensor"],
        }
    if stage in ("2", "3") or knobs["gradient_accumulation"] == "separate":
        flags["--no-gradient-accumulation-fusion"] = []
    if knobs["zero_group"] == "node" and stage != "0":
        copies = int(distributed_optimizer_instances(target.context())[0].flat[0])
        if copies > 1:
            flags["--num-distributed-optimizer-instances"] = [copies]
    if target.plan.mesh["dp"] * target.plan.mesh["cp"] > 1:
        flags["--overlap-grad-reduce"] = []
        if "--use-distributed-optimizer" in flags:
            flags["--overlap-param-gather"] = []
    if offload:
        flags |= {
            "--optimizer-cpu-offload": [],
            "--optimizer-offload-fraction": ["1.0"],
            "--use-precision-aware-optimizer": [],
        }
    return flags


def _recompute(target: Target) -> Flags:
    choice = target.knobs["recompute"]
    layers = recomputed_layers(target.plan)
    if layers is not None:
        choice = "block" if layers else "none"
    if choice == "none":
        return {}
    if choice in ("full", "partitioned"):
        flags: Flags = {
            "--recompute-granularity": ["full"],
            "--recompute-method": ["uniform"],
            "--recompute-num-layers": [1],
        }
        return flags | ({"--distribute-saved-activations": []} if choice == "partitioned" else {})
    if choice == "block":
        if layers is None:
            layers = int(target.knobs["recompute_layers"]) // int(target.knobs["virtual_stages"])
        return {
            "--recompute-granularity": ["full"],
            "--recompute-method": ["block"],
            "--recompute-num-layers": [layers],
        }
    modules = target.knobs["recompute_modules"].split("+") if choice == "modules" else list(RECOMPUTE[choice])
    if choice == "mlp":
        blocks = target.model.blocks.values()
        there = {"mlp": any(block.mlp for block in blocks), "moe": any(block.moe for block in blocks)}
        modules = [module for module in modules if there[module]]
    return {"--recompute-granularity": ["selective"], "--recompute-modules": modules}


def _kernels(target: Target) -> Flags:
    # "auto" picks cuDNN's or the flash-attn package's fused kernel, whichever supports the shapes.
    backend = "auto" if target.knobs["attention_kernel"] == "flash" else "unfused"
    flags: Flags = {"--attention-backend": [backend]}
    if target.knobs["loss_kernel"] == "fused":
        flags |= {"--cross-entropy-loss-fusion": [], "--cross-entropy-fusion-impl": ["native"]}
    if target.knobs["tensor_overlap"] == "chunked" and target.plan.mesh["tp"] > 1:
        flags["--tp-comm-overlap"] = []
    if target.knobs["expert_overlap"] == "combined_1f1b":
        flags["--overlap-moe-expert-parallel-comm"] = []
        if target.knobs.get("exchange_stream") != "plain":
            flags["--high-priority-a2a-comm-stream"] = []
    return flags


# -- the script --------------------------------------------------------------------------------------------------------


def _write(target: Target, script: str) -> dict[str, str]:
    sections = megatron_sections(target)
    lines = [line for flags in sections.values() for line in words(flags)]
    return {"run.sh": _script(target, sections, script), "args.txt": "\n".join(lines) + "\n"}


def _environment(target: Target) -> str:
    """Hardware queues: one where the order of launches must hold, more where Megatron-FSDP overlaps its gathers."""
    mesh = target.plan.mesh
    if target.knobs["zero_stage"] in ("2", "3"):
        return (
            "unset CUDA_DEVICE_MAX_CONNECTIONS  # Megatron-FSDP overlaps its gathers on queues of their own"
        )
    if target.cluster.device.generation.startswith("blackwell") or mesh["tp"] * mesh["cp"] == 1:
        return ""
    return (
        "export CUDA_DEVICE_MAX_CONNECTIONS=1  # launches stay in order, so that communication starts first"
    )


def _script(target: Target, sections: Mapping[str, Flags], script: str) -> str:
    plan, (nodes, per_node) = target.plan, target.nodes()
    assert prod(plan.mesh[name] for name in ("tp", "cp", "pp", "dp")) == nodes * per_node
    head = [
        "#!/usr/bin/env bash",
        f"# Megatron-LM {EXPORTER.versions[0]} (ranks in its default order tp-cp-ep-dp-pp). plan.json holds the whole plan.",
        *(f"# {line}" for line in summary(plan)),
        "# Run it once per node (job.sbatch does); MEGATRON_PATH leads to the Megatron-LM checkout. By default it",
        "# measures the plan on mock data; TRAIN_ARGS and DATA_ARGS replace that, and further arguments are passed on.",
    ]
    head += [f"# {text}" for text in differs_of_core(target)]
    launch = [
        "set -euo pipefail",
        "",
        *environment_of_torchrun(target),
        f'TRAIN_ARGS="${{TRAIN_ARGS:-{_MEASURE}}}"',
        f'DATA_ARGS="${{DATA_ARGS:-{_MOCK}}}"',
        *filter(None, [_environment(target)]),
        "",
    ]
    arrays = [line for name, flags in sections.items() for line in (f"{name}=(", *_quoted(flags), ")")]
    run = [
        "",
        *torchrun_lines(),
        f'    "${{MEGATRON_PATH:?set it to the Megatron-LM checkout}}/{script}" \\',
        *(f'    "${{{name}[@]}}" \\' for name in sections),
        '    $TRAIN_ARGS $DATA_ARGS "$@"',
    ]
    return "\n".join([*head, *launch, *arrays, *run]) + "\n"


def differs_of_core(target: Target) -> list[str]:
    """What a run of Megatron-Core does otherwise than the plan says, whoever configures it."""
    found = []
    if target.model.mtp_layers and not target.model.mtp_modules:
        found.append(
            f"Left out, as in the plan: {target.model.mtp_layers} multi-token-prediction module(s) of the model."
        )
    modules = (
        *RECOMPUTE.get(target.knobs["recompute"], ()),
        *target.knobs.get("recompute_modules", "").split("+"),
    )
    if "layernorm" in modules and any(block.mlp for block in target.model.blocks.values()):
        found.append(
            "Not recomputed: the norm before a dense feed-forward network, which is fused with its first product."
        )
    return found


def _first(target: Target) -> list[str]:
    container = "Transformer Engine and Megatron-LM 0.19 or 0.20; `MEGATRON_PATH` leads to the checkout."
    return [f"Container: {container}", *first_of_core(target)]


def first_of_core(target: Target) -> list[str]:
    """What to check before a run of Megatron-Core."""
    found = []
    if "--tp-comm-overlap" in _kernels(target):
        found.append(
            "`--tp-comm-overlap` starts its own processes' bootstrap: Transformer Engine must be built with user buffers."
        )
    if target.model.blocks and any(block.moe for block in target.model.blocks.values()):
        found.append(
            "Router on random data: mock tokens load experts almost evenly; compare with real data before you trust the rate."
        )
    return found


def _quoted(flags: Flags) -> list[str]:
    """One flag per line, values quoted where the shell would read them otherwise."""
    from shlex import quote

    return [
        "    " + " ".join((flag, *(quote(str(value)) for value in values))) for flag, values in flags.items()
    ]


EXPORTER = Exporter(
    name="megatron",
    title="Megatron-LM",
    versions=("0.19", "0.20"),
    checked="its parser, validate_args and TransformerConfig",
    launcher="megatron",
    write=_write,
    script="pretrain_gpt.py",
    framework="Megatron-Core",
    log=ITERATION_LINES,
    first=_first,
    differs=differs_of_core,
)
