"""The device mesh of a plan, and what FSDP2 is to be given.

Plan 5d03e9bd6c: llama3-8b on a100-sxm-80gb:4x8, 32 devices (tp 1 · cp 1 · pp 1 · dp 32 · ep 1 · etp 1).
Predicted: 8.687 s per step, 3,772 tokens/s per device, 26.2 GiB per device.
"""

PLAN = {
    "dimensions": {
        "pp": 1,
        "dp_replicate": 4,
        "dp_shard": 8,
        "cp": 1,
        "tp": 1,
    },
    "expert_dimensions": {
        "ep": 1,
        "etp": 1,
    },
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "seq_len": 4096,
    "fully_shard": {
        "reshard_after_forward": True,
        "param_dtype": "bfloat16",
        "reduce_dtype": "float32",
        "offload": False,
    },
    "sequence_parallel": False,
    "recompute": "full",
}


def build_mesh(device_type="cuda"):
    """The mesh, once torch.distributed is initialised; dimensions of size 1 are kept, so that code may name them."""
    from torch.distributed.device_mesh import init_device_mesh

    dimensions = PLAN["dimensions"]
    return init_device_mesh(device_type, tuple(dimensions.values()), mesh_dim_names=tuple(dimensions))


def shard_mesh(mesh):
    """The part to shard over, (replicas, shards): context-parallel ranks hold the same weights and share in it."""
    mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    return mesh["dp_replicate", "dp_shard_cp"]


def fully_shard_arguments():
    """Keyword arguments of torch.distributed.fsdp.fully_shard beside the mesh, or None where nothing is sharded."""
    import torch
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

    chosen = PLAN["fully_shard"]
    if chosen is None:
        return None
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, chosen["param_dtype"]), reduce_dtype=getattr(torch, chosen["reduce_dtype"])
    )
    return {
        "reshard_after_forward": chosen["reshard_after_forward"],
        "mp_policy": policy,
        "offload_policy": CPUOffloadPolicy() if chosen["offload"] else OffloadPolicy(),
    }
