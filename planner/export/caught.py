"""At which layer a launcher itself would have caught a broken rule: what a rule's reason begins with → the layer, in words.

From reading the launchers named in their modules, and from what their validators said to configurations that break the rule.
A rule that no table knows is one that the launcher does not check as such.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["CAUGHT", "caught_by"]

_PARSER = "its parser, before anything starts"
_START = "the start of the run, on every rank"
_FIRST_STEP = "the first step"
_NOBODY = "nobody: it would run, slower or otherwise than meant"

_ACCELERATE: Mapping[str, str] = {
    "a global batch of": "nobody: the last batches of the script are smaller",
    "devices do not divide": "ParallelismConfig",
    "tensor and context parallelism beside replicas": "ParallelismConfig",
    "sequence length not divisible by 2·cp": "PyTorch's context parallelism, at the first step",
    "KV heads not divisible by tp": f"Transformers, while it cuts the weights, at {_START}",
    "context parallelism runs full causal attention only": "Accelerate, when the model is prepared",
    "sharded states need more than one replica": "PyTorch's device mesh, when the model is prepared",
}

CAUGHT: Mapping[str, Mapping[str, str]] = {
    "megatron": {
        "a global batch of": "validate_args",
        "devices do not divide": "validate_args",
        "sequence length not divisible by 2·cp": "Transformer Engine, at the first step",
        "KV heads per rank not divisible by cp": "Transformer Engine, at the first step",
        "attention heads not divisible by tp": "TransformerConfig, while the model is built",
        "feed-forward width not divisible by tp": "the tensor-parallel layers, while the model is built",
        "fewer micro-batches than pp (interleaved)": f"schedules.py, at {_FIRST_STEP}; the arguments are accepted",
        "experts not divisible by ep": "validate_args",
        "etp·ep does not divide": f"initialize_model_parallel, at {_START}",
        "windowed attention does not travel a ring": "Transformer Engine, at the first step",
        "norms fused with the product": "TransformerConfig, while the model is built",
        "Megatron-FSDP is documented": f"Megatron-FSDP's wrapper, at {_START}",
        "optimizer offload": "validate_args",
        "as many copies of expert states": f"initialize_model_parallel, at {_START}",
        "more pipeline stages than layers": "validate_args",
        "layers to recompute are counted": _NOBODY,
        "tensor-parallel overlap needs": "validate_args",
        "--tp-comm-overlap has no buffers": "nobody: Transformer Engine's layers warn, and turn the overlap off",
    },
    "deepspeed": {
        "a global batch of": "DeepSpeedConfig, which holds train_batch_size against the ranks",
        "pipelines are written": "nobody: the section pipeline is read, and does nothing without PipelineModule",
        "tensor parallelism (AutoTP) and Ulysses": f"the engine, at {_START}",
        "parameter offload needs ZeRO-3": "DeepSpeedConfig (zero_optimization is validated)",
        "without ZeRO, gradients are accumulated": f"the engine, at {_START} (NotImplementedError)",
        "expert": f"AutoEP, at {_START}",
        "KV heads not divisible by tp": "nobody: ranks beyond the KV heads hold no attention shard, which is logged",
        "no Transformers class": _NOBODY,
    },
    "accelerate": _ACCELERATE,
    "transformers": _ACCELERATE,  # whose Trainer hands the mesh on to Accelerate
    "torchtitan": {
        "a global batch of": f"the trainer, at {_START}",
        "devices do not divide": f"ParallelDims, at {_START}",
        "sequence length not divisible by tp": f"the trainer, at {_START}",
        "tied embeddings": "update_from_config, while the model is built",
        "overlapped tensor parallelism needs": f"{_PARSER} (CompileConfig)",
        "fewer micro-batches than stages": "PyTorch's pipeline schedule, while it is built",
        "micro-batches do not divide into rounds": "PyTorch's pipeline schedule, while it is built",
        "a compiled backward is not cut in two": "PyTorch's pipeline schedule, while it is built",
        "FlexAttention is always compiled": f"PyTorch's autograd, at {_FIRST_STEP}",
        "what is recomputed is recomputed again": _NOBODY,
        "KV heads not divisible by tp": "the attention's sharding, while the model is built",
    },
    "galvatron": {
        "a global batch of": f"get_hybrid_parallel_configs_api, at {_START}",
        "one of tensor parallelism and Ulysses": _NOBODY,
        "fewer micro-batches (chunks) than stages": _NOBODY,
        "pipeline degrees": _PARSER,
    },
}
"""Launcher → beginning of a reason → the layer."""


def caught_by(launcher: str, reason: str) -> str:
    """The layer of the launcher that refuses a configuration which breaks a rule; empty where that is not known.

    >>> caught_by("megatron", "experts not divisible by ep")
    'validate_args'
    """
    table = CAUGHT.get(launcher, {})
    return next((layer for start, layer in table.items() if reason.startswith(start)), "")
