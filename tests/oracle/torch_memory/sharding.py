"""How a decoder is sharded: tensor parallelism, recomputation, FSDP2, in the order in which torchtitan applies them."""

from collections import Counter

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# FSDP2 joins its mesh to that of tensor parallelism, and looks its rank up in a tensor, which must therefore be real.
DeviceMesh._concatenate = staticmethod(unset_fake_temporarily()(DeviceMesh._concatenate))

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard(decoder, case, mesh):
    """The decoder, sharded as the case says."""
    if case["tp"] > 1:
        _tensor_parallel(decoder, mesh["tp"], case["sequence_parallel"])
    if case["recompute"] != "none":
        policy = {"context_fn": every_second_product} if case["recompute"] == "per_op" else {}
        for name, layer in decoder.layers.named_children():
            decoder.layers.register_module(
                name, checkpoint_wrapper(layer, preserve_rng_state=False, **policy)
            )
    if case["fsdp"]:
        keywords = {"mesh": mesh["dp"], "reshard_after_forward": case["fsdp"] == "reshard"}
        if case["precision"] == "bf16":
            keywords["mp_policy"] = BF16
        embeddings = [decoder.embedding] + ([] if decoder.llama else [decoder.positions])
        for unit in (embeddings, *decoder.layers, decoder.head, decoder):
            fully_shard(unit, **keywords)
    return decoder


def every_second_product():
    """torchtitan's policy of 2024 and 2025: keep attention, reduce-scatters and every second product."""
    products = Counter()

    def policy(ctx, operator, *_, **__):
        products[ctx.is_recompute] += operator is PRODUCT
        kept = operator in KEPT or (operator is PRODUCT and products[ctx.is_recompute] % 2)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


PRODUCT = torch.ops.aten.mm.default
KEPT = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
)


def _tensor_parallel(decoder, mesh, sequence_parallel):
    """Columns, then rows; norms whole, or on parts of the sequence."""
    parts = Shard(1) if sequence_parallel else Replicate()
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=parts),
        "head.logits": ColwiseParallel(input_layouts=parts, output_layouts=Shard(-1), use_local_output=False),
    }
    if sequence_parallel:
        plan["head.norm"] = SequenceParallel()
        if not decoder.llama:
            plan["positions"] = PrepareModuleInput(
                input_layouts=Replicate(), desired_input_layouts=Shard(0), use_local_output=True
            )
    parallelize_module(decoder, mesh, plan)
    for layer in decoder.layers:
        plan = {
            **{f"attention.{name}": ColwiseParallel() for name in "qkv"},
            "attention.output": RowwiseParallel(output_layouts=parts),
            "mlp.fc1": ColwiseParallel(),
            "mlp.fc2": RowwiseParallel(output_layouts=parts),
        }
        if decoder.llama:
            plan["mlp.up"] = ColwiseParallel()
        if sequence_parallel:
            plan |= {
                "norm1": SequenceParallel(),
                "norm2": SequenceParallel(),
                "attention": PrepareModuleInput(
                    input_layouts=(parts, None), desired_input_layouts=(Replicate(), None)
                ),
                "mlp": PrepareModuleInput(input_layouts=(parts,), desired_input_layouts=(Replicate(),)),
            }
        parallelize_module(layer, mesh, plan)
