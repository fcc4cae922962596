"""What a training script of one's own can run on PyTorch FSDP2 and a device mesh.

Source: PyTorch 2.13 (``torch.distributed.fsdp.fully_shard``, ``CPUOffloadPolicy``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from planner.export.rules import COMMON, make_launcher
from planner.export.sharding import replication_rule
from planner.technique import Check, Context

__all__ = ["CHOICES", "LAUNCHER"]

CHOICES: Mapping[str, str] = {
    **COMMON,
    "precision": "bf16 fp16 fp32 tf32 fp8 mxfp8",
    "elementwise_kernel": "fused eager",
    "loss_kernel": "fused eager log_softmax linear_fused",
    "gradient_accumulation": "fused separate",
    "context": "p2p gathered_ring",
    "optimizer": "adamw adam8bit sgd sgd_momentum adafactor muon",
    "zero_stage": "0 2 3 fsdp",
    "zero_group": "full node ranks",
    "checkpoint_end": "whole early_stop",
    "recompute": "none selective mlp full block",
    "optimizer_offload": "none cpu",
    "activation_offload": "none cpu",
    "parameter_offload": "none cpu",
    "schedule": "1f1b",
}


def _fsdp(ctx: Context) -> Iterable[Check]:
    """What ``fully_shard`` and a device mesh give without a pipeline runtime or expert dispatch of one's own."""
    mesh, knobs = ctx.mesh, ctx.knobs
    yield Check("no pipelines", mesh.pp == 1)
    yield Check("no expert parallelism", (mesh.ep == 1) & (mesh.etp == 1))
    yield replication_rule(ctx)
    if "optimizer_offload" in knobs and "parameter_offload" in knobs:
        # CPUOffloadPolicy moves parameters, gradients and states together.
        same = knobs["optimizer_offload"] == knobs["parameter_offload"]
        yield Check("parameters and optimizer states are offloaded together", same)
        sharded = knobs.get("zero_stage") in ("2", "3", "fsdp")
        yield Check("offload needs sharded states", sharded or knobs["optimizer_offload"] == "none")


LAUNCHER = make_launcher("fsdp", CHOICES, _fsdp, native={"context": "gathered_ring"})
