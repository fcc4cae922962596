"""A runnable folder of a serving plan: the launcher's files, a batch system's, a measuring script, and what to check first."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.resources import files

from planner.export.folder import ADAPTERS_IN_PODS, NO_IMAGE, network_check, page
from planner.export.serving.around import AROUND, DEVICE_LABEL
from planner.export.serving.bare import ROUTER_PORT, routed
from planner.export.serving.engine import NO_CHECKPOINT, Engine, quantized_checkpoint
from planner.export.serving.exporter import ServingExporter
from planner.export.serving.row import serving_row
from planner.export.serving.target import FIRST_PORT, ServingTarget, summary
from planner.specs.cluster import Cluster
from planner.units import format_bytes

__all__ = ["folder_files"]

_ROUNDS = (
    8  # answers per request in flight that the measuring script waits for: a quarter of them is left out
)
_FEWEST = 64  # requests, however light the load
_CLIENT_TOKENS_PER_S = (
    50_000.0  # that one measuring script reads with room to spare: a core reads 200,000 of them
)
_BLANK = 'json.loads("{}")'
_PURPOSE = {
    "README.md": "this page",
    "run.sh": "starts the replicas of a node; run it once per node",
    "placement.tsv": "which replica stands where: node, devices, port",
    "router.sh": "spreads requests over the replicas",
    "job.sbatch": "the launch under SLURM",
    "leaderworkerset.yaml": "the launch under Kubernetes (LeaderWorkerSet)",
    "dynamo.yaml": "the deployment, as Dynamo's operator reads it",
    "values.yaml": "values for the chart llm-d-modelservice",
    "deploy.sh": "hands it to the cluster",
    "measure.py": "predicted beside measured: drives the plan's load, writes measured.csv",
    "plan.json": "the whole plan, as the planner reads it",
}


def folder_files(
    target: ServingTarget,
    exporter: ServingExporter,
    engine: Engine,
    version: str,
    around: tuple[str, ...],
    image: str,
) -> dict[str, str]:
    """The files of the folder, by name.

    Raises:
        ExportError: a batch system cannot start the plan.
    """
    found = dict(exporter.write(target, engine, image, version))
    for name in around:
        found |= AROUND[name](target, engine, image)
    found["plan.json"] = json.dumps(target.plan.as_dict(), indent=2) + "\n"
    engine_version = version if exporter.name == engine.name else engine.versions[0]
    found["measure.py"] = _measure(target, engine, engine_version)
    found["README.md"] = _read_me(target, exporter, engine, version, found, image)
    return dict(sorted(found.items()))


def _measure(target: ServingTarget, engine: Engine, version: str) -> str:
    """The measuring script with the plan's row, load and prediction filled in."""
    plan, estimate = target.plan, target.plan.estimate
    in_flight = sum(pool.replicas * pool.in_flight for pool in plan.pools if pool.role != "prefill")
    settings = {
        "model": target.checkpoint or plan.model,
        "vocab": target.model.vocab,
        "isl": int(plan.traffic["isl"]),
        "osl": int(plan.traffic["osl"]),
        "requests": max(_ROUNDS * in_flight, _FEWEST),
        "concurrency": int(plan.traffic.get("concurrency") or 0),
        "rate_per_s": estimate.goodput_requests_per_s,
        "devices": plan.devices,
        "replicas": plan.pools[0].replicas if plan.mode == "aggregated" else 1,
        "predicted": {
            "ttft_s": estimate.ttft_s["mean"], "ttft_p99_s": estimate.ttft_s.get("p99", math.nan),
            "tpot_s": estimate.tpot_s["mean"], "e2e_s": estimate.e2e_s["mean"], "requests_per_s": estimate.goodput_requests_per_s,
        },
        "row": serving_row(target, engine, version),
    }  # fmt: skip
    template = files("planner.export.serving").joinpath("measure_template.py").read_text(encoding="utf-8")
    text = json.dumps(settings, indent=4).replace("\\", "\\\\")
    return template.replace(_BLANK, "json.loads(\n    '''" + text + "'''\n)")


