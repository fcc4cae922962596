"""A runnable folder: a launcher's files, a batch system's around them, and what an operator needs beside them.

Beside the configuration and the launch script stand the plan itself, a script that prints what was measured beside what was
predicted (and writes it as a row that ``planner validate`` and ``planner calibrate`` read), and what to check first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files

from planner.export.exporter import Exporter
from planner.export.kubernetes import kubernetes_files
from planner.export.run_row import run_row
from planner.export.slurm import slurm_files
from planner.export.target import Target, summary
from planner.specs.cluster import Cluster
from planner.units import counted, format_bytes, format_chance

__all__ = ["ADAPTERS_IN_PODS", "AROUND", "NO_IMAGE", "folder_files", "network_check", "page"]

AROUND: Mapping[str, Callable[[Target, str], Mapping[str, str]]] = {
    "kubernetes": kubernetes_files,
    "slurm": slurm_files,
}
"""Batch systems by the name that ``--with`` takes."""

NO_IMAGE = "name-your-image"
"""What a manifest says where no container image was given; Kubernetes refuses to pull it."""

ADAPTERS_IN_PODS = (
    "Network in pods: ask for your cluster's RDMA resource beside the devices, or set `hostNetwork: true`; without either, "
    "collectives fall back to TCP (`NCCL_DEBUG=INFO` has to say `NET/IB`)."
)
"""What no manifest can know: the name of a cluster's network resource."""
_RISKY = 0.1  # of running out of memory, from where on the page says what to do about it


def folder_files(
    target: Target, exporter: Exporter, written: Mapping[str, str], around: tuple[str, ...], image: str
) -> dict[str, str]:
    """The files of the folder, by name.

    Args:
        target: the plan.
        exporter: the launcher's exporter.
        written: what it wrote.
        around: batch systems; keys of :data:`AROUND`.
        image: container image for those that need one.

    Raises:
        ExportError: a batch system cannot start the plan.
    """
    found = dict(written)
    for name in around:
        found |= AROUND[name](target, image)
    found["measure.py"] = _measure(target, exporter)
    found["README.md"] = _read_me(target, exporter, found, image)
    return dict(sorted(found.items()))


def _measure(target: Target, exporter: Exporter) -> str:
    """The measuring script with the plan's row and prediction filled in."""
    estimate = target.plan.estimate
    log = exporter.log
    settings = {
        "row": run_row(target, exporter.framework, exporter.versions[0]),
        "step_time_s": estimate.step_time_s,
        "step_interval_s": list((estimate.interval or {}).get("step_time_s", ())),
        "peak_bytes": estimate.memory_bytes["peak"],
        "tokens_per_device": target.workload.tokens_per_step / target.plan.devices,
        "log": {
            "step": log.step, "step_unit_s": log.step_unit_s, "tokens": log.tokens, "peak": log.peak,
            "peak_unit_bytes": log.peak_unit_bytes, "peak_kind": log.peak_kind,
        },
    }  # fmt: skip
    template = files("planner.export").joinpath("measure_template.py").read_text(encoding="utf-8")
    text = json.dumps(settings, indent=4).replace("\\", "\\\\")
    return template.replace(_BLANK, "json.loads(\n    '''" + text + "'''\n)")


def _read_me(target: Target, exporter: Exporter, found: Mapping[str, str], image: str) -> str:
    what = {name: _PURPOSE.get(name, "configuration") for name in sorted({*found, "README.md"})}
    rows = [f"| `{name}` | {purpose} |" for name, purpose in what.items()]
    starts = ["`bash run.sh 2>&1 | tee train.log` on every node, with `NODE_RANK` and `MASTER_ADDR` set"]
    starts += ["`sbatch job.sbatch`"] if "job.sbatch" in found else []
    if "jobset.yaml" in found:
        starts.append("`kubectl create configmap plan-ID --from-file=. && kubectl apply -f jobset.yaml`")
    versions = " or ".join(exporter.versions)
    version = (
        f"Version: written for {exporter.title} {versions}; options change their names between versions."
    )
    first = [*_first(target), version, *exporter.first(target), *_around_first(target, found)]
    if image == NO_IMAGE and "jobset.yaml" in found:
        first.append(
            f"`jobset.yaml` says `image: {NO_IMAGE}`: put in your container image (or export with `--image`)."
        )
    differs = exporter.differs(target)
    closing = [
        f"Then {_measured_by(found)}: predicted beside measured, and `measured.csv` for",
        "`planner validate measured.csv` and `planner calibrate stack measured.csv`.",
    ]
    if target.layers_differ:
        closing = [
            f"Then {_measured_by(found)}: predicted beside measured. The layers differ, which no row for",
            "`planner validate` can say: `planner explain plan.json --measured` takes the step time.",
        ]
    return page(
        f"{target.plan.model} on {target.cluster.name}, with {exporter.title} {exporter.versions[0]}",
        summary(target.plan), rows, first,
        [text.replace("plan-ID", f"plan-{target.plan.id}") for text in starts], closing, differs,
    )  # fmt: skip


