"""An engine alone, on nodes that are reached by name: a configuration and a command per pool, and which node starts what.

``placement.tsv`` has a line per replica and node; ``run.sh`` starts those of its node, ``router.sh`` spreads requests over all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from planner.export.serving import sglang, trtllm, vllm
from planner.export.serving.engine import Engine, checkpoint_of, quantized_checkpoint
from planner.export.serving.exporter import ServingExporter
from planner.export.serving.target import FIRST_PORT, ServingTarget, summary
from planner.export.yaml_text import yaml_text
from planner.serving.plan import Pool

__all__ = ["ENGINES", "EXPORTERS", "ROUTER_PORT", "pool_files", "routed", "serve_script"]

ROUTER_PORT = 9000
_HEALTH_TIMEOUT_S = 10  # that a replica has to say that it is ready
_HEALTH_PAUSE_S = 5  # before it is asked again

ENGINES: Mapping[str, Engine] = {module.ENGINE.name: module.ENGINE for module in (sglang, trtllm, vllm)}


def routed(target: ServingTarget) -> bool:
    """Whether requests need a router: there are several replicas, or two pools."""
    return sum(pool.replicas for pool in target.plan.pools) > 1


def pool_files(target: ServingTarget, engine: Engine, version: str) -> dict[str, str]:
    """Configuration and start script of every pool."""
    found = {}
    for pool in target.plan.pools:
        name = target.suffix(pool)
        size = target.size(pool)
        what = f"{target.pool_name(pool)} pool of plan {target.plan.id}: {pool.replicas} x {size} devices"
        head = f"# {engine.title} {version}, {what}.\n"
        found[f"{engine.name}{name}.yaml"] = head + yaml_text(engine.settings(target, pool))
        found[f"serve{name}.sh"] = serve_script(target, engine, pool)
    return found


def serve_script(target: ServingTarget, engine: Engine, pool: Pool) -> str:
    """The script that starts one node's share of one replica."""
    span = target.span(pool)
    lines = [
        "#!/usr/bin/env bash",
        f"# One replica of the {target.pool_name(pool)} pool"
        + (f", or one of its {span} nodes" if span > 1 else "")
        + ".",
        "# MODEL: checkpoint, a hub id or a folder. PORT: where it answers."
        + (" RANK, LEADER: this node among the replica's." if span > 1 else ""),
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        *model_line(target, engine),
        f"PORT=${{PORT:-{FIRST_PORT}}}",
    ]
    if span > 1:
        lines.append("RANK=${RANK:-${LWS_WORKER_INDEX:-0}}")
        lines.append("LEADER=${LEADER:-${LWS_LEADER_ADDRESS:?the first node of the replica}}")
    lines += engine.environment(target, pool)
    command = engine.command(target, pool, f"{engine.name}{target.suffix(pool)}.yaml")
    lines += ["", " \\\n    ".join([f"exec {command[0]}", *command[1:], '"$@"'])]
    return "\n".join(lines) + "\n"


def model_line(target: ServingTarget, engine: Engine) -> list[str]:
    """The shell line that says which checkpoint is served."""
    known, needed = checkpoint_of(engine, target), quantized_checkpoint(engine, target)
    if known:
        return [f"MODEL=${{MODEL:-{known}}}"]
    return [f"MODEL=${{MODEL:?a checkpoint of this model{f' in {needed}' if needed else ''}}}"]


def _write(target: ServingTarget, engine: Engine, image: str, version: str) -> Mapping[str, str]:
    found = pool_files(target, engine, version)
    found["placement.tsv"] = _placement(target)
    found["run.sh"] = _run(target, engine, version)
    if routed(target):
        found["router.sh"] = _router(target, engine)
    return found


def _placement(target: ServingTarget) -> str:
    rows = [
        (
            seat.node,
            target.pool_name(target.plan.pools[seat.pool]),
            seat.replica,
            seat.rank,
            seat.port,
            ",".join(map(str, seat.devices)),
            seat.leader,
        )
        for seat in target.seats
    ]
    heading = ("#node", "pool", "replica", "rank", "port", "devices", "leader")
    return "".join("\t".join(map(str, row)) + "\n" for row in (heading, *rows))


def _hosts(nodes: int) -> list[str]:
    if nodes == 1:
        return ['read -ra HOSTS <<< "${HOSTS:-localhost}"']
    return [
        f"# HOSTS: the {nodes} nodes, in order, as they reach each other.",
        'read -ra HOSTS <<< "${HOSTS:?names of the nodes, in order, between blanks}"',
        f'((${{#HOSTS[@]}} == {nodes})) || {{ echo "HOSTS names ${{#HOSTS[@]}} nodes, the plan takes {nodes}" >&2; exit 2; }}',
    ]


