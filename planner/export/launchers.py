"""What each launcher can run: the choices it can express, and its own rules over rows.

A launcher bounds the search (``Problem(launcher=launcher("megatron"))``); the exporters hold every plan against the same
rules, so what such a search returns can be exported. Rules on states, recompute and schedule apply where the recipe names
them. Sources: Megatron-LM 0.19.2 (``megatron/training/arguments.py``, ``core/transformer/transformer_config.py``), PyTorch
2.13 FSDP2 with Accelerate 1.15 (``ParallelismConfig``), DeepSpeed 0.19 (``runtime/engine.py``, ``runtime/pipe/engine.py``,
``runtime/zero/offload_config.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from planner.costs.collectives import group_members
from planner.errors import Problem, SpecError, did_you_mean
from planner.export.megatron_model import inexpressible
from planner.ledger import Array
from planner.technique import Check, Context, Launcher, off

__all__ = ["LAUNCHERS", "distributed_optimizer_instances", "launcher"]

_ALL_LAYOUTS = frozenset({"even", "short_ends", "short_first", "short_last", "balanced"})

_COMMON: Mapping[str, str] = {
    "tensor": "1d", "expert": "folded", "pipeline": "stages", "attention_kernel": "flash eager",
    "sequence_parallel": "true false",
}  # fmt: skip

_MEGATRON: Mapping[str, str] = {
    **_COMMON,
    "precision": "bf16 fp16 fp32 fp8 mxfp8 nvfp4",
    "loss_kernel": "fused eager",
    "gradient_accumulation": "fused separate",
    "context": "p2p all_gather a2a a2a+p2p",
    "expert_overlap": "none combined_1f1b",
    "tensor_overlap": "none chunked",
    "optimizer": "adamw sgd sgd_momentum lion muon",
    "zero_stage": "0 1 2 3",
    "zero_group": "full node",
    "recompute": "none selective norm act norm+act norm+mla_up mlp full partitioned block",
    "optimizer_offload": "none cpu",
    "schedule": "1f1b interleaved",
}

_FSDP: Mapping[str, str] = {
    **_COMMON,
    "precision": "bf16 fp16 fp32 tf32 fp8 mxfp8",
    "elementwise_kernel": "fused eager",
    "loss_kernel": "fused eager log_softmax linear_fused",
    "gradient_accumulation": "fused separate",
    "context": "p2p all_gather",
    "optimizer": "adamw adam8bit sgd sgd_momentum adafactor muon",
    "zero_stage": "0 2 3 fsdp",
    "zero_group": "full node",
    "checkpoint_end": "whole early_stop",
    "recompute": "none selective mlp full block",
    "optimizer_offload": "none cpu",
    "activation_offload": "none cpu",
    "parameter_offload": "none cpu",
    "schedule": "1f1b",
}

_DEEPSPEED: Mapping[str, str] = {
    **_COMMON,
    "precision": "bf16 fp16 fp32",
    "elementwise_kernel": "fused eager",
    "loss_kernel": "fused eager log_softmax linear_fused",
    "gradient_accumulation": "fused separate",
    "sequence_parallel": "false",
    "context": "p2p a2a",
    "optimizer": "adamw sgd sgd_momentum lamb lion muon",
    "zero_stage": "0 1 2 3",
    "recompute": "none full partitioned block",
    "optimizer_offload": "none cpu",
    "activation_offload": "none cpu",
    "parameter_offload": "none cpu",
    "schedule": "1f1b",
}


def launcher(name: str) -> Launcher:
    """The launcher of that name.

    Raises:
        SpecError: there is none.
    """
    if name not in LAUNCHERS:
        known = ", ".join(sorted(LAUNCHERS))
        raise SpecError(Problem("--for", repr(name), f"one of {known}", did_you_mean(name, LAUNCHERS)))
    return LAUNCHERS[name]


def distributed_optimizer_instances(ctx: Context) -> tuple[Array, Array]:
    """Copies of the sharded states when they are sharded inside a scale-up domain: of dense weights, of experts."""
    domain, devices = ctx.cluster.tiers[0].size, float(ctx.cluster.devices)
    groups = (ctx.mesh.group("dp_cp"), ctx.mesh.group("edp"))
    dense, expert = (
        g.size / np.asarray(group_members(g.size, g.stride, domain, devices), dtype=float) for g in groups
    )
    return dense, expert


# -- Megatron-LM -------------------------------------------------------------------------------------------------------


def _megatron(ctx: Context) -> Iterable[Check]:
    """Rules of ``validate_args``, of ``TransformerConfig``, and of what Megatron-LM finds out at run time."""
    for what in inexpressible(ctx.model):
        yield Check(f"no flags for {what}", False)
    device = ctx.cluster.device
    yield Check(f"runs on CUDA and ROCm devices, not on {device.name}", device.vendor in ("NVIDIA", "AMD"))
    yield from _megatron_attention(ctx)
    yield from _megatron_states(ctx)
    yield from _megatron_recompute(ctx)


def _megatron_attention(ctx: Context) -> Iterable[Check]:
    tp, cp = ctx.mesh.tp, ctx.mesh.cp
    yield Check("sequence length not divisible by 2·cp", (cp == 1) | (ctx.workload.seq_len % (2 * cp) == 0))
    context = ctx.knobs["context"]
    for block in ctx.model.blocks.values():
        attention = block.attention
        if attention is None:
            continue
        if context == "a2a":
            # Transformer Engine swaps whole KV heads: those of a tensor rank must divide among cp.
            heads = np.maximum(attention.kv_heads / tp, 1.0)
            yield Check("KV heads per rank not divisible by cp (a2a)", (cp == 1) | (heads % cp == 0))
        if attention.window and context in ("p2p", "a2a+p2p"):
            yield Check("windowed attention does not travel a ring (Transformer Engine)", cp == 1)
        if block.moe is not None and block.moe.bias:
            yield Check("experts with biases need etp = 1", ctx.mesh.etp == 1)


def _megatron_states(ctx: Context) -> Iterable[Check]:
    knobs, mesh, optimizer = ctx.knobs, ctx.mesh, ctx.knobs["optimizer"]
    stage = knobs.get("zero_stage")
    offload = knobs.get("optimizer_offload") == "cpu"
    if offload:
        yield Check("optimizer offload runs Adam only", optimizer == "adamw")
    if stage in ("2", "3"):
        yield Check("Megatron-FSDP takes Adam and SGD only", optimizer in ("adamw", "sgd", "sgd_momentum"))
        yield Check("Megatron-FSDP is documented with tp, cp and ep, not with pipelines", mesh.pp == 1)
        yield Check("Megatron-FSDP keeps its optimizer on the device", not offload)
        queues = knobs["tensor_overlap"] == "none" or ctx.cluster.device.generation.startswith("blackwell")
        # Before Blackwell one wants a single hardware queue, the other several.
        yield Check("Megatron-FSDP beside tensor-parallel overlap", queues | (mesh.tp == 1))
    if stage == "0" and offload:
        yield Check("optimizer offload needs the distributed optimizer", mesh.dp * mesh.cp == 1)
    if knobs.get("zero_group") == "node" and stage != "0" and any(b.moe for b in ctx.model.blocks.values()):
        dense, expert = distributed_optimizer_instances(ctx)
        yield Check("as many copies of expert states as of dense states (hybrid sharding)", dense == expert)
    gradient, activation = ctx.gradient_dtype, ctx.format.activation
    yield Check(f"{gradient} gradients of {activation} weights", gradient in ("fp32", activation))


def _megatron_recompute(ctx: Context) -> Iterable[Check]:
    choice, blocks = ctx.knobs.get("recompute", "none"), list(ctx.model.blocks.values())
    if choice in ("norm", "norm+act", "norm+mla_up"):
        # Transformer Engine fuses a norm with the product behind it; only MLA's and the experts' norms stand alone.
        alone = all(b.attention and b.attention.latent for b in blocks) and any(b.moe for b in blocks)
        yield Check("norms fused with the product behind them cannot be recomputed", alone)
    if choice in ("act", "norm+act"):
        experts = all(b.moe is not None and not b.moe.shared_ffn for b in blocks)
        yield Check("only the experts' activation function can be recomputed", experts)
    if choice == "block" and ctx.knobs.get("schedule") == "interleaved":
        layers, chunks = ctx.knobs.get("recompute_layers"), ctx.knobs.get("virtual_stages")
        whole = layers is not None and chunks is not None and int(layers) % int(chunks) == 0
        yield Check("layers to recompute are counted per virtual stage", whole)


# -- PyTorch FSDP2 -----------------------------------------------------------------------------------------------------


def _fsdp(ctx: Context) -> Iterable[Check]:
    """What ``fully_shard`` and a device mesh give without a pipeline runtime or expert dispatch of one's own."""
    mesh, knobs = ctx.mesh, ctx.knobs
    yield Check("no pipelines", mesh.pp == 1)
    yield Check("no expert parallelism", (mesh.ep == 1) & (mesh.etp == 1))
    if "optimizer_offload" in knobs and "parameter_offload" in knobs:
        # CPUOffloadPolicy moves parameters, gradients and states together.
        same = knobs["optimizer_offload"] == knobs["parameter_offload"]
        yield Check("parameters and optimizer states are offloaded together", same)
        sharded = knobs.get("zero_stage") in ("2", "3", "fsdp")
        yield Check("offload needs sharded states", sharded or knobs["optimizer_offload"] == "none")


