"""A Megatron-LM launch script, or a file of its arguments, as a model, a job and the choices of a plan.

The script is read, not run. Flags that change what the planner would price and that it does not model are errors; the
others are listed as ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.errors import Problem, SpecError
from planner.export.flags import FlagReader, parse_flags
from planner.export.launched import LaunchedRun, degrees, ignored_note, read_text
from planner.export.layers import layerwise_of
from planner.export.megatron import LAYOUT_FLAGS, OPTIMIZERS, PRECISIONS, RECOMPUTE
from planner.export.megatron_model import model_from_flags
from planner.export.shell import Script, devices_of, read_script
from planner.pipeline.layout import layout_name, stages_named
from planner.specs.model import Model
from planner.technique import details

__all__ = ["read_megatron"]

_UNMODELLED = {
    "--hybrid-layer-pattern": "state-space layers",
    "--hybrid-override-pattern": "state-space layers",
    "--encoder-num-layers": "encoders",
    "--experimental-attention-variant": "linear or sparse attention",
    "--heterogeneous-layers-config-path": "layers of different shapes",
    "--cpu-offloading-num-layers": "activation offload of some layers",
    "--fine-grained-activation-offloading": "activation offload of some modules",
    "--tensor-parallel-num-weight-shards": "generalised tensor parallelism",
    "--use-torch-fsdp2": "PyTorch FSDP2 inside Megatron-LM",
    "--yaml-cfg": "a configuration in another file",
    "--use-checkpoint-args": "an architecture that a checkpoint holds",
    "--use-tp-pp-dp-mapping": "another order of ranks",
    "--hybrid-context-parallel": "context parallelism that varies by sequence",
}


def read_megatron(path: str | Path, variables: Mapping[str, str] | None = None) -> LaunchedRun:
    """The run that a script or a file of arguments describes.

    Args:
        path: a shell script that starts Megatron-LM, or a file that holds its arguments only.
        variables: environment of the script; positional parameters by number (``{"1": "/data"}``).

    Raises:
        SpecError: the file cannot be read, flags are missing or wrong, or ask for what is not modelled; all at once.
    """
    where = str(path)
    text = read_text(path, "a launch script, or a file of arguments")
    script = read_script(text, where, variables)
    launch, arguments = _command(script, where)
    flags = FlagReader(parse_flags(arguments), where)
    flags.refuse(_UNMODELLED)
    model = model_from_flags(flags, Path(path).stem)
    workload, fixed = _workload(flags), _knobs(flags, model)
    notes = [*script.notes, *_assumed(flags)]
    layerwise = _layerwise(fixed)
    devices = degrees(fixed, devices_of(script, launch), notes)
    flags.raise_if_any()
    ignored = tuple(flag for flag in flags.unread() if flag not in _IMPLIED)
    notes += ignored_note(ignored)
    wasteful = tuple(_wasteful(flags, fixed, script))
    return LaunchedRun(
        "megatron", model, workload, fixed, devices, tuple(notes), wasteful, ignored, layerwise=layerwise
    )


# -- the command -------------------------------------------------------------------------------------------------------


def _command(script: Script, where: str) -> tuple[list[str], list[str]]:
    """Words before the training script, and its arguments."""
    for command in script.commands:
        words = list(command.words)
        if "--num-layers" not in words:
            continue
        ends = [index for index, word in enumerate(words) if word.endswith(".py")]
        if ends:
            return words[: ends[0]], words[ends[0] + 1 :]
    words = [word for command in script.commands for word in command.words]
    if words and words[0].startswith("--") and "--num-layers" in words:
        return [], words
    raise SpecError(
        Problem(
            where,
            "starts no training script with --num-layers",
            "torchrun … pretrain_gpt.py …, or a file of arguments",
        )
    )


# -- flags → knobs -----------------------------------------------------------------------------------------------------

_IMPLIED = (
    "--use-mcore-models",
    "--moe-grouped-gemm",
    "--ckpt-format",
    "--optimizer-offload-fraction",
    "--use-precision-aware-optimizer",
    "--moe-router-pre-softmax",
    "--moe-pad-expert-input-to-capacity",
    "--cross-entropy-fusion-impl",
    "--megatron-fsdp-grad-comm-dtype",
    "--accumulate-allreduce-grads-in-fp32",
    "--microbatch-group-size-per-virtual-pipeline-stage",
)
"""Flags that the planner takes for granted, or that others imply."""


def _workload(flags: FlagReader) -> dict[str, Any]:
    workload: dict[str, Any] = {
        "global_batch_size": flags.integer("--global-batch-size"),
        "seq_len": flags.integer("--seq-length"),
        "optimizer": _optimizer(flags),
        "precisions": (_precision(flags),),
    }
    capacity = flags.number("--moe-expert-capacity-factor", None)
    if capacity is not None:
        workload["capacity_factor"] = capacity
    if flags.present("--dataloader-inter-document-masking"):
        flags.fault(
            "--dataloader-inter-document-masking", "does not tell how long documents are", "runs without it"
        )
    return workload


def _assumed(flags: FlagReader) -> list[str]:
    """What the planner prices though the run does not ask for it."""
    missing = [
        flag for flag in ("--overlap-grad-reduce", "--overlap-param-gather") if not flags.present(flag)
    ]
    sharded = flags.present("--use-distributed-optimizer") or flags.present("--use-megatron-fsdp")
    if not sharded and "--overlap-param-gather" in missing:
        missing.remove("--overlap-param-gather")
    return [f"Priced as with {' '.join(missing)}, which the run leaves out."] if missing else []


def _wasteful(flags: FlagReader, fixed: Mapping[str, Any], script: Script) -> Iterator[str]:
    """What the run leaves on the table, or asks for in vain."""
    missing = [
        name for name in ("--overlap-grad-reduce", "--overlap-param-gather") if name not in flags.flags
    ]
    sharded = fixed["zero_stage"] != "0"
    if missing[:1] == ["--overlap-grad-reduce"] and fixed.get("dp", 2) * fixed["cp"] > 1:
        yield "Without --overlap-grad-reduce, gradients are reduced after the backward instead of beside it."
    if "--overlap-param-gather" in missing and sharded and fixed.get("dp", 2) * fixed["cp"] > 1:
        yield "Without --overlap-param-gather, weights are gathered before the forward instead of beside it."
    if fixed["tp"] > 1 and fixed["sequence_parallel"] == "false":
        yield "Without --sequence-parallel, every tensor-parallel rank keeps the same norms' and dropouts' activations."
    if "--sequence-parallel" in flags.flags and fixed["tp"] == 1:
        yield "--sequence-parallel does nothing at tensor parallelism 1 (validate_args turns it off)."
    if not sharded and fixed.get("dp", 2) > 1:
        yield "Without --use-distributed-optimizer, every replica keeps all optimizer states."
    if "--no-gradient-accumulation-fusion" in flags.flags and fixed["gradient_accumulation"] == "separate":
        yield "--no-gradient-accumulation-fusion adds every weight gradient by a kernel of its own."
    if fixed["loss_kernel"] == "eager":
        yield "Without --cross-entropy-loss-fusion, the logits' gradient is a tensor of its own."
    if fixed["attention_kernel"] == "eager":
        yield "An unfused attention backend keeps the scores of all pairs of tokens."
    launched = not script.commands[0].words[0].startswith("--")
    ordered = script.variables.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"
    if launched and not ordered and fixed["tp"] * fixed["cp"] > 1 and fixed["zero_stage"] in ("0", "1"):
        yield "CUDA_DEVICE_MAX_CONNECTIONS is not 1: before Blackwell, collectives may start behind what is to hide them."


def _knobs(flags: FlagReader, model: Model) -> dict[str, Any]:
    tp = flags.integer("--tensor-model-parallel-size", 1)
    cp = flags.integer("--context-parallel-size", 1)
    pp = flags.integer("--pipeline-model-parallel-size", 1)
    experts = any(block.moe for block in model.blocks.values())
    ep, etp = (
        flags.integer("--expert-model-parallel-size", 1),
        flags.integer("--expert-tensor-parallel-size", tp),
    )
    layout, chunks = _pipeline(flags, model, pp)
    return {
        "tp": tp,
        "cp": cp,
        "pp": pp,
        "ep": ep if experts else 1,
        "etp": etp if experts else 1,
        "micro_batch_size": flags.integer("--micro-batch-size"),
        "virtual_stages": chunks,
        "schedule": "interleaved" if chunks > 1 else "1f1b",
        "pipeline_layout": layout,
        "sequence_parallel": "true" if flags.present("--sequence-parallel") and tp > 1 else "false",
        "context": _context(flags) if cp > 1 else "p2p",
        **_exchange(flags),
        "tensor_overlap": "chunked" if flags.present("--tp-comm-overlap") and tp > 1 else "none",
        "precision": _precision(flags),
        "gradient_dtype": _gradient(flags),
        "optimizer": _optimizer(flags),
        "attention_kernel": flags.choice("--attention-backend", "auto", _BACKENDS),
        "adaptation": "none",
        "elementwise_kernel": "fused",  # its norms, rotations and activations are single kernels
        "loss_kernel": "fused" if flags.present("--cross-entropy-loss-fusion") else "eager",
        **_states(flags),
        **_accumulation(flags),
        **_dispatch(flags, ep if experts else 1),
        "cuda_graph": "none",
        "checkpoint_end": "whole",
        **_recompute(flags, chunks),
    }


def _accumulation(flags: FlagReader) -> dict[str, str]:
    """Whether weight gradients are added by a kernel of their own; Megatron-FSDP, which shards them, cannot do otherwise."""
    separate = flags.present("--no-gradient-accumulation-fusion") and not flags.present("--use-megatron-fsdp")
    return {"gradient_accumulation": "separate" if separate else "fused"}


def _exchange(flags: FlagReader) -> dict[str, str]:
    """What experts' exchanges run beside, and whether their stream comes first there."""
    first = flags.present("--high-priority-a2a-comm-stream")
    if not flags.present("--overlap-moe-expert-parallel-comm"):
        return {"expert_overlap": "none"}
    return {"expert_overlap": "combined_1f1b", **({} if first else {"exchange_stream": "plain"})}


