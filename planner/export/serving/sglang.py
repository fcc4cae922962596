"""SGLang: ``python -m sglang.launch_server --config``, one file per pool.

Keys are the flags of SGLang 0.5.23 without their dashes. Its ``tp-size`` counts all ranks of a stage: attention ranks
(``attn-dp-size``) and those that share prompts (``attn-cp-size``) lie inside, and both ``chunked-prefill-size`` and
``max-running-requests`` are shared out among attention ranks. ``mem-fraction-static`` is the part of a device's memory for
weights and caches alone, without activations and what the process holds besides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from planner.export.serving.engine import Engine, eagle_method, needed_beside, number_format
from planner.export.serving.target import FIRST_PORT, ServingTarget
from planner.serving.plan import Pool
from planner.specs.traffic import ADAPTER_RANK

__all__ = ["ENGINE"]

_DTYPES = {"fp16": "float16"}
_DRAFTS = {"mtp": "NEXTN", "ngram": "NGRAM"}
_BOOTSTRAP = 8998


def _settings(target: ServingTarget, pool: Pool) -> Mapping[str, Any]:
    mesh, knobs, shared = pool.mesh, pool.knobs, pool.mesh.get("cp", 1)
    found: dict[str, Any] = {
        "tp-size": mesh["tp"] * mesh["dp"] * shared,
        "pp-size": mesh["pp"],
        "attn-dp-size": mesh["dp"],
        "ep-size": mesh["ep"],
        "dtype": _DTYPES.get(str(knobs["weights"]), "bfloat16"),
        "kv-cache-dtype": "fp8_e4m3" if knobs["cache"] == "fp8" else "auto",
        "context-length": target.context_tokens,
        "mem-fraction-static": _static_fraction(target, pool),
    }
    if shared > 1:
        # An indexer's keys are dealt token by token; dense layers lie whole on every rank.
        indexed = any(b.attention and b.attention.index_heads for b in target.model.blocks.values())
        found |= {
            "attn-cp-size": shared,
            "enable-prefill-cp": True,
            "cp-strategy": "interleave" if indexed else "zigzag",
            "moe-dense-tp-size": 1,
        }
    if target.cache_parts(pool) > 1:
        found["dcp-size"] = target.cache_parts(pool)
    if knobs["experts"] == "exchanged":
        found["moe-a2a-backend"] = "deepep"
        found["deepep-mode"] = "low_latency" if pool.role == "decode" else "normal"
    if knobs.get("micro_batches") == "2":
        found["enable-two-batch-overlap"] = True
    narrowed = number_format(ENGINE, target, pool)
    if narrowed is not None:
        found["quantization"] = narrowed
    if "chunk_tokens" in knobs:
        found["chunked-prefill-size"] = int(knobs["chunk_tokens"]) * mesh["dp"]
    sequences = target.sequences(pool)
    if sequences is not None:
        found["max-running-requests"] = sequences * mesh["dp"]
    traffic = target.problem.traffic
    if traffic.adapters is not None:
        found |= {
            "enable-lora": True,
            "max-loras-per-batch": traffic.adapters,
            "max-lora-rank": traffic.adapter_rank or ADAPTER_RANK,
        }
    if "draft" in knobs:
        drafted = int(knobs["draft_tokens"])
        heads = {"eagle": eagle_method(target.draft(pool)).upper()} if knobs["draft"] == "eagle" else {}
        found["speculative-algorithm"] = {**_DRAFTS, **heads}.get(knobs["draft"], "STANDALONE")
        if knobs["draft"] not in _DRAFTS:
            found["speculative-draft-model-path"] = target.draft(pool)
        found |= {
            "speculative-num-steps": drafted,
            "speculative-eagle-topk": 1,
            "speculative-num-draft-tokens": drafted + 1,
        }
    if pool.role != "aggregated":
        found |= {"disaggregation-mode": pool.role, "disaggregation-transfer-backend": "nixl"}
    return found


def _static_fraction(target: ServingTarget, pool: Pool) -> float:
    """Weights and caches of a device's memory, rounded down."""
    held = target.capacity(pool)
    static = float(held.weights_bytes[0]) + max(float(held.cache_bytes[0]), 0.0)
    return math.floor(static / float(target.cluster(pool).device.memory_bytes) * 1000) / 1000


def _command(target: ServingTarget, pool: Pool, config: str) -> list[str]:
    words = [
        'python3 -m sglang.launch_server --model-path "$MODEL"',
        f"--config {config}",
        "--host 0.0.0.0 --port $PORT",
    ]
    nodes = target.span(pool)
    if nodes > 1:
        words.append(f"--nnodes {nodes} --node-rank $RANK --dist-init-addr $LEADER:20000")
    if pool.role == "prefill":
        words.append(f"--disaggregation-bootstrap-port $(({_BOOTSTRAP} + PORT - {FIRST_PORT}))")
    return words


def _router(target: ServingTarget) -> list[str]:
    policy = "power_of_two" if target.unlike else "round_robin"
    head = [f"python3 -m sglang_router.launch_router --host 0.0.0.0 --port $PORT --policy {policy}"]
    if target.plan.mode == "aggregated":
        return [*head, '    --worker-urls "${DECODE[@]}"']
    return [
        "PAIRS=()  # address and bootstrap port of every prefill server",
        'for url in "${PREFILL[@]}"; do',
        f'    PAIRS+=(--prefill "$url" $(({_BOOTSTRAP} + ${{url##*:}} - {FIRST_PORT})))',
        "done",
        'for url in "${DECODE[@]}"; do PAIRS+=(--decode "$url"); done',
        *head,
        '    --pd-disaggregation "${PAIRS[@]}"',
    ]


ENGINE = Engine(
    name="sglang",
    title="SGLang",
    versions=("0.5.23",),
    checked="its parser and ServerArgs, resolved as on a CPU",
    settings=_settings,
    command=_command,
    router=_router,
    online={"fp8": "fp8"},
    needs=needed_beside,
    router_package="sglang-router",
)