# -- DeepSpeed ---------------------------------------------------------------------------------------------------------


def _deepspeed(ctx: Context) -> Iterable[Check]:
    """Rules of DeepSpeed's engines."""
    mesh, stage = ctx.mesh, ctx.knobs.get("zero_stage")
    yield Check("Ulysses is the only context parallelism", (mesh.cp == 1) | (ctx.knobs["context"] == "a2a"))
    yield Check("pipelines without Ulysses", (mesh.pp == 1) | (mesh.cp == 1))
    yield Check("pipelines without expert parallelism", (mesh.pp == 1) | (mesh.ep == 1))
    yield Check("expert groups inside data-parallel groups", mesh.dp % mesh.ep == 0)
    yield Check("experts are cut as the dense layers, or not at all", (mesh.etp == 1) | (mesh.etp == mesh.tp))
    if stage in ("2", "3"):
        yield Check("ZeRO-2 and ZeRO-3 are incompatible with pipelines", mesh.pp == 1)
    if stage == "3" and any(block.moe for block in ctx.model.blocks.values()):
        yield Check("expert parallelism without ZeRO-3", mesh.ep == 1)
    if ctx.knobs.get("optimizer_offload") == "cpu":
        yield Check("optimizer offload needs ZeRO", stage != "0")
    if ctx.knobs.get("parameter_offload") == "cpu":
        yield Check("parameter offload needs ZeRO-3", stage == "3")
    if ctx.knobs.get("activation_offload") == "cpu":
        kept = ctx.knobs.get("recompute") in ("full", "partitioned", "block")
        yield Check("only checkpoints of recomputed layers are offloaded", kept)


def _launcher(
    name: str,
    choices: Mapping[str, str],
    valid: Callable[[Context], Iterable[Check]],
    layouts: frozenset[str],
) -> Launcher:
    def allows(slot: str, value: str) -> bool:
        return value in choices.get(slot, off(slot)).split()

    return Launcher(name, allows, valid, layouts)


LAUNCHERS: Mapping[str, Launcher] = {
    "megatron": _launcher("megatron", _MEGATRON, _megatron, _ALL_LAYOUTS),
    "fsdp": _launcher("fsdp", _FSDP, _fsdp, frozenset({"even"})),
    "deepspeed": _launcher("deepspeed", _DEEPSPEED, _deepspeed, frozenset({"even", "balanced"})),
}
