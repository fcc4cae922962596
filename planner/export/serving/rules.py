"""What engines refuse: every rule of vLLM, SGLang and TensorRT-LLM over replicas, with the version that it was read from.

They bound the search (``planner serve --engine``), refuse an export, and are what ``planner check`` holds a launch against.

Sources: vLLM 0.32 (``vllm/config/parallel.py``, ``distributed/kv_transfer/kv_connector/v1/nixl_connector.py``); SGLang 0.5.23
(``srt/server_args.py``, ``srt/disaggregation``); TensorRT-LLM 1.2 (``llmapi/llm_args.py``, ``_torch/modules/attention.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from planner.mesh import Mesh
from planner.serving.launcher import Replicas, Rule, ServingLauncher
from planner.specs.model import Model

__all__ = ["SERVING_LAUNCHERS"]


def _vllm(pool: Replicas) -> Iterator[Rule]:
    mesh, ranks = pool.ctx.mesh, pool.ranks
    if _experts(pool.ctx.model):
        yield Rule(
            "experts over some ranks of a stage",
            "ep of 1, or of all ranks",
            (mesh.ep == 1) | (mesh.ep == ranks),
        )
    if pool.ctx.knobs["experts"] == "exchanged":
        expected = "dp from 2, or experts=gathered"
        yield Rule("tokens travel to experts without data parallelism", expected, mesh.cp * mesh.dp > 1)
    yield from _heads(pool)
    if pool.role == "decode":
        yield Rule(
            "stages in a pool that generates",
            "pp of 1: NixlConnector counts caches per rank of one stage",
            mesh.pp == 1,
        )
    shared = mesh.cp > 1
    if np.any(shared):
        yield Rule(
            "prompts shared by ranks without a latent cache",
            "cp of 1: PCP runs on MLA backends",
            ~shared | _latent(pool.ctx.model),
        )
    if pool.role == "prefill" and _windowed(pool.ctx.model):
        expected = "pp of 1: NixlConnector moves such caches of one stage alone"
        yield Rule("stages in a pool of prompts with windows in the cache", expected, mesh.pp == 1)


def _sglang(pool: Replicas) -> Iterator[Rule]:
    mesh, ranks = pool.ctx.mesh, pool.ranks
    if pool.ctx.knobs["experts"] == "exchanged":
        yield Rule("tokens travel to experts on some ranks of a stage", "ep of all ranks", mesh.ep == ranks)
    shared = mesh.cp > 1
    if np.any(shared):
        expected = (
            "cp of 1, or latent attention and experts on all ranks (--moe-dense-tp-size 1), tp and pp of 1"
        )
        able = (
            _latent(pool.ctx.model)
            & _experts(pool.ctx.model)
            & (mesh.tp == 1)
            & (mesh.pp == 1)
            & (mesh.ep == ranks)
        )
        yield Rule("prompts shared by ranks that cut dense layers", expected, ~shared | able)
    if pool.draft == "ngram":
        expected = "dp of 1, or another draft"
        yield Rule("tokens drafted from the prompt beside attention ranks", expected, mesh.dp == 1)
    yield from _heads(pool)


def _sglang_pairs(prefill: Mesh, decode: Mesh) -> Iterator[Rule]:
    expected = "stages in none, or as many as in the pool of prompts"
    yield Rule("stages in a pool that generates", expected, (decode.pp == 1) | (decode.pp == prefill.pp))


def _trtllm(pool: Replicas) -> Iterator[Rule]:
    mesh, cluster = pool.ctx.mesh, pool.ctx.cluster
    if pool.draft == "eagle":
        yield Rule("a draft head", "another draft: this export does not say how it is told of one", False)
    expected = "attention ranks of one device each"
    yield Rule("tensor beside data parallelism of attention", expected, (mesh.tp == 1) | (mesh.dp == 1))
    if pool.ctx.traffic.adapters is not None:
        yield Rule("low-rank adapters", "none: this export does not say how it is told of them", False)
    per_node = float(max(group.devices_per_node for group in cluster.groups))
    expected = (
        f"at most {per_node:g} devices: ranks on several are started by the site's MPI (trtllm-llmapi-launch)"
    )
    yield Rule("a replica over several nodes", expected, pool.ranks * mesh.pp <= per_node)
    yield from _heads(pool)


def _experts(model: Model) -> bool:
    return any(block.moe for block in model.blocks.values())


def _latent(model: Model) -> bool:
    return all(block.attention is not None and block.attention.latent for block in model.blocks.values())


def _windowed(model: Model) -> bool:
    return any(block.attention and block.attention.window for block in model.blocks.values())


def _shares_prompts(slot: str, value: str, model: Model) -> bool:
    """Ranks that share prompts, of models for which an engine has the kernels."""
    return (slot, value) == ("prompt_ranks", "all_gather") and _latent(model)


def _heads(pool: Replicas) -> Iterator[Rule]:
    """Heads that tensor-parallel ranks share evenly; KV heads may also be copied."""
    tp = pool.ctx.mesh.tp
    for name, block in pool.ctx.model.blocks.items():
        attention = block.attention
        if attention is None:
            continue
        yield Rule(
            f"tp beside {attention.heads} attention heads of layers {name!r}",
            "a divisor",
            attention.heads % tp == 0,
        )
        if not attention.latent:
            shared = (attention.kv_heads % tp == 0) | (tp % attention.kv_heads == 0)
            reason = f"tp beside {attention.kv_heads} KV heads of layers {name!r}"
            yield Rule(reason, "a divisor or a multiple", np.asarray(shared))


_ALONE, _GATHERED = frozenset({"alone"}), frozenset({"all_gather"})
_FORMATS = frozenset(
    ["bf16", "fp16", "fp8", "fp8_block", "nvfp4", "w4a16_mxfp4", "w4a8_mxfp4_mxfp8", "int4_wo", "int8_wo"]
)
_CHOICES = {"weights": _FORMATS, "cache": frozenset({"bf16", "fp8"}), "prompt_ranks": _ALONE | _GATHERED}
_NO_EXCHANGE = {
    "prompt_ranks": _ALONE,
    "cache_copies": frozenset({"kept"}),
    "micro_batches": frozenset({"1"}),
}

SERVING_LAUNCHERS: Mapping[str, ServingLauncher] = {
    "sglang": ServingLauncher("sglang", _sglang, _sglang_pairs, _CHOICES, _shares_prompts),
    "trtllm": ServingLauncher("trtllm", _trtllm, choices=_CHOICES | _NO_EXCHANGE),
    "vllm": ServingLauncher("vllm", _vllm, choices=_CHOICES, native=_shares_prompts),
}
"""By the name that ``--to`` takes, which the stack of the engine's present version has as well."""
