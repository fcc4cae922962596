"""TensorRT-LLM: ``trtllm-serve`` with a YAML of LLM arguments, one file per pool.

Keys are fields of ``TorchLlmArgs`` (tensorrt_llm/llmapi/llm_args.py, 1.2) and of the configurations in it.
``free_gpu_memory_fraction`` is the part of what is free after the weights are loaded; attention ranks take whole devices
(``enable_attention_dp``). Number formats of weights come from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.export.serving.engine import Engine
from planner.export.serving.target import ServingTarget
from planner.serving.plan import Pool

__all__ = ["ENGINE"]

_DRAFTS = {"mtp": ("MTP", "num_nextn_predict_layers"), "ngram": ("NGram", "max_draft_len")}


def _settings(target: ServingTarget, pool: Pool) -> Mapping[str, Any]:
    mesh, knobs = pool.mesh, pool.knobs
    ranks = mesh["tp"] * mesh["dp"]
    sequences = target.sequences(pool) or int(float(target.software("trtllm", pool).max_sequences))
    found: dict[str, Any] = {
        "backend": "pytorch",
        "tensor_parallel_size": ranks,
        "pipeline_parallel_size": mesh["pp"],
    }
    if any(block.moe for block in target.model.blocks.values()):
        found |= {"moe_expert_parallel_size": mesh["ep"], "moe_tensor_parallel_size": ranks // mesh["ep"]}
    found |= {
        "enable_attention_dp": mesh["dp"] > 1,
        "max_batch_size": sequences,
        "max_num_tokens": target.iteration_tokens(pool),
        "max_seq_len": target.context_tokens,
        "enable_chunked_prefill": True,
        "kv_cache_config": {
            "dtype": "fp8" if knobs["cache"] == "fp8" else "auto",
            "free_gpu_memory_fraction": float(target.software("trtllm", pool).free_fraction),
        },
    }
    if "draft" in knobs:
        kind, count = _DRAFTS.get(knobs["draft"], ("DraftTarget", "max_draft_len"))
        found["speculative_config"] = {"decoding_type": kind, count: int(knobs["draft_tokens"])}
        if knobs["draft"] not in _DRAFTS:
            found["speculative_config"]["speculative_model_dir"] = target.draft(pool)
    if pool.role != "prefill":
        found["cuda_graph_config"] = {"enable_padding": True, "max_batch_size": sequences}
    if pool.role != "aggregated":
        found["cache_transceiver_config"] = {"backend": "NIXL", "max_tokens_in_buffer": target.context_tokens}
        found["disable_overlap_scheduler"] = pool.role == "prefill"
    return found


def _command(target: ServingTarget, pool: Pool, config: str) -> list[str]:
    return ['trtllm-serve "$MODEL"', "--host 0.0.0.0 --port $PORT", f"--extra_llm_api_options {config}"]


def _router(target: ServingTarget) -> list[str]:
    if target.plan.mode == "aggregated":
        return [
            "# TensorRT-LLM brings no router for replicas; nginx takes the one with fewest requests.",
            "{",
            "    printf 'events {}\\nhttp {\\n  upstream engines {\\n    least_conn;\\n'",
            "    printf '    server %s;\\n' \"${DECODE[@]#http://}\"",
            "    printf '  }\\n  server {\\n    listen %s;\\n    location / {\\n      proxy_pass http://engines;\\n' $PORT",
            "    printf '      proxy_buffering off;\\n      proxy_read_timeout 3600;\\n    }\\n  }\\n}\\n'",
            "} > nginx.conf",
            'exec nginx -c "$PWD/nginx.conf" -g "daemon off;"',
        ]
    # tensorrt_llm/serve/router.py: round_robin unless told; load_balancing counts the tokens under way.
    by_load = "  router:\\n    type: load_balancing\\n" if target.unlike else ""
    return [
        "{",
        "    printf 'hostname: 0.0.0.0\\nport: %s\\nbackend: pytorch\\n' $PORT",
        f"    printf 'context_servers:\\n{by_load}  num_instances: %s\\n  urls:\\n' ${{#PREFILL[@]}}",
        '    printf \'    - "%s"\\n\' "${PREFILL[@]#http://}"',
        f"    printf 'generation_servers:\\n{by_load}  num_instances: %s\\n  urls:\\n' ${{#DECODE[@]}}",
        '    printf \'    - "%s"\\n\' "${DECODE[@]#http://}"',
        "} > disaggregated.yaml",
        "exec trtllm-serve disaggregated --config_file disaggregated.yaml",
    ]


def _differs(target: ServingTarget) -> list[str]:
    if any(pool.mesh["dp"] > 1 and pool.mesh["ep"] > 1 for pool in target.plan.pools):
        return [
            "Whether tokens are gathered or travel to their experts is TensorRT-LLM's own choice, by the devices and the batch."
        ]
    return []


ENGINE = Engine(
    name="trtllm",
    title="TensorRT-LLM",
    versions=("1.2",),
    checked="field names against the wheel aiconfigurator 0.12; it cannot be installed without a driver",
    settings=_settings,
    command=_command,
    router=_router,
    online={},
    differs=_differs,
)
