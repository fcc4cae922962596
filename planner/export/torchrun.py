"""A plan as a torchrun job for a training script of one's own: launch, SLURM batch, device mesh, and the plan.

The launch and the order of ranks serve any plan. ``mesh.py`` builds the plan's ``DeviceMesh`` (outermost dimension first, as
PyTorch counts) and names what FSDP2 is to be given; what else the plan asks for is in ``plan.json`` and up to the script.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from planner.errors import ExportError, Problem
from planner.export.launchers import distributed_optimizer_instances
from planner.export.target import Target, summary
from planner.plan import Plan
from planner.specs.cluster import Cluster
from planner.specs.model import Model

__all__ = ["export_torchrun", "mesh_dimensions"]


def export_torchrun(
    plan: Plan, model: Model | None = None, cluster: Cluster | None = None, script: str = "train.py"
) -> dict[str, str]:
    """Files that start a training script on the plan's nodes, in the plan's order of ranks.

    Args:
        plan: the plan.
        model: its model, where the plan's name does not lead to it.
        cluster: its cluster, likewise.
        script: the training script; it may import ``mesh.py``.

    Raises:
        ExportError: the nodes are not of one size, or the mesh cannot describe how states are sharded.
        SpecError: the model or the cluster cannot be found.
    """
    target = Target.of(plan, model, cluster)
    differing = [problem for problem in target.differing("--to torchrun") if "zero_" in problem.found]
    if differing:  # the mesh says over which ranks states are sharded, once for all layers
        raise ExportError(differing)
    nodes, per_node = target.nodes()
    return {
        "run.sh": _run(plan, nodes, per_node, script),
        "job.sbatch": _job(plan, nodes, per_node),
        "mesh.py": _mesh(target),
        "plan.json": json.dumps(plan.as_dict(), indent=2) + "\n",
    }


def mesh_dimensions(target: Target) -> dict[str, int]:
    """Dimensions of the device mesh, outermost first; their product is the world size.

    Ranks run fastest along tp, then cp, dp and pp, as the plan's mesh has it; hybrid sharding splits dp.

    Raises:
        ExportError: states are sharded over some ranks of a context-parallel group only.
    """
    mesh, copies = target.plan.mesh, 1
    if target.knobs["zero_stage"] == "0":
        copies = mesh["dp"]
    elif target.knobs["zero_group"] == "node":
        copies = int(distributed_optimizer_instances(target.context())[0].flat[0])
    if mesh["dp"] % copies:
        found = "cannot express hybrid sharding inside a context-parallel group"
        raise ExportError(Problem("--to torchrun", found, f"at most dp = {mesh['dp']} copies of the states"))
    return {
        "pp": mesh["pp"],
        "dp_replicate": copies,
        "dp_shard": mesh["dp"] // copies,
        "cp": mesh["cp"],
        "tp": mesh["tp"],
    }


def _fully_shard(knobs: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of ``fully_shard`` that the plan's states ask for; None where FSDP2 has nothing to shard."""
    stage, precision = knobs["zero_stage"], knobs["precision"]
    if stage not in ("2", "3", "fsdp"):
        return None
    wide = {"fp32": "float32", "tf32": "float32", "fp16": "float16"}.get(precision, "bfloat16")
    gradient = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[knobs["gradient_dtype"]]
    return {
        "reshard_after_forward": stage != "2",
        "param_dtype": wide,
        "reduce_dtype": gradient,
        "offload": knobs["parameter_offload"] == "cpu",
    }


def _run(plan: Plan, nodes: int, per_node: int, script: str) -> str:
    lines = [
        "#!/usr/bin/env bash",
        *(f"# {line}" for line in summary(plan)),
        "# Run it once per node; MASTER_ADDR is the first of them. Further arguments are passed on to the script.",
        "set -euo pipefail",
        "",
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}",
        "",
        f"exec torchrun --nnodes {nodes} --nproc-per-node {per_node} \\",
        "    --rdzv-backend c10d --rdzv-endpoint ${MASTER_ADDR:-localhost}:${MASTER_PORT:-29500} \\",
        f"    --rdzv-id ${{SLURM_JOB_ID:-{plan.id}}} \\",
        f'    "${{TRAIN_SCRIPT:-{script}}}" "$@"',
    ]
    return "\n".join(lines) + "\n"


def _job(plan: Plan, nodes: int, per_node: int) -> str:
    lines = [
        "#!/usr/bin/env bash",
        f"#SBATCH --job-name=plan-{plan.id}",
        f"#SBATCH --nodes={nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={per_node}",
        "#SBATCH --exclusive",
        *(f"# {line}" for line in summary(plan)),
        "set -euo pipefail",
        "",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export MASTER_ADDR",
        'srun bash run.sh "$@"',
    ]
    return "\n".join(lines) + "\n"


def _mesh(target: Target) -> str:
    plan, dimensions = target.plan, mesh_dimensions(target)
    settings = {
        "dimensions": dimensions,
        "expert_dimensions": {name: plan.mesh[name] for name in ("ep", "etp")},
        "micro_batch_size": plan.knobs["micro_batch_size"],
        "gradient_accumulation_steps": plan.micro_batches,
        "seq_len": target.workload.seq_len,
        "fully_shard": _fully_shard(target.knobs),
        "sequence_parallel": target.knobs["sequence_parallel"] == "true" and dimensions["tp"] > 1,
        "recompute": target.knobs["recompute"],
    }
    return _MESH.format(summary="\n".join(summary(plan)), plan=_literal(settings))


def _literal(value: Any, indent: str = "") -> str:
    """A Python literal, one entry per line, as formatters leave it."""
    if not isinstance(value, dict):
        return json.dumps(value) if isinstance(value, str) else repr(value)
    inner = indent + "    "
    entries = "".join(
        f"{inner}{json.dumps(key)}: {_literal(entry, inner)},\n" for key, entry in value.items()
    )
    return f"{{\n{entries}{indent}}}"


_MESH = '''"""The device mesh of a plan, and what FSDP2 is to be given.

{summary}
"""

PLAN = {plan}


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
    return {{
        "reshard_after_forward": chosen["reshard_after_forward"],
        "mp_policy": policy,
        "offload_policy": CPUOffloadPolicy() if chosen["offload"] else OffloadPolicy(),
    }}
'''
