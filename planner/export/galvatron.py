"""A plan as Galvatron's strategy per layer: ``galvatron.json`` and the launch of its Llama or GPT training script.

The JSON holds a degree, a kind of data parallelism and a recompute flag for each layer: layers of a plan may differ in how many
ranks they are cut to, by tensor parallelism or by Ulysses, in whether they shard their weights (``zero3`` beside the default of
all others) and whether they are recomputed. All take the same micro-batches (``chunks``), so that sizes follow from degrees. Keys
and rules are those of hetu-galvatron 2.4.0 (``utils/config_utils.py``, ``core/runtime/hybrid_parallel_config.py``,
``comm_groups.py``, ``redistribute.py``, ``arguments.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from planner.export.exporter import Exporter, Log, environment_of_torchrun, torchrun_lines
from planner.export.layers import of_ends, of_layers, ways_of_ends, ways_of_layers
from planner.export.rules import COMMON, has_experts, make_launcher
from planner.export.target import Target, broken, summary
from planner.specs.model import Model
from planner.technique import Check, Context

__all__ = ["CHOICES", "DEFAULT_TYPES", "EXPORTER", "LAUNCHER", "PIPELINES", "strategy"]

CHOICES: Mapping[str, str] = {
    **COMMON,
    "attention_kernel": "flash",
    "precision": "bf16 fp16 fp32",
    "gradient_accumulation": "fused separate",
    "loss_kernel": "fused eager",
    "context": "p2p a2a",
    "optimizer": "adamw",
    "zero_stage": "0 2 3",
    "recompute": "none full",
    "schedule": "1f1b gpipe",
}

DEFAULT_TYPES: Mapping[str, str] = {"0": "ddp", "2": "zero2", "3": "zero3"}
PIPELINES: Mapping[str, str] = {"1f1b": "pipedream_flush", "gpipe": "gpipe"}
_DEGREES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def _family(model: Model) -> str | None:
    """The folder of Galvatron's model that trains this shape; None where there is none."""
    blocks = list(model.blocks.values())
    if len(blocks) != 1 or blocks[0].attention is None or blocks[0].mlp is None or blocks[0].parallel:
        return None
    block, attention = blocks[0], blocks[0].attention
    assert block.mlp is not None
    if attention.latent or attention.window or not attention.causal or attention.qk_norm or attention.sinks:
        return None
    # Width of a head is hidden / heads in both, and there is no flag for it.
    if attention.head_dim * attention.heads != model.hidden or model.tied_embeddings:
        return None
    plain = block.norm == "rmsnorm" and block.mlp.gated and not (block.mlp.bias or attention.qkv_bias)
    return "llama_hf" if plain and not model.learned_positions else None


def _valid(ctx: Context) -> Iterable[Check]:
    mesh, knobs = ctx.mesh, ctx.knobs
    yield Check(
        "only Llama's shape: RMSNorm, gated networks, heads of hidden/heads, no biases, untied",
        _family(ctx.model) is not None,
    )
    yield Check("no experts", not has_experts(ctx.model))
    yield Check("one of tensor parallelism and Ulysses per layer", (mesh.tp == 1) | (mesh.cp == 1))
    yield Check("Ulysses is the only context parallelism", (mesh.cp == 1) | (knobs["context"] == "a2a"))
    yield Check("fewer micro-batches (chunks) than stages", ctx.micro_batches >= mesh.pp)
    yield Check("pipeline degrees are powers of two up to 512", np.isin(mesh.pp, _DEGREES))
    gradient, activation = ctx.gradient_dtype, ctx.format.activation
    yield Check(f"{gradient} gradients of {activation} weights", gradient in ("fp32", activation))
    if knobs.get("zero_stage") == "2":
        # Gradients of all micro-batches are added before they are reduced, unless reduction is told not to wait.
        yield Check("ZeRO-2 with pipelines keeps whole gradients", mesh.pp == 1)


def _sharing(ctx: Context) -> Iterable[Check]:
    """Of layers under ``--sequence-parallel``, which Ulysses needs for its positions, its messages, and what it meets."""
    yield Check(
        "some tensor-parallel layers share the sequence or stand beside Ulysses, and others keep it whole: one flag for all",
        (ctx.mesh.tp == 1) | (ctx.knobs["sequence_parallel"] == "true"),
    )


def _whole(ctx: Context) -> Iterable[Check]:
    """Of layers without the flag."""
    shared = ctx.knobs["sequence_parallel"] == "true"
    yield Check(
        "some layers share the sequence (tensor-parallel ranks, or Ulysses), and others keep it whole: one flag for all",
        (ctx.mesh.cp == 1) & ((ctx.mesh.tp == 1) | (not shared)),
    )


LAUNCHER = make_launcher(
    "galvatron",
    CHOICES,
    _valid,
    per_layer={"zero_stage": ("0 3", "2 3"), "recompute": ("none full",)},
    alike_at_ends="zero_stage tp cp",
    per_place="tp cp dp micro_batch_size sequence_parallel context",
    families=(_sharing, _whole),
)