def _run(target: ServingTarget, engine: Engine, version: str) -> str:
    nodes = target.nodes
    last = f" (0 to {nodes - 1})" if nodes > 1 else ""
    lines = [
        "#!/usr/bin/env bash",
        f"# {engine.title} {version}; plan.json holds the whole plan.",
        *(f"# {line}" for line in summary(target.plan)),
        f"# Starts what placement.tsv gives to this node, NODE_RANK{last}; further arguments are passed on to the engine.",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        f"NODE_RANK=${{NODE_RANK:-${{SLURM_NODEID:-{0 if nodes == 1 else '?which node this is'}}}}}"
        if nodes == 1
        else "NODE_RANK=${NODE_RANK:-${SLURM_NODEID:?set NODE_RANK to this node, from 0}}",
        *_hosts(nodes),
        "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT",
        "",
        "while read -r node pool replica rank port devices leader; do",
        '    [[ $node == "$NODE_RANK" ]] || continue',
        "    suffix=-$pool",
        '    [[ $pool == aggregated ]] && suffix=""',
        "    RANK=$rank LEADER=${HOSTS[leader]} PORT=$port CUDA_VISIBLE_DEVICES=$devices \\",
        '        bash "serve$suffix.sh" "$@" > "engine$suffix-$replica-$rank.log" 2>&1 &',
        '    echo "node $node: $pool replica $replica on devices $devices, port $port, log engine$suffix-$replica-$rank.log"',
        "done < placement.tsv",
        "",
        "# A replica that ends takes the others of its node along.",
        "wait -n",
    ]
    return "\n".join(lines) + "\n"


def _router(target: ServingTarget, engine: Engine) -> str:
    lines = [
        "#!/usr/bin/env bash",
        "# Spreads requests over the replicas; run it once, where clients reach it. PORT: where it answers.",
        "# PREFILL and DECODE: addresses, between blanks, where placement.tsv and HOSTS do not tell them.",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        f"PORT=${{PORT:-{ROUTER_PORT}}}",
        "if [[ -z ${DECODE:-} ]]; then",
        *(f"    {line}" for line in _hosts(target.nodes)),
        "    while read -r node pool replica rank port devices leader; do",
        "        [[ $rank == 0 ]] || continue",
        "        url=http://${HOSTS[node]}:$port",
        '        if [[ $pool == prefill* ]]; then PREFILL+=" $url"; else DECODE+=" $url"; fi',
        "    done < placement.tsv",
        "fi",
        'read -ra PREFILL <<< "${PREFILL:-}"',
        'read -ra DECODE <<< "$DECODE"',
        "",
        "# Loading takes longer than a router waits by itself; the last address is as slow as the first.",
        'for url in "${PREFILL[@]}" "${DECODE[@]}"; do',
        f'    until curl -so /dev/null --fail --max-time {_HEALTH_TIMEOUT_S} "$url/health"; do sleep {_HEALTH_PAUSE_S}; done',
        "done",
        "",
    ]
    command = engine.router(target)
    return "\n".join([*lines, *_continued(command)]) + "\n"


def _continued(lines: Sequence[str]) -> list[str]:
    """Indented lines go on from the one before them."""
    found: list[str] = []
    for line in lines:
        if (
            line.startswith("    ")
            and found
            and not found[-1].rstrip().endswith(("do", "{", "\\"))
            and "printf" not in line
        ):
            found[-1] += " \\"
        found.append(line)
    return found


def _start(target: ServingTarget) -> list[str]:
    where = " on every node, with `NODE_RANK` and `HOSTS` set" if target.nodes > 1 else ""
    found = [f"`MODEL=CHECKPOINT bash run.sh`{where}; logs are `engine*.log`"]
    if routed(target):
        hosts = " with the same `HOSTS`" if target.nodes > 1 else ""
        found.append(f"`bash router.sh`{hosts}, once: it waits until every replica answers `/health`")
    return found


def _exporter(engine: Engine) -> ServingExporter:
    return ServingExporter(
        name=engine.name, title=engine.title, versions=engine.versions, checked=engine.checked, engine=lambda target: engine,
        write=_write, start=_start, around=("kubernetes", "slurm"),
    )  # fmt: skip


EXPORTERS: Mapping[str, ServingExporter] = {
    name: _exporter(replace(engine)) for name, engine in ENGINES.items()
}