def _read_me(
    target: ServingTarget,
    exporter: ServingExporter,
    engine: Engine,
    version: str,
    found: Mapping[str, str],
    image: str,
) -> str:
    plan = target.plan
    rows = [f"| `{name}` | {_purpose(name)} |" for name in sorted({*found, "README.md"})]
    first = [*_first(target, engine, found), *exporter.first(target), *_around_first(target, found)]
    if image == NO_IMAGE and any(NO_IMAGE in text for name, text in found.items() if name.endswith(".yaml")):
        first.append(
            f"The manifests say `image: {NO_IMAGE}`: export with `--image` and the container that holds the engine."
        )
    if any(NO_CHECKPOINT in text for name, text in found.items() if name.endswith(".yaml")):
        first.append(f"The manifests say `{NO_CHECKPOINT}`: put the checkpoint in its place.")
    start = [*exporter.start(target), *_around(target, found)]
    url = (
        f"http://localhost:{ROUTER_PORT}"
        if routed(target) or exporter.name != engine.name
        else f"http://localhost:{FIRST_PORT}"
    )
    with_engine = "" if exporter.name == engine.name else f", {engine.title} {engine.versions[0]}"
    differs = _differs(target, engine)
    closing = [
        f"Then `python measure.py {url}`: predicted beside measured at the plan's load, and `measured.csv` for",
        "`planner validate measured.csv`; those of several deployments fit a stack, `planner calibrate stack`.",
        *_clients(target),
    ]
    title = f"{plan.model} on {target.plan.cluster}, with {exporter.title} {version}{with_engine}"
    return page(title, summary(plan), rows, first, start, closing, differs)


def _clients(target: ServingTarget) -> list[str]:
    """How many measuring scripts the plan's load takes; nothing where one will do."""
    tokens_per_s = target.plan.estimate.output_tokens_per_s_per_device * target.plan.devices
    clients = math.ceil(tokens_per_s / _CLIENT_TOKENS_PER_S)
    if clients == 1:
        return []
    return [
        f"The load is more than one client reads: start {clients} at once, on as many machines, each with `--share {clients}`",
        "(`ulimit -n` above their requests in flight).",
    ]


def _purpose(name: str) -> str:
    if name in _PURPOSE:
        return _PURPOSE[name]
    if name.startswith("serve"):
        return "starts one replica" + (f" of the {name[6:-3]} pool" if "-" in name else "")
    return "configuration" + (f" of the {name.partition('-')[2][:-5]} pool" if "-" in name else "")


def _around_first(target: ServingTarget, found: Mapping[str, str]) -> list[str]:
    """What to check before a cluster's own software starts it."""
    checks = []
    if "run.sh" in found and target.nodes > 1:
        checks.append("Files: every node sees this folder under the same path (or a copy of it).")
    if any(name in found for name in ("leaderworkerset.yaml", "dynamo.yaml", "values.yaml")) and (
        target.nodes > 1 or target.plan.mode == "disaggregated"
    ):
        checks.append(ADAPTERS_IN_PODS)
    if "leaderworkerset.yaml" in found and len(target.clusters) > 1:
        labels = ", ".join(f"`{DEVICE_LABEL}={cluster.device.name}`" for cluster in target.clusters)
        checks.append(f"Labels: nodes say which devices they have, {labels} (`kubectl label node NAME …`).")
    if "leaderworkerset.yaml" in found:
        checks.append(
            "`kubectl get crd leaderworkersets.leaderworkerset.x-k8s.io`, and where the checkpoint is gated a secret `hf-token`"
            " with the hub's token as `HF_TOKEN`."
        )
    return checks


