"""Dynamo: a ``DynamoGraphDeployment`` with a frontend and a component per pool.

Fields are those of ``nvidia.com/v1beta1`` as the manifests in Dynamo's examples have them (examples/backends/*/deploy/v1beta1),
flags of the workers those of the wheel ai-dynamo 1.6. The operator starts the nodes of a replica (``multinode``) and tells the
engine which one each is; the frontend routes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from planner.export.serving.bare import ENGINES
from planner.export.serving.engine import NO_CHECKPOINT, Engine, checkpoint_of
from planner.export.serving.exporter import ServingExporter, in_pods, resource_of
from planner.export.serving.target import ServingTarget, summary
from planner.export.yaml_text import yaml_text
from planner.serving.plan import Pool

__all__ = ["EXPORTER", "flag_words"]

_SECRET = "hf-token-secret"
_RUNTIMES = {"vllm": "vllm-runtime", "sglang": "sglang-runtime", "trtllm": "tensorrtllm-runtime"}
_BRINGS = {
    "vllm": "vLLM 0.31",
    "sglang": "SGLang 0.5.21",
    "trtllm": "TensorRT-LLM 1.3.0rc29",
}  # requirements of its wheel
_ROLES = {"aggregated": "worker", "prefill": "prefill", "decode": "decode"}


def engine_of(target: ServingTarget) -> Engine:
    """The engine that the plan was made for."""
    return next(
        (engine for name, engine in ENGINES.items() if target.plan.stack.startswith(name)), ENGINES["vllm"]
    )


def flag_words(settings: Mapping[str, Any]) -> list[str]:
    """A configuration as flags; a switch has no value, what is false is left out.

    >>> flag_words({"tp-size": 2, "enable-x": True, "kv": {"a": 1}})
    ['--tp-size', '2', '--enable-x', '--kv', '{"a": 1}']
    """
    words: list[str] = []
    for key, value in settings.items():
        if value is True:
            words.append(f"--{key}")
        elif value is not False:
            words += [f"--{key}", json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return words


def _write(target: ServingTarget, engine: Engine, image: str, version: str) -> Mapping[str, str]:
    name = f"plan-{target.plan.id}"
    manifest: dict[str, Any] = {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": name},
        "spec": {
            "backendFramework": engine.name,
            "components": [
                _frontend(image),
                *(_component(target, engine, pool, image, name) for pool in target.plan.pools),
            ],
        },
    }
    head = [f"# {line}" for line in summary(target.plan)]
    found = {"dynamo.yaml": "\n".join(head) + "\n" + yaml_text(manifest)}
    if engine.name == "trtllm":
        found |= {
            f"trtllm{target.suffix(pool)}.yaml": yaml_text(engine.settings(target, pool))
            for pool in target.plan.pools
        }
    found["deploy.sh"] = _deploy(name, [file for file in found if file.startswith("trtllm")])
    return found


def _frontend(image: str) -> dict[str, Any]:
    container = {
        "name": "main",
        "image": image,
        "command": ["python3", "-m", "dynamo.frontend"],
        "args": ["--http-port", "8000"],
    }
    return {
        "name": "Frontend",
        "type": "frontend",
        "replicas": 1,
        "podTemplate": {"spec": {"containers": [container]}},
    }


def _component(target: ServingTarget, engine: Engine, pool: Pool, image: str, name: str) -> dict[str, Any]:
    span = target.span(pool)
    container: dict[str, Any] = {
        "name": "main",
        "image": image,
        "command": ["python3", "-m", f"dynamo.{engine.name}"],
        "args": _arguments(target, engine, pool),
        "envFrom": [{"secretRef": {"name": _SECRET}}],
        "resources": {"limits": {str(resource_of(target, "")): str(target.size(pool) // span)}},
    }
    spec: dict[str, Any] = {"containers": [container]}
    if engine.name == "trtllm":
        container["volumeMounts"] = [{"name": "plan", "mountPath": "/plan", "readOnly": True}]
        spec["volumes"] = [{"name": "plan", "configMap": {"name": name}}]
    found: dict[str, Any] = {"name": pool.role, "type": _ROLES[pool.role], "replicas": pool.replicas}
    if span > 1:
        found["multinode"] = {"nodeCount": span}
    return {**found, "podTemplate": {"spec": spec}}


def _arguments(target: ServingTarget, engine: Engine, pool: Pool) -> list[str]:
    model = checkpoint_of(engine, target) or NO_CHECKPOINT
    if engine.name == "trtllm":
        words = [
            "--model",
            model,
            "--served-model-name",
            model,
            "--extra-engine-args",
            f"/plan/trtllm{target.suffix(pool)}.yaml",
        ]
        return words if pool.role == "aggregated" else [*words, "--disaggregation-mode", pool.role]
    settings = dict(engine.settings(target, pool))
    if engine.name == "sglang":
        own = {"disaggregation-bootstrap-port": 30001} if pool.role != "aggregated" else {}
        return [
            "--model-path",
            model,
            "--served-model-name",
            model,
            *flag_words({**settings, **own}),
            "--host",
            "0.0.0.0",
        ]
    role = [] if pool.role == "aggregated" else ["--disaggregation-mode", pool.role]
    return ["--model", model, *role, *flag_words(settings)]


def _deploy(name: str, configurations: list[str]) -> str:
    lines = [
        "#!/usr/bin/env bash",
        "# NAMESPACE: where Dynamo's operator watches.",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
    ]
    lines.append("NAMESPACE=${NAMESPACE:-default}")
    if configurations:
        sources = " ".join(f"--from-file={file}" for file in configurations)
        lines.append(
            f'kubectl -n "$NAMESPACE" create configmap {name} {sources} --dry-run=client -o yaml | kubectl apply -f -'
        )
    lines.append('kubectl -n "$NAMESPACE" apply -f dynamo.yaml')
    return "\n".join(lines) + "\n"


def _start(target: ServingTarget) -> list[str]:
    name = f"plan-{target.plan.id}"
    return [
        "`bash deploy.sh`, then `kubectl get dynamographdeployments` until it is ready",
        f"`kubectl port-forward service/{name}-frontend 9000:8000`, and measure `http://localhost:9000`",
    ]


def _first(target: ServingTarget) -> list[str]:
    runtime = _RUNTIMES[engine_of(target).name]
    return [
        f"Image: Dynamo's `{runtime}` of 1.6, which brings {_BRINGS[engine_of(target).name]}: the flags here are those of "
        f"{engine_of(target).title} {engine_of(target).versions[0]}, and `--help` in the container knows its own.",
        f"`kubectl get secret {_SECRET}`: the hub's token, as `HF_TOKEN`.",
    ]


EXPORTER = ServingExporter(
    name="dynamo",
    title="Dynamo",
    versions=("1.6",),
    checked="field names against its published manifests and wheel; the engine's flags by the engine's parser",
    engine=engine_of,
    write=_write,
    start=_start,
    rules=partial(in_pods, where="--to dynamo"),
    first=_first,
)
