"""Engines under a batch system: SLURM starts ``run.sh`` on every node, Kubernetes a LeaderWorkerSet per pool.

Fields are those of ``leaderworkerset.x-k8s.io/v1``; its controller tells every pod its rank and its leader (``LWS_WORKER_INDEX``,
``LWS_LEADER_ADDRESS``), and gives the leader of replica ``i`` the name ``SET-i.SET``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from planner.errors import ExportError, Problem
from planner.export.serving.bare import ROUTER_PORT, routed
from planner.export.serving.engine import NO_CHECKPOINT, Engine, checkpoint_of
from planner.export.serving.exporter import resource_of
from planner.export.serving.target import FIRST_PORT, ServingTarget, summary
from planner.export.yaml_text import yaml_text
from planner.serving.plan import Pool

__all__ = ["AROUND", "DEVICE_LABEL"]

DEVICE_LABEL = "accelerator"
"""Label of a node whose value is its devices' name; asked for where nodes are of several kinds."""


def _slurm(target: ServingTarget, engine: Engine, image: str) -> Mapping[str, str]:
    """``job.sbatch``.

    Raises:
        ExportError: nodes of several kinds; a job's ``--nodes`` are of one.
    """
    if len(target.machines) > 1:
        found = f"nodes of {' and '.join(target.machines)}"
        raise ExportError(
            Problem(
                "--with slurm", found, "nodes of one kind; without it, run.sh starts on every node by itself"
            )
        )
    per_node = target.per_node(target.cluster(target.plan.pools[0]))
    lines = [
        "#!/usr/bin/env bash",
        f"#SBATCH --job-name=plan-{target.plan.id}",
        f"#SBATCH --nodes={target.nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={per_node}",
        "#SBATCH --exclusive",
        "#SBATCH --output=serve-%j.log",
        *(f"# {line}" for line in summary(target.plan)),
        "# Submit it from this folder: sbatch job.sbatch. Partition, account and time limit are your cluster's.",
        "set -euo pipefail",
        "",
        'HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd " ")',
        "export HOSTS",
    ]
    if routed(target):
        lines.append(
            f'echo "requests go to http://$(hostname):{ROUTER_PORT} once every replica answers /health"'
        )
        lines += ["bash router.sh > router.log 2>&1 &"]
    lines.append(
        "# One task per node starts all of its engines: none of them is to be bound to the task's first core."
    )
    lines.append('srun --kill-on-bad-exit=1 --cpu-bind=none bash run.sh "$@"')
    return {"job.sbatch": "\n".join(lines) + "\n"}


def _kubernetes(target: ServingTarget, engine: Engine, image: str) -> Mapping[str, str]:
    """``leaderworkerset.yaml``; the folder's files reach the pods as a ConfigMap.

    Raises:
        ExportError: no device plugin is known for the devices.
    """
    resource = resource_of(target, "--with kubernetes")
    if isinstance(resource, Problem):
        raise ExportError(resource)
    name = f"plan-{target.plan.id}"
    documents = []
    for pool in target.plan.pools:
        documents += [_set(target, engine, pool, image, resource)]
    documents += [_service(target, name)] if not routed(target) else _routers(target, name, image)
    head = [f"# {line}" for line in summary(target.plan)]
    head.append(f"# kubectl create configmap {name} --from-file=. && kubectl apply -f leaderworkerset.yaml")
    return {
        "leaderworkerset.yaml": "\n".join(head)
        + "\n"
        + "---\n".join(yaml_text(document) for document in documents)
    }


def _set(target: ServingTarget, engine: Engine, pool: Pool, image: str, resource: str) -> dict[str, Any]:
    span, name = target.span(pool), f"plan-{target.plan.id}"
    own = f"{name}{target.suffix(pool)}"
    container: dict[str, Any] = {
        "name": "engine",
        "image": image,
        "workingDir": "/plan",
        "command": ["bash", f"serve{target.suffix(pool)}.sh"],
        "env": [
            {
                "name": "HF_TOKEN",
                "valueFrom": {"secretKeyRef": {"name": "hf-token", "key": "HF_TOKEN", "optional": True}},
            },
            *([] if checkpoint_of(engine, target) else [{"name": "MODEL", "value": NO_CHECKPOINT}]),
        ],
        "resources": {"limits": {resource: str(target.size(pool) // span)}},
        "volumeMounts": [
            {"name": "plan", "mountPath": "/plan"},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    ready = {"httpGet": {"path": "/health", "port": FIRST_PORT}, "periodSeconds": 10, "failureThreshold": 360}
    leader = {**container, "ports": [{"containerPort": FIRST_PORT}], "readinessProbe": ready}
    volumes = [
        {"name": "plan", "configMap": {"name": name}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
    ]
    labels = {"app": own, "role": "leader"}
    spec: dict[str, Any] = {"volumes": volumes}
    if len(target.clusters) > 1:
        spec["nodeSelector"] = {DEVICE_LABEL: target.cluster(pool).device.name}
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": own},
        "spec": {
            "replicas": pool.replicas,
            "leaderWorkerTemplate": {
                "size": span,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": {
                    "metadata": {"labels": labels},
                    "spec": {"containers": [leader], **spec},
                },
                "workerTemplate": {"spec": {"containers": [container], **spec}},
            },
        },
    }


def _service(target: ServingTarget, name: str) -> dict[str, Any]:
    """The address of the only replica."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"{name}-front"},
        "spec": {
            "selector": {"app": f"{name}{target.suffix(target.plan.pools[0])}", "role": "leader"},
            "ports": [{"port": ROUTER_PORT, "targetPort": FIRST_PORT}],
        },
    }


def _routers(target: ServingTarget, name: str, image: str) -> list[dict[str, Any]]:
    """The router as a deployment of one pod, and its address."""
    addresses: dict[str, list[str]] = {"PREFILL": [], "DECODE": []}
    for pool in target.plan.pools:
        own = f"{name}{target.suffix(pool)}"
        addresses["PREFILL" if pool.role == "prefill" else "DECODE"] += [
            f"http://{own}-{replica}.{own}:{FIRST_PORT}" for replica in range(pool.replicas)
        ]
    container = {
        "name": "router",
        "image": image,
        "workingDir": "/plan",
        # The configuration that it writes needs a folder of its own: a ConfigMap cannot be written.
        "command": ["bash", "-c", "cp router.sh /tmp && exec bash /tmp/router.sh"],
        "env": [{"name": key, "value": " ".join(urls)} for key, urls in addresses.items() if urls],
        "ports": [{"containerPort": ROUTER_PORT}],
        "volumeMounts": [{"name": "plan", "mountPath": "/plan"}],
    }
    labels = {"app": f"{name}-front"}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": f"{name}-front"},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "containers": [container],
                    "volumes": [{"name": "plan", "configMap": {"name": name}}],
                },
            },
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"{name}-front"},
        "spec": {"selector": labels, "ports": [{"port": ROUTER_PORT, "targetPort": ROUTER_PORT}]},
    }
    return [deployment, service]


AROUND: Mapping[str, Callable[[ServingTarget, Engine, str], Mapping[str, str]]] = {
    "kubernetes": _kubernetes,
    "slurm": _slurm,
}
"""Batch systems by the name that ``--with`` takes."""
