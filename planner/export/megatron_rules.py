"""What Megatron-LM can run: choices with flags, and its rules.

Sources: Megatron-LM 0.19.2 (``megatron/training/arguments.py``, ``core/transformer/transformer_config.py``; buffers' names:
``core/extensions/transformer_engine.py``, ``TELinear``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from planner.export.megatron_model import inexpressible
from planner.export.rules import (
    COMMON,
    distributed_optimizer_instances,
    has_experts,
    make_launcher,
)
from planner.technique import Check, Context

__all__ = ["CHOICES", "LAUNCHER"]

CHOICES: Mapping[str, str] = {
    **COMMON,
    "precision": "bf16 fp16 fp32 fp8 mxfp8 nvfp4",
    "loss_kernel": "fused eager",
    "gradient_accumulation": "fused separate",
    "context": "p2p all_gather a2a a2a+p2p",
    "expert_overlap": "none combined_1f1b",
    "tensor_overlap": "none chunked",
    "optimizer": "adamw sgd sgd_momentum lion muon",
    "zero_stage": "0 1 2 3",
    "zero_group": "full node",
    "recompute": "none selective norm act norm+act norm+mla_up mlp modules full partitioned block",
    "optimizer_offload": "none cpu",
    "schedule": "1f1b interleaved",
}


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
        if attention.latent:
            # Its products have names that no user buffer has: the switch turns itself off for the layers behind them.
            plain = ctx.knobs["tensor_overlap"] == "none"
            yield Check("--tp-comm-overlap has no buffers for latent attention", plain | (tp == 1))
        if attention.window and context in ("p2p", "a2a+p2p"):
            yield Check("windowed attention does not travel a ring (Transformer Engine)", cp == 1)
        if block.moe is not None and ctx.workload.capacity_factor is not None:
            yield Check("DeepEP does not pad tokens to a capacity", ctx.knobs.get("dispatch") != "deepep")
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
        fused = knobs["gradient_accumulation"] == "fused"
        yield Check("Megatron-FSDP adds gradients up as it reduces them, without a kernel to choose", fused)
        queues = knobs["tensor_overlap"] == "none" or ctx.cluster.device.generation.startswith("blackwell")
        # Before Blackwell one wants a single hardware queue, the other several.
        yield Check("Megatron-FSDP beside tensor-parallel overlap", queues | (mesh.tp == 1))
    if stage == "0" and offload:
        yield Check("optimizer offload needs the distributed optimizer", mesh.dp * mesh.cp == 1)
    if knobs.get("zero_group") == "node" and stage != "0" and has_experts(ctx.model):
        dense, expert = distributed_optimizer_instances(ctx)
        yield Check("as many copies of expert states as of dense states (hybrid sharding)", dense == expert)
    gradient, activation = ctx.gradient_dtype, ctx.format.activation
    yield Check(f"{gradient} gradients of {activation} weights", gradient in ("fp32", activation))


def _megatron_recompute(ctx: Context) -> Iterable[Check]:
    choice, blocks = ctx.knobs.get("recompute", "none"), list(ctx.model.blocks.values())
    modules = str(ctx.knobs.get("recompute_modules", "")).split("+") if choice == "modules" else ()
    if choice in ("norm", "norm+act", "norm+mla_up") or "layernorm" in modules:
        # Transformer Engine fuses a norm with the product behind it; only MLA's and the experts' norms stand alone.
        alone = all(b.attention and b.attention.latent for b in blocks) and any(b.moe for b in blocks)
        yield Check("norms fused with the product behind them cannot be recomputed", alone)
    if choice in ("act", "norm+act") or "moe_act" in modules:
        experts = all(b.moe is not None and not b.moe.shared_ffn for b in blocks)
        yield Check("only the experts' activation function can be recomputed", experts)
    if ctx.knobs.get("expert_overlap") == "combined_1f1b":
        alone, whole = ctx.mesh.ep == 1, choice in ("full", "partitioned", "block", "mlp") or "moe" in modules
        virtual = ctx.knobs.get("schedule", "interleaved") == "interleaved"
        yield Check(
            "overlapped expert exchange needs virtual stages in a pipeline",
            alone | (ctx.mesh.pp == 1) | virtual,
        )
        yield Check("overlapped expert exchange beside recomputed experts", alone | (not whole))
        yield Check("overlapped expert exchange in fp32", alone | (ctx.knobs["precision"] != "fp32"))
    if choice == "block" and ctx.knobs.get("schedule") == "interleaved":
        layers, chunks = ctx.knobs.get("recompute_layers"), ctx.knobs.get("virtual_stages")
        whole = layers is not None and chunks is not None and int(layers) % int(chunks) == 0
        yield Check("layers to recompute are counted per virtual stage", whole)


LAUNCHER = make_launcher("megatron", CHOICES, _megatron)
