"""llm-d: values for the chart ``llm-d-modelservice``, which starts vLLM's pools and the sidecar between them.

Keys are those of the chart's ``values.yaml`` (0.4.12). A replica over several nodes is a LeaderWorkerSet (``multinode``), whose
pods learn their rank from ``LWS_WORKER_INDEX``; the chart has one template for all of them, so that the command asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from planner.errors import Problem
from planner.export.serving.bare import ENGINES
from planner.export.serving.dynamo import flag_words
from planner.export.serving.engine import NO_CHECKPOINT, Engine, checkpoint_of
from planner.export.serving.exporter import ServingExporter, in_pods, resource_of
from planner.export.serving.target import ServingTarget, summary
from planner.export.yaml_text import yaml_text
from planner.serving.plan import Pool

__all__ = ["EXPORTER"]

_TYPES = {"NVIDIA": "nvidia", "AMD": "amd", "Intel": "intel-gaudi"}
_SERVICE, _BEHIND_SIDECAR, _SIDE_CHANNEL = 8000, 8200, 5600
_GIVEN_BY_CHART = ("tensor-parallel-size", "data-parallel-size")


def _write(target: ServingTarget, engine: Engine, image: str, version: str) -> Mapping[str, str]:
    plan, name = target.plan, f"plan-{target.plan.id}"
    served = checkpoint_of(engine, target) or NO_CHECKPOINT
    split = plan.mode == "disaggregated"
    values: dict[str, Any] = {
        "fullnameOverride": name,
        "multinode": _multinode(target),
        "modelArtifacts": {
            "name": served,
            "uri": f"hf://{served}",
            "size": _volume(target),
            "authSecretName": "llm-d-hf-token",
            "labels": {"llm-d.ai/inference-serving": "true", "llm-d.ai/model": name},
        },
        "accelerator": {"type": _TYPES[target.clusters[0].device.vendor]},
        "routing": {
            "servicePort": _SERVICE,
            "proxy": {"enabled": split, "targetPort": _BEHIND_SIDECAR, "connector": "nixlv2"},
        },
    }
    pools = {pool.role: pool for pool in plan.pools}
    decode = pools.get("decode") or pools["aggregated"]
    values["decode"] = _pool(target, engine, decode, image, _BEHIND_SIDECAR if split else _SERVICE)
    values["prefill"] = (
        _pool(target, engine, pools["prefill"], image, _SERVICE) if split else {"create": False}
    )
    head = [f"# {line}" for line in summary(plan)]
    return {"values.yaml": "\n".join(head) + "\n" + yaml_text(values), "deploy.sh": _deploy(name, version)}


def _multinode(target: ServingTarget) -> bool:
    return any(target.span(pool) > 1 for pool in target.plan.pools)


def _volume(target: ServingTarget) -> str:
    """Room for the checkpoint: the weights of one whole replica and a tenth, in whole GiB."""
    pool = target.plan.pools[-1]
    weights = float(target.capacity(pool).weights_bytes[0]) * target.size(pool)
    return f"{int(weights * 1.1 / 2**30) + 1}Gi"


def _pool(target: ServingTarget, engine: Engine, pool: Pool, image: str, port: int) -> dict[str, Any]:
    mesh, span = pool.mesh, target.span(pool)
    devices = str(target.size(pool) // span)
    container: dict[str, Any] = {"name": "vllm", "image": image, "mountModelVolume": True}
    container |= _command(target, engine, pool, port)
    container["ports"] = [{"containerPort": port, "protocol": "TCP"}]
    if pool.role != "aggregated":
        container["ports"].append({"containerPort": _SIDE_CHANNEL, "protocol": "TCP"})
        container["env"] = [
            {"name": "VLLM_NIXL_SIDE_CHANNEL_HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "VLLM_NIXL_SIDE_CHANNEL_PORT", "value": str(_SIDE_CHANNEL)},
        ]
    resource = str(resource_of(target, ""))
    container["resources"] = {"limits": {resource: devices}, "requests": {resource: devices}}
    container["volumeMounts"] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    return {
        "create": True,
        "replicas": pool.replicas,
        "parallelism": {
            "tensor": mesh["tp"], "data": mesh["dp"], "dataLocal": max(mesh["dp"] // span, 1), "workers": span,
        },
        "containers": [container],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }  # fmt: skip


def _command(target: ServingTarget, engine: Engine, pool: Pool, port: int) -> dict[str, Any]:
    settings = engine.settings(target, pool)
    if not _multinode(target):
        own = {key: value for key, value in settings.items() if key not in _GIVEN_BY_CHART}
        return {"modelCommand": "vllmServe", "args": flag_words(own)}
    words = [
        "vllm serve",
        checkpoint_of(engine, target) or NO_CHECKPOINT,
        f"--port {port}",
        *_quoted(flag_words(settings)),
    ]
    if target.span(pool) > 1:
        words.append(
            f"--nnodes {target.span(pool)} --node-rank $LWS_WORKER_INDEX --master-addr $LWS_LEADER_ADDRESS"
        )
        if pool.mesh["dp"] > 1:
            words.append("--data-parallel-address $LWS_LEADER_ADDRESS")
        words.append("$([ $LWS_WORKER_INDEX = 0 ] || echo --headless)")
    return {"modelCommand": "custom", "command": ["bash", "-c"], "args": [" ".join(words)]}


def _quoted(words: list[str]) -> list[str]:
    from shlex import quote

    return [quote(word) for word in words]


def _deploy(name: str, version: str) -> str:
    return f"""#!/usr/bin/env bash
# NAMESPACE: where llm-d's gateway and inference pool are. The chart's own defaults hold where values.yaml is silent.
set -euo pipefail
cd "$(dirname "$0")"
NAMESPACE=${{NAMESPACE:-llm-d}}
helm repo add llm-d-modelservice https://llm-d-incubation.github.io/llm-d-modelservice/
helm upgrade --install {name} llm-d-modelservice/llm-d-modelservice --version v{version} -n "$NAMESPACE" -f values.yaml
"""


def _first(target: ServingTarget) -> list[str]:
    found = [
        "`kubectl get secret llm-d-hf-token`: the hub's token, as `HF_TOKEN`.",
        "The gateway and an InferencePool that selects the label `llm-d.ai/model: plan-"
        + target.plan.id
        + "` are there (llm-d's own charts).",
    ]
    if _multinode(target):
        found.append(
            "`kubectl get crd leaderworkersets.leaderworkerset.x-k8s.io`: replicas over several nodes are LeaderWorkerSets."
        )
    return found


def _rules(target: ServingTarget) -> Iterator[Problem]:
    yield from in_pods(target, "--to llm-d")
    if any(pool.mesh.get("cp", 1) > 1 for pool in target.plan.pools):
        found = "ranks that share prompts (cp)"
        yield Problem("--to llm-d", found, "cp of 1: the chart counts tensor and data ranks")


EXPORTER = ServingExporter(
    name="llm-d",
    title="llm-d-modelservice",
    versions=("0.4.12",),
    checked="the chart's own values schema; the engine's flags by vLLM's parser",
    engine=lambda target: ENGINES["vllm"],
    write=_write,
    start=lambda target: ["`bash deploy.sh`, then measure the gateway's address"],
    rules=_rules,
    first=_first,
)