def _dispatch(flags: FlagReader, ep: int) -> dict[str, str]:
    """What brings tokens to experts on other ranks, unless it is what plans take for granted."""
    kind = flags.choice("--moe-token-dispatcher-type", "allgather", _DISPATCHERS)
    kernels = flags.choice("--moe-flex-dispatcher-backend", "deepep", _EXCHANGES)
    if flags.present("--moe-enable-deepep"):
        kernels = "deepep"
    how = kind or kernels
    return {"dispatch": how} if ep > 1 and how != "fused" else {}


_DISPATCHERS = {"allgather": "copied", "alltoall": "copied", "flex": ""}
_EXCHANGES = {"deepep": "deepep", "hybridep": "fused"}
_BACKENDS = {"auto": "flash", "flash": "flash", "fused": "flash", "unfused": "eager", "local": "eager"}
_CONTEXTS = {name: name for name in ("p2p", "all_gather", "a2a", "a2a+p2p")} | {"allgather": "all_gather"}


def _context(flags: FlagReader) -> str:
    values = flags.flags.get("--cp-comm-type", ["p2p"])
    if len(set(values)) > 1:
        flags.fault("--cp-comm-type", " ".join(values), "one kind for all layers")
        return "p2p"
    flags.read.add("--hierarchical-context-parallel-sizes")
    return flags.choice("--cp-comm-type", "p2p", _CONTEXTS)


