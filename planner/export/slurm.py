"""A launch under SLURM: one task per node, which starts the launcher's own processes.

Options are those of ``sbatch`` and ``srun`` (SLURM 21.08 and later).
"""

from __future__ import annotations

from collections.abc import Mapping

from planner.export.target import Target, summary

__all__ = ["slurm_files"]


def slurm_files(target: Target, image: str) -> Mapping[str, str]:
    """``job.sbatch``, which starts ``run.sh`` on every node; ``image`` is not used."""
    nodes, per_node = target.nodes()
    lines = [
        "#!/usr/bin/env bash",
        f"#SBATCH --job-name=plan-{target.plan.id}",
        f"#SBATCH --nodes={nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={per_node}",
        "#SBATCH --exclusive",
        "#SBATCH --output=train-%j.log",
        *(f"# {line}" for line in summary(target.plan)),
        "# Submit it from this folder: sbatch job.sbatch. Partition, account and time limit are your cluster's.",
        "set -euo pipefail",
        "",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export MASTER_ADDR",
        "# One task per node starts all of its processes: none of them is to be bound to the task's first core.",
        'srun --kill-on-bad-exit=1 --cpu-bind=none bash run.sh "$@"',
    ]
    return {"job.sbatch": "\n".join(lines) + "\n"}
