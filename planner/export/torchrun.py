"""A plan as a torchrun job for a training script of one's own: launch, device mesh, and the plan.

The launch and the order of ranks serve any plan. ``mesh.py`` builds the plan's ``DeviceMesh`` (outermost dimension first, as
PyTorch counts) and names what FSDP2 is to be given; what else the plan asks for is in ``plan.json`` and up to the script.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from planner.errors import ExportError, Problem
from planner.export.exporter import STEP_LINES, Exporter
from planner.export.sharding import mesh_dimensions, replication_rule
from planner.export.target import Target, summary
from planner.plans.plan import Plan
from planner.technique import off

__all__ = ["EXPORTER"]


def _write(target: Target, script: str) -> dict[str, str]:
    """Files that start a training script on the plan's nodes, in the plan's order of ranks; it may import ``mesh.py``.

    Raises:
        ExportError: states are sharded over some ranks of a context-parallel group only; layers or stages differ in what
            ``mesh.py`` says once for all of them.
    """
    where = "--to torchrun"
    differing = [*target.differing(where), *target.placed(where)]
    if differing:  # one mesh, one way to shard and one way to recompute
        raise ExportError(differing)
    nodes, per_node = target.nodes()
    if not replication_rule(target.context()).ok:
        found = "cannot express hybrid sharding inside a context-parallel group"
        raise ExportError(
            Problem("--to torchrun", found, f"at most dp = {target.plan.mesh['dp']} copies of the states")
        )
    return {"run.sh": _run(target.plan, nodes, per_node, script), "mesh.py": _mesh(target)}


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
    first = "-localhost" if nodes == 1 else "?set MASTER_ADDR to the first node"
    lines = [
        "#!/usr/bin/env bash",
        *(f"# {line}" for line in summary(plan)),
        "# Run it once per node; MASTER_ADDR is the first of them. Further arguments are passed on to the script.",
        "set -euo pipefail",
        "",
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}",
        "",
        f"exec torchrun --nnodes {nodes} --nproc-per-node {per_node} \\",
        f"    --rdzv-backend c10d --rdzv-endpoint ${{MASTER_ADDR:{first}}}:${{MASTER_PORT:-29500}} \\",
        f"    --rdzv-id ${{SLURM_JOB_ID:-{plan.id}}} \\",
        f'    "${{TRAIN_SCRIPT:-{script}}}" "$@"',
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


def _first(target: Target) -> list[str]:
    """What the script has to do: all choices of the plan but those in ``mesh.py``, and those that say nothing."""
    said = {"sequence_parallel", "recompute", "micro_batch_size", "tensor", "expert", "pipeline"}
    if target.plan.mesh["cp"] == 1:
        said.add("context")
    if _fully_shard(target.knobs) is not None:
        said |= {
            "zero_stage",
            "zero_group",
            "zero_group_ranks",
            "parameter_offload",
            "precision",
            "gradient_dtype",
        }
    own = [
        f"`{slot}={value}`"
        for slot, value in target.knobs.items()
        if slot not in said and value not in (off(slot), "even")
    ]
    return [
        "`TRAIN_SCRIPT` is yours: it builds `mesh.py`'s mesh, and prints `step N: SECONDS s, peak X GiB` for `measure.py`.",
        f"What `mesh.py` does not say is the script's too, and priced as such: {', '.join(own) or 'nothing else'}.",
    ]


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

EXPORTER = Exporter(
    name="torchrun",
    title="torchrun",
    versions=("2.13",),
    checked="the mesh built over a fake process group",
    launcher="",
    write=_write,
    script="train.py",
    framework="PyTorch FSDP2",
    log=STEP_LINES,
    first=_first,
)