def _precision(flags: FlagReader) -> str:
    eight, four = flags.text("--fp8-format", None), flags.text("--fp4-format", None)
    recipe = flags.text("--fp8-recipe", "delayed")
    half, brain = flags.present("--fp16"), flags.present("--bf16")
    if four:
        flags.read.add("--fp4-recipe")
        return "nvfp4"
    if eight:
        known = {"tensorwise": "fp8", "delayed": "fp8", "mxfp8": "mxfp8"}
        if recipe not in known:
            flags.fault("--fp8-recipe", f"{recipe}: not modelled", f"one of {', '.join(known)}")
        return known.get(recipe, "fp8")
    name = "bf16" if brain else "fp16" if half else "fp32"
    assert name in PRECISIONS
    return name


def _gradient(flags: FlagReader) -> str:
    """Dtype in which gradients are accumulated and reduced: fp32 beside bf16, that of the weights beside fp16."""
    if flags.present("--use-megatron-fsdp"):
        return str(flags.text("--megatron-fsdp-main-grads-dtype", "fp32"))
    if flags.present("--grad-reduce-in-bf16"):
        return "bf16"
    wide = flags.present("--accumulate-allreduce-grads-in-fp32")
    return "fp16" if flags.present("--fp16") and not wide else "fp32"


def _optimizer(flags: FlagReader) -> str:
    name = flags.text("--optimizer", "adam")
    momentum = flags.number("--sgd-momentum", 0.9)
    known = {str(values["--optimizer"][0]): key for key, values in OPTIMIZERS.items() if key != "sgd"}
    if name not in known:
        flags.fault("--optimizer", f"{name}: not modelled", f"one of {', '.join(known)}")
        return "adamw"
    return "sgd" if name == "sgd" and not momentum else known[name]