def strategy(target: Target) -> dict[str, Any]:
    """The JSON's content for a plan that keeps the rules."""
    plan, knobs = target.plan, target.knobs
    stages = of_layers(plan, "zero_stage")
    ends = of_ends(plan, "zero_stage")
    # What the layers do that do not shard their weights; of those that all do, nothing is said.
    default = next((stage for stage in (*stages, *ends) if stage != "3"), "0")

    def each(values: Iterable[object]) -> str:
        return ",".join(str(int(value)) for value in values)  # type: ignore[call-overload]

    ways, vocabulary = ways_of_layers(plan), ways_of_ends(plan)[0]
    return {
        "pp_deg": plan.mesh["pp"],
        "tp_sizes_enc": each(way["tp"] * way["cp"] for way in ways),
        "tp_consecutive_flags": each(1 for _ in ways),
        "dp_types_enc": each(stage == "3" for stage in stages),
        "use_sp": each(way["cp"] > 1 for way in ways),
        "checkpoint": each(own == "full" for own in of_layers(plan, "recompute")),
        "global_bsz": target.workload.global_batch_size,
        "chunks": plan.micro_batches,
        "pp_division": ",".join(map(str, plan.stages)),
        "pipeline_type": PIPELINES[knobs["schedule"]],
        "default_dp_type": DEFAULT_TYPES[default],
        "vtp": vocabulary["tp"] * vocabulary["cp"],
        "vsp": int(vocabulary["cp"] > 1),
        "embed_sdp": int(ends[0] == "3"),
    }


def _write(target: Target, script: str) -> dict[str, str]:
    knobs, model = target.knobs, target.model
    attention, mlp = next(iter(model.blocks.values())).attention, next(iter(model.blocks.values())).mlp
    assert attention is not None
    assert mlp is not None
    shape = {
        "dim": model.hidden, "ffn_dim": mlp.ffn, "n_heads": attention.heads, "n_kv_heads": attention.kv_heads,
        "n_layers": model.n_layers, "n_positions": target.workload.seq_len, "vocab_size": model.vocab, "norm_eps": 1e-5,
    }  # fmt: skip
    options = [
        "--galvatron_config_path galvatron.json",
        f"--mixed_precision {knobs['precision']}",
        f"--seq-length {target.workload.seq_len} --train-iters ${{STEPS:-30}} --lr 1e-5",
        "--use-flash-attn --initialize_on_meta 1 --profile 1 --exit_after_profiling 0",
    ]
    if broken(_whole, target.contexts()):
        options.append("--sequence-parallel")
    if knobs["gradient_dtype"] == "fp32":
        options.append("--reduce_in_fp32")
    if knobs["loss_kernel"] == "eager":
        options.append("--entropy_in_fp32")
    lines = [
        "#!/usr/bin/env bash",
        "# Galvatron 2.4; plan.json holds the whole plan.",
        *(f"# {line}" for line in summary(target.plan)),
        "# Run it once per node; GALVATRON_PATH leads to the Galvatron checkout. model.json has the sizes: put its path into",
        "# path_dict of Galvatron's models/llama_hf/meta_configs/config_utils.py under the name that MODEL_SIZE has. DATA_ARGS",
        "# are Megatron-LM's.",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        "",
        *environment_of_torchrun(target),
        "",
        *torchrun_lines(),
        f'    "${{GALVATRON_PATH:?set it to the Galvatron checkout}}/{script}" --model_size ${{MODEL_SIZE:?}} \\',
        *(f"    {option} \\" for option in options),
        '    ${DATA_ARGS:-} "$@"',
    ]
    return {
        "run.sh": "\n".join(lines) + "\n",
        "galvatron.json": json.dumps(strategy(target), indent=2) + "\n",
        "model.json": json.dumps(shape, indent=2) + "\n",
    }


def _first(target: Target) -> list[str]:
    return [
        "`GALVATRON_PATH` leads to the checkout. `model.json` must be known to Galvatron: add it to `path_dict` of"
        " `models/llama_hf/meta_configs/config_utils.py` there, and set `MODEL_SIZE` to the name that it has.",
        "`DATA_ARGS` are Megatron-LM's (`--data-path`, tokenizer).",
    ]


def _differs(target: Target) -> list[str]:
    degrees = {(way["tp"], way["cp"]) for way in (*ways_of_layers(target.plan), *ways_of_ends(target.plan))}
    if len(degrees) == 1:
        return []
    return [
        "Between layers of unlike degrees, Galvatron gathers whole sequences and slices them; the plan is priced with the "
        "collectives that send least. `resharding` in `planner explain` is a lower bound of it."
    ]


EXPORTER = Exporter(
    name="galvatron",
    title="Galvatron",
    versions=("2.4",),
    checked="config2strategy and check_hp_config",
    launcher="galvatron",
    write=_write,
    script="galvatron/models/llama_hf/train_dist.py",
    framework="Galvatron",
    log=Log(step=r"Elapsed time per iteration \(ms\): ([\d.]+)", step_unit_s=1e-3),
    first=_first,
    differs=_differs,
)