def page(
    title: str,
    told: Sequence[str],
    rows: Sequence[str],
    first: Sequence[str],
    starts: Sequence[str],
    closing: Sequence[str],
    differs: Sequence[str],
) -> str:
    """The page of a folder, in Markdown.

    Args:
        title: of the page.
        told: the plan in words, line by line.
        rows: of the table of files.
        first: what to check before it is started.
        starts: how it is started.
        closing: lines on what to do after that.
        differs: where the run differs from the plan; the section is left out where it does not.
    """
    lines = [
        f"# {title}", "", *told, "", "| file | is |", "|---|---|", *rows, "", "## Check first", "",
        *(f"{number}. {text}" for number, text in enumerate(first, 1)), "", "## Start", "",
        *(f"- {text}" for text in starts), "", *closing,
    ]  # fmt: skip
    if differs:
        lines += ["", "## Where the run differs from the plan", "", *(f"- {text}" for text in differs)]
    return "\n".join(lines) + "\n"


def _measured_by(found: Mapping[str, str]) -> str:
    """What to call when the run has left a log."""
    return "`python measure.py train.log`" + (
        " (`train-JOBID.log` under SLURM)" if "job.sbatch" in found else ""
    )


def _around_first(target: Target, found: Mapping[str, str]) -> list[str]:
    """What to check before a batch system starts it."""
    checks = []
    nodes, _ = target.nodes()
    if nodes > 1:
        checks.append("Files: every node sees this folder under the same path (or a copy of it).")
    if "jobset.yaml" in found and nodes > 1:
        checks.append(ADAPTERS_IN_PODS)
    return checks


_BLANK = 'json.loads("{}")'
_PURPOSE = {
    "README.md": "this page",
    "run.sh": "launch; run it once per node",
    "job.sbatch": "the launch under SLURM",
    "jobset.yaml": "the launch under Kubernetes (JobSet)",
    "measure.py": "predicted beside measured, from the log of a run",
    "plan.json": "the whole plan, as the planner reads it",
    "train.py": "a measuring run on random tokens; put your own training in its place",
    "config.json": "the model's shape, as Transformers reads it",
}


def network_check(cluster: Cluster) -> str:
    """How fast the network has to be for the prediction to hold."""
    tiers = "; ".join(
        f"{tier.name} {tier.effective_bytes_per_s / 1e9:.0f} GB/s over {counted(tier.size, 'device')}"
        for tier in cluster.tiers
    )
    return (
        f"Network, reached per device and direction: {tiers}. `all_reduce_perf -b 1G -e 1G` of nccl-tests should show a bus"
        " bandwidth near these; if not, `planner calibrate fabric` and plan again."
    )


def _first(target: Target) -> list[str]:
    """What to check before any run."""
    plan, cluster = target.plan, target.cluster
    nodes, per_node = target.nodes()
    device, estimate = cluster.device, plan.estimate
    found = [
        f"Machines: {nodes} node{'s' * (nodes > 1)} of {per_node} × {device.name} with "
        f"{format_bytes(float(device.memory_bytes))} each (`nvidia-smi --query-gpu=name,memory.total --format=csv`).",
    ]
    if len(cluster.tiers) > 1 or plan.devices > 1:
        found.append(network_check(cluster))
    peak, budget = format_bytes(estimate.memory_bytes["peak"]), format_bytes(estimate.memory_budget_bytes)
    risk = (
        ""
        if estimate.oom_probability is None
        else f", {format_chance(estimate.oom_probability)} risk of running out of memory"
    )
    if (estimate.oom_probability or 0.0) > _RISKY:
        risk += "; `planner train` keeps to less where any plan does (`--max-oom-risk`)"
    fits = "" if estimate.fits else " IT DOES NOT FIT."
    found.append(f"Memory: a peak of {peak} of {budget} per device is predicted{risk}.{fits}")
    for tier, held, seen in (
        ("Host memory", estimate.host_bytes, "free -g"),
        ("NVMe", estimate.nvme_bytes, "df -h"),
    ):
        if held:
            whole = f"{format_bytes(held * per_node)} on every node"
            found.append(
                f"{tier}: {whole} for what the plan offloads, beyond what the launcher needs itself (`{seen}`)."
            )
    return found