def _states(flags: FlagReader) -> dict[str, Any]:
    """What is sharded over the data-parallel ranks, over which of them, and what the host holds."""
    fsdp, distributed = flags.present("--use-megatron-fsdp"), flags.present("--use-distributed-optimizer")
    strategies = {"no_shard": "0", "optim": "1", "optim_grads": "2", "optim_grads_params": "3"}
    strategy = flags.choice("--data-parallel-sharding-strategy", "optim_grads_params", strategies)
    offload = flags.present("--optimizer-cpu-offload")
    if offload and flags.number("--optimizer-offload-fraction", 1.0) != 1.0:
        flags.fault("--optimizer-offload-fraction", "offload of a part is not modelled", "1.0")
    copies = flags.integer("--num-distributed-optimizer-instances", 1)
    return {
        "zero_stage": strategy if fsdp else "1" if distributed else "0",
        "zero_group": "node" if copies > 1 else "full",
        "optimizer_offload": "cpu" if offload else "none",
    }


def _recompute(flags: FlagReader, chunks: int) -> dict[str, Any]:
    granularity = flags.text(
        "--recompute-granularity", "selective" if flags.present("--recompute-activations") else None
    )
    method, layers = flags.text("--recompute-method", None), flags.integer("--recompute-num-layers", None)
    modules = tuple(flags.flags.get("--recompute-modules", ["core_attn"]))
    split = flags.present("--distribute-saved-activations")
    flags.read.add("--recompute-modules")
    if granularity is None:
        return {"recompute": "none"}
    if granularity == "selective":
        known = {frozenset(values): key for key, values in RECOMPUTE.items()}
        known |= {frozenset({"moe"}): "mlp", frozenset({"mlp"}): "mlp"}
        if frozenset(modules) in known:
            return {"recompute": known[frozenset(modules)]}
        try:
            return {
                "recompute": "modules",
                "recompute_modules": details()["recompute_modules"].read("+".join(modules)),
            }
        except ValueError:
            flags.fault(
                "--recompute-modules",
                f"{' '.join(modules)}: not modelled",
                details()["recompute_modules"].expected,
            )
            return {"recompute": "none"}
    if method == "block":
        return {"recompute": "block", "recompute_layers": int(layers or 1) * chunks}
    if granularity != "full" or method != "uniform" or layers != 1:
        found = f"{granularity}, {method}, {layers} layers"
        flags.fault(
            "--recompute-granularity", found, "selective, or full with uniform over 1 layer or with block"
        )
    return {"recompute": "partitioned" if split else "full"}


