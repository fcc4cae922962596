"""vLLM: ``vllm serve --config``, one file per pool.

Keys are the flags of ``vllm serve`` 0.32 without their dashes. Ranks of data parallelism are attention ranks of one engine
(``--data-parallel-size``); experts are cut over all ranks or over none. ``--gpu-memory-utilization`` is the part of a device's
whole memory that the engine may use for everything, which is what the planner's ``memory_fraction`` of its stack means too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.export.serving.engine import Engine, eagle_method, needed_beside, number_format
from planner.export.serving.target import FIRST_PORT, ServingTarget
from planner.serving.plan import Pool
from planner.specs.traffic import ADAPTER_RANK

__all__ = ["ENGINE"]

_DTYPES = {"fp16": "float16"}
_EXCHANGES = {
    "prefill": "deepep_high_throughput",
    "aggregated": "deepep_high_throughput",
    "decode": "deepep_low_latency",
}
_DRAFTS: dict[str, dict[str, Any]] = {
    "mtp": {"method": "mtp"},
    "ngram": {"method": "ngram", "prompt_lookup_max": 4},
}
_SIDE_CHANNEL = 5600
_SIDE_CHANNELS = 16  # ports apart, so that the ranks of replicas on one node do not meet


def _settings(target: ServingTarget, pool: Pool) -> Mapping[str, Any]:
    mesh, knobs = pool.mesh, pool.knobs
    found: dict[str, Any] = {
        "tensor-parallel-size": mesh["tp"],
        "pipeline-parallel-size": mesh["pp"],
        "data-parallel-size": mesh["dp"],
        "dtype": _DTYPES.get(str(knobs["weights"]), "bfloat16"),
        "kv-cache-dtype": "fp8" if knobs["cache"] == "fp8" else "auto",
        "max-model-len": target.context_tokens,
        "max-num-batched-tokens": target.iteration_tokens(pool),
        "gpu-memory-utilization": float(target.software("vllm", pool).memory_fraction),
    }
    if mesh.get("cp", 1) > 1:
        found["prefill-context-parallel-size"] = mesh["cp"]
    if target.cache_parts(pool) > 1:
        found["decode-context-parallel-size"] = target.cache_parts(pool)
    if mesh["ep"] > 1:
        found["enable-expert-parallel"] = True
    if knobs["experts"] == "exchanged":
        found["all2all-backend"] = _EXCHANGES[pool.role]
    if knobs.get("micro_batches") == "2":
        found["enable-dbo"] = True
    narrowed = number_format(ENGINE, target, pool)
    if narrowed is not None:
        found["quantization"] = narrowed
    sequences = target.sequences(pool)
    if (
        sequences is None
    ):  # a pool of prompts; the default is more than one iteration has tokens for in small ones
        sequences = min(
            int(float(target.software("vllm", pool).max_sequences)), target.iteration_tokens(pool)
        )
    found["max-num-seqs"] = sequences
    traffic = target.problem.traffic
    if traffic.adapters is not None:
        found |= {
            "enable-lora": True,
            "max-loras": traffic.adapters,
            "max-lora-rank": traffic.adapter_rank or ADAPTER_RANK,
        }
    if "draft" in knobs:
        own = _DRAFTS.get(knobs["draft"]) or {"model": target.draft(pool)}
        if knobs["draft"] == "eagle":
            own |= {"method": eagle_method(target.draft(pool))}
        found["speculative-config"] = {
            **own,
            "num_speculative_tokens": int(knobs["draft_tokens"]),
        }
    if pool.role != "aggregated":
        # Ranks that share prompts may only send; the role of either side is none of the connector's business otherwise.
        role = "kv_producer" if mesh.get("cp", 1) > 1 else "kv_both"
        found["kv-transfer-config"] = {"kv_connector": "NixlConnector", "kv_role": role}
    return found


def _environment(target: ServingTarget, pool: Pool) -> list[str]:
    if pool.role == "aggregated":
        return []
    address = '"${VLLM_NIXL_SIDE_CHANNEL_HOST:-$(hostname -I | cut -d" " -f1)}"'
    port = f"$(({_SIDE_CHANNEL} + {_SIDE_CHANNELS} * (PORT - {FIRST_PORT})))"
    return [f"export VLLM_NIXL_SIDE_CHANNEL_HOST={address}", f"export VLLM_NIXL_SIDE_CHANNEL_PORT={port}"]


def _command(target: ServingTarget, pool: Pool, config: str) -> list[str]:
    words = ['vllm serve "$MODEL"', f"--config {config}", "--host 0.0.0.0 --port $PORT"]
    nodes = target.span(pool)
    if nodes > 1:
        words.append(f"--nnodes {nodes} --node-rank $RANK --master-addr $LEADER")
        if pool.mesh["dp"] > 1:
            words.append("--data-parallel-address $LEADER")
        words.append("$([[ $RANK == 0 ]] || echo --headless)")
    return words


def _router(target: ServingTarget) -> list[str]:
    policy = "power_of_two" if target.unlike else "round_robin"
    head = [f"vllm-router --host 0.0.0.0 --port $PORT --policy {policy}"]
    if target.plan.mode == "aggregated":
        return [*head, '    --worker-urls "${DECODE[@]}"']
    return [
        *head,
        "    --vllm-pd-disaggregation",
        '    "${PREFILL[@]/#/--prefill=}" "${DECODE[@]/#/--decode=}"',
    ]


ENGINE = Engine(
    name="vllm",
    title="vLLM",
    versions=("0.32",),
    checked="its parser and create_engine_config",
    settings=_settings,
    command=_command,
    router=_router,
    online={"fp8": "fp8"},
    environment=_environment,
    needs=needed_beside,
    router_package="vllm-router",
)
