"""A launch of vLLM as one pool: a script with ``vllm serve``, or the YAML of its ``--config``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.export.flags import FlagReader
from planner.export.launched import ignored_note, names_in
from planner.export.serving.launched import (
    Drafts,
    LaunchedPool,
    launched_adapters,
    launched_formats,
    read_flags,
    strangers,
    two_batches,
)

__all__ = ["read_vllm"]

# Of vLLM 0.32 (EngineArgs, ParallelConfig, SchedulerConfig), with what they mean on devices of 70 GB and more.
_DEFAULT_FRACTION = 0.92
_SHORT = {
    "-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-dp": "--data-parallel-size", "-q": "--quantization",
    "-ep": "--enable-expert-parallel", "-dpl": "--data-parallel-size-local", "-dcp": "--decode-context-parallel-size",
    "--model-tag": "--model",
}  # fmt: skip
_UNMODELLED: Mapping[str, str] = {
    "--cpu-offload-gb": "weights on the host",
    "--kv-offloading-size": "caches on the host",
}
_PASSIVE = names_in(
    "--host --port --served-model-name --api-key --trust-remote-code --download-dir --load-format --tokenizer --tokenizer-mode "
    "--seed --disable-log-requests --uvicorn-log-level --enable-auto-tool-choice --tool-call-parser --reasoning-parser "
    "--chat-template --nnodes --node-rank --master-addr --master-port --headless --data-parallel-address "
    "--data-parallel-rpc-port --data-parallel-size-local --data-parallel-start-rank --distributed-executor-backend "
    "--enable-prefix-caching --enable-chunked-prefill --generation-config --revision --scheduling-policy"
)


def read_vllm(path: str | Path) -> LaunchedPool:
    """The pool that a launch of vLLM describes.

    Raises:
        SpecError: the file cannot be read, flags are wrong or ask for what is not modelled; all at once.
    """
    flags, before, notes = read_flags(
        path, "a script with vllm serve, or the YAML of its --config", ("serve",), _SHORT
    )
    flags.refuse(_UNMODELLED, idle=("0", "1"))
    tp, pp, dp = (flags.integer(f"--{name}-parallel-size", 1) for name in ("tensor", "pipeline", "data"))
    experts = flags.present("--enable-expert-parallel")
    shared = flags.integer("--prefill-context-parallel-size", 1)
    fixed: dict[str, Any] = {"tp": tp, "pp": pp, "dp": dp, "ep": tp * dp * shared if experts else 1}
    if shared > 1:
        fixed |= {"cp": shared, "prompt_ranks": "all_gather"}
    backend = flags.text("--all2all-backend", "allgather_reducescatter")
    gathered = backend in ("allgather_reducescatter", "naive") or not experts or dp == 1
    fixed["experts"] = "gathered" if gathered else "exchanged"
    fixed["micro_batches"] = two_batches(flags, "--enable-dbo", fixed, notes)
    parts = flags.integer("--decode-context-parallel-size", 1)
    if parts > 1:
        fixed["cache_copies"] = "dcp"
        notes.append(
            f"--decode-context-parallel-size {parts}: taken as tp over the key heads, all copies of a cache."
        )
    fixed |= launched_formats(flags, notes)
    tokens, sequences = flags.integer("--max-num-batched-tokens", None), flags.integer("--max-num-seqs", None)
    context = flags.integer("--max-model-len", None)
    if tokens is not None:
        fixed["chunk_tokens"] = tokens
    if sequences is not None:
        fixed["max_sequences"] = -(-sequences // max(pp, 1))
    fraction = flags.number("--gpu-memory-utilization", None)
    if fraction is None:
        notes.append(f"--gpu-memory-utilization is left out: {_DEFAULT_FRACTION}, as vLLM 0.32 has it.")
    if tokens is None:
        notes.append("--max-num-batched-tokens is left out: taken as the stack has it.")
    role, drafts = _role(flags), _drafts(flags)
    adapters = launched_adapters(flags, "--max-loras", 1)
    model = flags.text("--model", before[0] if before else "")
    errors, wasteful = _errors(tokens, sequences, context, flags), _wasteful(flags)
    ignored = strangers(flags, _PASSIVE, "vLLM")
    return LaunchedPool(
        "vllm", role, model, fixed, context, _DEFAULT_FRACTION if fraction is None else fraction, False, tuple(errors),
        tuple(wasteful), (*notes, *ignored_note(ignored)), ignored, drafts, adapters,
    )  # fmt: skip


def _object(flags: FlagReader, flag: str) -> dict[str, Any] | None:
    """A JSON object, given whole or key by key (``--speculative-config.method mtp``); None where it is not given.

    Raises:
        ValueError: it is no JSON object.
    """
    text = flags.text(flag, None)
    found = json.loads(text) if text is not None else {}
    if not isinstance(found, dict):
        raise ValueError(text)
    keys = [name for name in flags.flags if name.startswith(f"{flag}.")]
    found |= {key[len(flag) + 1 :].replace("-", "_"): flags.text(key) for key in keys}
    return found if text is not None or keys else None


def _drafts(flags: FlagReader) -> Drafts | None:
    flag, expected = "--speculative-config", "num_speculative_tokens from 1 and a method or model"
    try:
        said = _object(flags, flag)
        tokens = int(said["num_speculative_tokens"]) if said is not None else 0
    except (ValueError, TypeError, KeyError):
        flags.fault(flag, repr(flags.text(flag, "")[:60]), f"a JSON object with {expected}")
        return None
    if said is None:
        return None
    if tokens < 1:
        flags.fault(flag, f"num_speculative_tokens {tokens}", expected)
        return None
    model = str(said.get("model") or "")
    method = str(said.get("method") or ("draft_model" if model else ""))
    if method.endswith("mtp"):  # deepseek_mtp, qwen3_next_mtp, …: the model's own modules under earlier names
        return Drafts("mtp", tokens)
    if method in ("eagle", "eagle3") and model:
        return Drafts("eagle", tokens, model)
    if method == "ngram" or (method == "draft_model" and model):
        return Drafts("ngram", tokens) if method == "ngram" else Drafts("draft", tokens, model)
    flags.fault(flag, f"method {method!r}: not modelled", "mtp, ngram, eagle with its head, or a draft model")
    return None


def _role(flags: FlagReader) -> str:
    flag = "--kv-transfer-config"
    try:
        said = _object(flags, flag)
    except ValueError:
        flags.fault(flag, repr(flags.text(flag, "")[:60]), "a JSON object")
        return ""
    if said is None:
        return "aggregated"
    return {"kv_producer": "prefill", "kv_consumer": "decode"}.get(str(said.get("kv_role")), "")


def _errors(
    tokens: int | None, sequences: int | None, context: int | None, flags: FlagReader
) -> list[tuple[str, str]]:
    """What vLLM refuses before it loads a weight."""
    found = []
    if tokens is not None and sequences is not None and tokens < sequences:
        what = f"max-num-batched-tokens ({tokens:,}) is less than max-num-seqs ({sequences:,})"
        found.append((what, "SchedulerConfig, at the start"))
    whole = flags.present("--no-enable-chunked-prefill")
    if whole and tokens is not None and context is not None and tokens < context:
        what = f"without chunked prefill, max-num-batched-tokens ({tokens:,}) has to hold max-model-len ({context:,})"
        found.append((what, "SchedulerConfig, at the start"))
    return found


def _wasteful(flags: FlagReader) -> list[str]:
    found = []
    if flags.present("--enforce-eager"):
        found.append(
            "--enforce-eager: the host starts every kernel of every iteration; captured graphs are not used."
        )
    if flags.present("--no-enable-chunked-prefill"):
        found.append("--no-enable-chunked-prefill: whole prompts hold up everybody who generates.")
    if flags.present("--no-enable-prefix-caching"):
        found.append("--no-enable-prefix-caching: prompts that begin alike are computed again.")
    return found
