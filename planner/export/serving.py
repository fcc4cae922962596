"""A serving plan as launch lines of its engine, one per pool.

Flags: vLLM ``vllm serve --help`` (0.11 and later), SGLang ``sglang/srt/server_args.py`` (0.5), TensorRT-LLM ``trtllm-serve
--help`` and its YAML of extra options (1.0). What an engine takes from the checkpoint itself (the format of the weights) has no
flag.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from planner.errors import ExportError, Problem, SpecError, did_you_mean
from planner.serving.plan import Pool, ServePlan

__all__ = ["SERVING_EXPORTERS", "export_serving"]


def export_serving(plan: ServePlan, to: str, checkpoint: str | None = None) -> dict[str, str]:
    """Files (name → content) that launch a plan.

    Args:
        plan: the plan.
        to: a key of :data:`SERVING_EXPORTERS`.
        checkpoint: what to load; None: the plan's model name.

    Raises:
        ExportError: the engine cannot run the plan's layout.
        SpecError: no such engine.
    """
    if to not in SERVING_EXPORTERS:
        hint = did_you_mean(to, SERVING_EXPORTERS)
        raise SpecError(Problem("--to", repr(to), f"one of {', '.join(sorted(SERVING_EXPORTERS))}", hint))
    if (plan.mode == "offloaded") != (to == "flexllmgen"):
        expected = "--to flexllmgen" if plan.mode == "offloaded" else "one of the engines that serve arrivals"
        raise ExportError(Problem(f"--to {to}", f"the plan is {plan.mode}", expected))
    files: dict[str, str] = {}
    for index, pool in enumerate(plan.pools):
        name = "" if pool.role == "aggregated" else f"-{pool.role}"
        if sum(other.role == pool.role for other in plan.pools) > 1:
            name += f"-{index + 1}"
        line, extra = SERVING_EXPORTERS[to](plan, pool, checkpoint or plan.model)
        devices = pool.devices // pool.replicas
        where = f" of {pool.cluster}" if pool.cluster else ""
        head = f"# {pool.replicas} replica(s) of {devices} device(s){where}: start this once on each"
        files[f"serve{name}.sh"] = f"#!/bin/sh\n{head}\n" + " \\\n  ".join(line) + "\n"
        files |= {f"{part}{name}.yaml": text for part, text in extra.items()}
    return files


def _length(plan: ServePlan) -> int:
    return int(plan.traffic["isl"]) + int(plan.traffic["osl"])


def _refuse(to: str, pool: Pool, what: str, expected: str) -> ExportError:
    return ExportError(Problem(f"--to {to}", f"{pool.role} pool: {what}", expected))


def _vllm(plan: ServePlan, pool: Pool, checkpoint: str) -> tuple[list[str], dict[str, str]]:
    mesh, knobs = pool.mesh, pool.knobs
    if mesh["ep"] not in (1, mesh["tp"] * mesh["dp"]):
        raise _refuse("vllm", pool, f"ep={mesh['ep']}", "1, or all of a replica's ranks")
    line = [
        f"vllm serve {checkpoint}",
        f"--tensor-parallel-size {mesh['tp']}",
        f"--pipeline-parallel-size {mesh['pp']}",
    ]
    if mesh["dp"] > 1:
        line.append(f"--data-parallel-size {mesh['dp']}")
    if mesh["ep"] > 1:
        line.append("--enable-expert-parallel")
    line += [
        f"--kv-cache-dtype {'fp8' if knobs['cache'] == 'fp8' else 'auto'}",
        f"--max-model-len {_length(plan)}",
    ]
    if "max_sequences" in knobs:
        line.append(f"--max-num-seqs {-(-int(knobs['max_sequences']) // mesh['dp'])}")
    if "chunk_tokens" in knobs:
        line.append(f"--max-num-batched-tokens {knobs['chunk_tokens']}")
    if "draft" in knobs:
        line.append(f"--speculative-config '{json.dumps(_vllm_draft(knobs))}'")
    if pool.role != "aggregated":
        role = "kv_producer" if pool.role == "prefill" else "kv_consumer"
        line.append(f'--kv-transfer-config \'{{"kv_connector":"NixlConnector","kv_role":"{role}"}}\'')
    return line, {}


def _vllm_draft(knobs: Mapping[str, Any]) -> dict[str, Any]:
    who: dict[str, dict[str, Any]] = {
        "mtp": {"method": "mtp"},
        "ngram": {"method": "ngram", "prompt_lookup_max": 4},
    }
    return {
        **who.get(knobs["draft"], {"model": knobs["draft"]}),
        "num_speculative_tokens": int(knobs["draft_tokens"]),
    }


_SGLANG_DRAFTS = {"mtp": "NEXTN", "ngram": "NGRAM"}
_TRTLLM_DRAFTS = {"mtp": ("MTP", "num_nextn_predict_layers"), "ngram": ("NGram", "max_draft_len")}


def _sglang(plan: ServePlan, pool: Pool, checkpoint: str) -> tuple[list[str], dict[str, str]]:
    mesh, knobs = pool.mesh, pool.knobs
    # SGLang counts tensor ranks over all attention ranks.
    line = [
        f"python -m sglang.launch_server --model-path {checkpoint}",
        f"--tp-size {mesh['tp'] * mesh['dp']}",
    ]
    if mesh["pp"] > 1:
        line.append(f"--pp-size {mesh['pp']}")
    if mesh["dp"] > 1:
        line += [f"--dp-size {mesh['dp']}", "--enable-dp-attention"]
    if mesh["ep"] > 1:
        line.append(f"--ep-size {mesh['ep']}")
    line += [
        f"--kv-cache-dtype {'fp8_e4m3' if knobs['cache'] == 'fp8' else 'auto'}",
        f"--context-length {_length(plan)}",
    ]
    if "max_sequences" in knobs:
        line.append(f"--max-running-requests {knobs['max_sequences']}")
    if "chunk_tokens" in knobs:
        line.append(f"--chunked-prefill-size {knobs['chunk_tokens']}")
    if "draft" in knobs:
        line.append(f"--speculative-algorithm {_SGLANG_DRAFTS.get(knobs['draft'], 'STANDALONE')}")
        if knobs["draft"] not in _SGLANG_DRAFTS:
            line.append(f"--speculative-draft-model-path {knobs['draft']}")
        drafted = int(knobs["draft_tokens"])
        line += [f"--speculative-num-steps {drafted}", "--speculative-eagle-topk 1"]
        line.append(f"--speculative-num-draft-tokens {drafted + 1}")
    if pool.role != "aggregated":
        line.append(f"--disaggregation-mode {pool.role}")
    return line, {}


def _trtllm(plan: ServePlan, pool: Pool, checkpoint: str) -> tuple[list[str], dict[str, str]]:
    mesh, knobs = pool.mesh, pool.knobs
    if mesh["dp"] > 1 and mesh["tp"] > 1:
        raise _refuse(
            "trtllm", pool, f"tp={mesh['tp']} beside dp={mesh['dp']}", "attention ranks of one device each"
        )
    ranks = mesh["tp"] * mesh["dp"]
    line = [f"trtllm-serve {checkpoint}", f"--tp_size {ranks}", f"--pp_size {mesh['pp']}"]
    if mesh["ep"] > 1:
        line.append(f"--ep_size {mesh['ep']}")
    line.append(f"--max_seq_len {_length(plan)}")
    if "max_sequences" in knobs:
        line.append(f"--max_batch_size {-(-int(knobs['max_sequences']) // mesh['dp'])}")
    if "chunk_tokens" in knobs:
        line.append(f"--max_num_tokens {knobs['chunk_tokens']}")
    options = ["cuda_graph_config:", "  enable_padding: true"]
    options += ["kv_cache_config:", f"  dtype: {'fp8' if knobs['cache'] == 'fp8' else 'auto'}"]
    if mesh["dp"] > 1:
        options.append("enable_attention_dp: true")
    if "draft" in knobs:
        kind, count = _TRTLLM_DRAFTS.get(knobs["draft"], ("DraftTarget", "max_draft_len"))
        options += ["speculative_config:", f"  decoding_type: {kind}", f"  {count}: {knobs['draft_tokens']}"]
        if knobs["draft"] not in _TRTLLM_DRAFTS:
            options.append(f"  speculative_model_dir: {knobs['draft']}")
    if pool.role != "aggregated":
        options += ["cache_transceiver_config:", "  backend: DEFAULT"]
    name = "extra" + ("" if pool.role == "aggregated" else f"-{pool.role}")
    return [*line, f"--extra_llm_api_options {name}.yaml"], {"extra": "\n".join(options) + "\n"}


def _flexllmgen(plan: ServePlan, pool: Pool, checkpoint: str) -> tuple[list[str], dict[str, str]]:
    knobs = pool.knobs
    if "opt" not in plan.model:
        raise _refuse("flexllmgen", pool, plan.model, "a model of the OPT family")
    return [
        f"python3 -m flexllmgen.flex_opt --model facebook/{plan.model}" if checkpoint == plan.model
        else f"python3 -m flexllmgen.flex_opt --model {checkpoint}",
        f"--percent {knobs['percent']}", f"--gpu-batch-size {knobs['gpu_batch_size']}",
        f"--num-gpu-batches {knobs['gpu_batches']}", f"--prompt-len {plan.traffic['isl']}", f"--gen-len {plan.traffic['osl']}",
    ], {}  # fmt: skip


Exporter = Callable[[ServePlan, Pool, str], tuple[list[str], dict[str, str]]]
SERVING_EXPORTERS: Mapping[str, Exporter] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "trtllm": _trtllm,
    "flexllmgen": _flexllmgen,
}
"""Exporters by the name that ``--to`` takes."""