def _pipeline(flags: FlagReader, model: Model, pp: int) -> tuple[str, int]:
    """Name of the layout, and virtual stages per device."""
    given = tuple(flag for flag in LAYOUT_FLAGS["short_ends"] if flags.present(flag))
    name = next(key for key, named in LAYOUT_FLAGS.items() if named == given)
    chunks = flags.integer("--num-virtual-stages-per-pipeline-rank", 1)
    each = flags.integer("--num-layers-per-virtual-pipeline-stage", None)
    text = flags.text("--pipeline-model-parallel-layout", None)
    ends = [flags.integer(f"--decoder-{end}-pipeline-num-layers", None) for end in ("first", "last")]
    if text is not None:
        stages = _drawn(flags, text, model, pp)
        return layout_name(stages), len(stages) // pp
    if any(ends) and pp > 1:
        if given or each:
            other = given[0] if given else "--num-layers-per-virtual-pipeline-stage"
            flags.fault("--decoder-first-pipeline-num-layers", f"beside {other}", "one of them")
        return layout_name(_of_ends(flags, ends, model, pp, chunks)), chunks
    if each:
        chunks = max((model.n_layers + len(given)) // (pp * each), 1)
    return name, chunks


def _of_ends(flags: FlagReader, ends: Sequence[int | None], model: Model, pp: int, chunks: int) -> list[int]:
    """Layers per virtual stage with those of the first and of the last device given; all others hold as many as each other."""
    known = {device: layers for device, layers in zip((0, pp - 1), ends, strict=True) if layers}
    each, left = divmod(model.n_layers - sum(known.values()), max(pp - len(known), 1))
    devices = [known.get(device, each) for device in range(pp)]
    if left or sum(devices) != model.n_layers or each < 0 or any(layers % chunks for layers in devices):
        flags.fault("pipeline stages", "cannot be dealt", "a whole number of layers on every stage")
        return [model.n_layers]
    return [layers // chunks for layers in devices] * chunks


def _drawn(flags: FlagReader, text: str, model: Model, pp: int) -> list[int]:
    """Layers (t) between the bars of a layout."""
    flat = _flat(text)
    stages = [part.count("t") for part in flat.split("|")]
    drawn = flat.startswith("E") and flat.endswith("L") and set(flat) <= set("EtL|")
    if not drawn or len(stages) % pp or sum(stages) != model.n_layers:
        expected = f"{model.n_layers} layers (t) on stages of {pp} devices, from E to L"
        flags.fault("--pipeline-model-parallel-layout", text, expected)
        return [model.n_layers] * pp
    return stages


def _flat(text: str) -> str:
    """A layout without its multipliers."""
    import re

    flat = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        flat = re.sub(pattern, lambda match: match[1] * min(int(match[2]), 10_000), flat)
    return flat


def _layerwise(fixed: Mapping[str, Any]) -> dict[str, Any] | None:
    """Choices of every layer where they are recomputed by blocks in stages that differ: the first layers of every virtual stage.

    None for all other runs; of equal stages, a share of all layers says as much.
    """
    stages = stages_named(fixed["pipeline_layout"])
    if fixed["recompute"] != "block" or not stages:
        return None
    count = fixed["recompute_layers"] // fixed["virtual_stages"]
    layers = [{"recompute": "full" if n < count else "none"} for size in stages for n in range(size)]
    return layerwise_of(fixed, layers, stages, {"recompute": "none"})