def _around(target: ServingTarget, found: Mapping[str, str]) -> list[str]:
    name, starts = f"plan-{target.plan.id}", []
    if "job.sbatch" in found:
        starts.append("`sbatch job.sbatch`" + ("; `router.log` is the router's" if routed(target) else ""))
    if "leaderworkerset.yaml" in found:
        starts.append(
            f"`kubectl create configmap {name} --from-file=. && kubectl apply -f leaderworkerset.yaml`"
        )
        starts.append(f"`kubectl port-forward service/{name}-front {ROUTER_PORT}`, and measure there")
    return starts


def _first(target: ServingTarget, engine: Engine, written: Mapping[str, str]) -> list[str]:
    """What to check before any start."""
    plan, estimate = target.plan, target.plan.estimate
    found = [
        *(_machines(target, cluster) for cluster in target.clusters),
        f"Versions: `pip show {_PACKAGES[engine.name]}` says {engine.versions[0]}; flags change between minor versions.",
    ]
    needed, by_script = quantized_checkpoint(engine, target), "run.sh" in written
    if needed:
        what = "`MODEL`" if by_script else "the manifest's model"
        found.append(
            f"Checkpoint: {what} has to be one in {needed}; {engine.title} takes the format from it."
        )
    elif target.checkpoint:
        other = ", or `MODEL=FOLDER`; its licence is accepted and its files are on every node."
        pods = ": its licence is accepted, and pods may fetch it."
        found.append(f"Checkpoint: `{target.checkpoint}`{other if by_script else pods}")
    else:
        found.append(f"Checkpoint: `MODEL=…`, weights of {plan.model}.")
    peak, budget = format_bytes(estimate.memory_bytes["peak"]), format_bytes(estimate.memory_budget_bytes)
    caches = format_bytes(estimate.memory_bytes["kv_cache"])
    found.append(
        f"Memory: {peak} of {budget} are planned on the fullest device, of it {caches} for caches: "
        f"the engine's first log lines should name as much, room for {estimate.max_concurrency:,} requests over all replicas."
    )
    if target.nodes > 1 or plan.mode == "disaggregated":
        found += [network_check(cluster) for cluster in target.clusters]
    found += engine.needs(target)
    if engine.router_package and "router.sh" in written:
        found.append(f"`pip show {engine.router_package}`: `router.sh` spreads requests with it.")
    return found


def _machines(target: ServingTarget, cluster: Cluster) -> str:
    """The nodes of one kind; which they are, where there are several kinds."""
    nodes, device = target.machines[cluster.name], cluster.device
    which = (
        "" if len(target.clusters) == 1 else f" (NODE_RANK {nodes[0]}{f' to {nodes[-1]}' * (len(nodes) > 1)})"
    )
    return (
        f"Machines: {len(nodes)} node{'s' * (len(nodes) > 1)} of {target.per_node(cluster)} × {device.name}{which} with "
        f"{format_bytes(float(device.memory_bytes))} each (`nvidia-smi --query-gpu=name,memory.total --format=csv`)."
    )


_PACKAGES = {"vllm": "vllm", "sglang": "sglang", "trtllm": "tensorrt-llm"}


def _differs(target: ServingTarget, engine: Engine) -> list[str]:
    found = list(engine.differs(target))
    if not target.plan.stack.startswith(engine.name):
        found.append(
            f"The plan was made for the stack {target.plan.stack}: `planner serve --engine {engine.name}` prices {engine.title}."
        )
    if target.unlike:
        shares = ", ".join(f"{target.pool_name(p)} {p.share:.0%}" for p in target.plan.pools if p.share)
        told = f" (of its role's requests {shares})" if shares else ""
        found.append(
            f"The plan gives every pool what it can carry{told}. Routers know no weights: `router.sh` sends a request where less "
            "is under way, so that slow replicas are not overrun; hold the engines' request counts against the shares."
        )
    if target.plan.traffic.get("prefix_hit"):
        hit = target.plan.traffic["prefix_hit"]
        found.append(
            f"The plan counts on {hit:.0%} of prompts in the cache; the measuring script's prompts share nothing."
        )
    if target.plan.traffic.get("length_scv"):
        found.append(
            "The plan counts on answers of different lengths; the measuring script asks for equal ones."
        )
    return found
