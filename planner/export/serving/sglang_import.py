"""A launch of SGLang as one pool: a script with ``sglang.launch_server``, or the YAML of its ``--config``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import Problem, SpecError
from planner.export.flags import FlagReader
from planner.export.launched import ignored_note, names_in
from planner.export.serving.launched import (
    FORMATS,
    Drafts,
    LaunchedPool,
    launched_adapters,
    read_flags,
    two_batches,
)

__all__ = ["read_sglang"]

_SHORT = {
    "--tp": "--tp-size", "--tensor-parallel-size": "--tp-size", "--pp": "--pp-size", "--pipeline-parallel-size": "--pp-size",
    "--dp": "--dp-size", "--data-parallel-size": "--dp-size", "--ep": "--ep-size", "--expert-parallel-size": "--ep-size",
    "--attention-data-parallel-size": "--attn-dp-size", "--model": "--model-path",
}  # fmt: skip
_UNMODELLED: Mapping[str, str] = {
    "--moe-dp-size": "experts in groups",
    "--enable-hierarchical-cache": "caches on the host",
}
_REMOVED = {
    "--cuda-graph-max-bs": "--cuda-graph-max-bs-decode",
    "--enable-ep-moe": "--ep-size",
    "--enable-deepep-moe": "--moe-a2a-backend deepep",
}
"""Flags of earlier versions, which 0.5.23 refuses → what took their place."""
_PASSIVE = names_in(
    "--host --port --served-model-name --api-key --trust-remote-code --load-format --tokenizer-path --nnodes --node-rank "
    "--dist-init-addr --log-level --watchdog-timeout --skip-tokenizer-init --disaggregation-transfer-backend --deepep-mode "
    "--disaggregation-bootstrap-port --disaggregation-ib-device --tool-call-parser --reasoning-parser --chat-template "
    "--schedule-policy --schedule-conservativeness --random-seed --page-size --attention-backend --max-prefill-tokens"
)


def read_sglang(path: str | Path) -> LaunchedPool:
    """The pool that a launch of SGLang describes.

    Raises:
        SpecError: the file cannot be read, flags are wrong or ask for what is not modelled; all at once.
    """
    flags, _, notes = read_flags(
        path,
        "a script with python -m sglang.launch_server, or the YAML of its --config",
        ("sglang.launch_server",),
        _SHORT,
    )
    for flag, what in _UNMODELLED.items():
        if flags.present(flag) and flags.flags[flag] != ["1"]:
            flags.fault(flag, f"{what}: not modelled")
    ranks, pp, ep = (flags.integer(f"--{name}-size", 1) for name in ("tp", "pp", "ep"))
    replicas, attention = flags.integer("--dp-size", 1), flags.integer("--attn-dp-size", 1)
    if flags.present("--enable-dp-attention"):
        attention, replicas = max(attention, replicas), 1
    shared = flags.integer("--attn-cp-size", 1)
    if ranks % (attention * shared):
        found = f"{attention}" + (f" beside --attn-cp-size {shared}" if shared > 1 else "")
        flags.fault("--attn-dp-size", found, f"a divisor of --tp-size ({ranks})")
        attention = shared = 1
    fixed: dict[str, Any] = {"tp": ranks // (attention * shared), "pp": pp, "dp": attention, "ep": ep}
    if shared > 1:
        fixed |= {"cp": shared, "prompt_ranks": "all_gather"}
    if shared > 1 and not flags.present("--enable-prefill-cp"):
        flags.fault("--attn-cp-size", "without --enable-prefill-cp", "both, or neither")
    parts = flags.integer("--dcp-size", 1)
    if parts > 1:
        fixed["cache_copies"] = "dcp"
        notes.append(f"--dcp-size {parts}: taken as the ranks of an attention group, all copies of a latent.")
    if replicas > 1:
        notes.append(
            f"--dp-size {replicas} without attention ranks: {replicas} replicas of {ranks * pp} devices."
        )
    exchange = flags.text("--moe-a2a-backend", "none")
    fixed["experts"] = "gathered" if exchange == "none" or attention * shared == 1 else "exchanged"
    fixed["micro_batches"] = two_batches(flags, "--enable-two-batch-overlap", fixed, notes)
    fixed["cache"] = "fp8" if str(flags.text("--kv-cache-dtype", "auto")).startswith("fp8") else "bf16"
    dtype, quantization = flags.text("--dtype", "auto"), flags.text("--quantization", None)
    if quantization in FORMATS:
        fixed["weights"] = FORMATS[quantization]
    elif quantization is not None:
        notes.append(f"--quantization {quantization}: the weights are taken as they are published.")
    elif dtype in ("half", "float16"):
        fixed["weights"] = "fp16"
    chunk, sequences = (
        flags.integer("--chunked-prefill-size", None),
        flags.integer("--max-running-requests", None),
    )
    if chunk is not None and chunk > 0:
        fixed["chunk_tokens"] = max(chunk // attention, 1)
    if sequences is not None:
        fixed["max_sequences"] = max(-(-sequences // (attention * pp)), 1)
    fraction = flags.number("--mem-fraction-static", None)
    if fraction is None:
        notes.append("--mem-fraction-static is left out: taken as the stack has it.")
    if chunk is None:
        notes.append("--chunked-prefill-size is left out: taken as the stack has it.")
    errors = [
        (f"{flag} is gone in SGLang 0.5.23: {now}", "its parser, before anything starts")
        for flag, now in _REMOVED.items()
        if flags.present(flag)
    ]
    role = flags.choice(
        "--disaggregation-mode", "null", {"null": "aggregated", "prefill": "prefill", "decode": "decode"}
    )
    context = flags.integer("--context-length", None)
    wasteful, drafts = _wasteful(flags.flags, chunk), _drafts(flags)
    adapters = launched_adapters(flags, "--max-loras-per-batch", 8)
    flags.read |= (
        _PASSIVE
        | {"--enable-prefill-cp", "--cp-strategy", "--moe-dense-tp-size"}
        | {"--disable-cuda-graph", "--disable-radix-cache"}
    )
    model = flags.text("--model-path", "")
    flags.raise_if_any()
    ignored = tuple(flags.unread())
    if flags.flags and len(ignored) == len(flags.flags):
        found = f"none of {', '.join(ignored[:5])} is an option of SGLang"
        raise SpecError(Problem(str(path), found, "a launch of SGLang"))
    return LaunchedPool(
        "sglang", role, model, fixed, context, fraction, True, tuple(errors), tuple(wasteful),
        (*notes, *ignored_note(ignored)), ignored, drafts, adapters,
    )  # fmt: skip


def _drafts(flags: FlagReader) -> Drafts | None:
    """Drafts in a chain; EAGLE without a draft's path is the model's own prediction modules."""
    flag, path = "--speculative-algorithm", "--speculative-draft-model-path"
    algorithm, model = str(flags.text(flag, "")).upper(), str(flags.text(path, ""))
    steps, wide = flags.integer("--speculative-num-steps", None), flags.integer("--speculative-eagle-topk", 1)
    checked = flags.integer("--speculative-num-draft-tokens", None)
    if not algorithm:
        return None
    if wide != 1:
        flags.fault("--speculative-eagle-topk", f"{wide}: trees of drafts are not modelled", "1")
    tokens = steps if steps is not None else None if checked is None else checked - 1
    if tokens is None or tokens < 1:
        found = "is missing" if tokens is None else f"{tokens} drafted tokens"
        flags.fault("--speculative-num-steps", found, "the drafted tokens of a step, from 1")
        return None
    if algorithm == "NGRAM":
        return Drafts("ngram", tokens)
    if algorithm in ("NEXTN", "EAGLE") and not model:
        return Drafts("mtp", tokens)
    if algorithm in ("EAGLE", "EAGLE3") and model:
        return Drafts("eagle", tokens, model)
    if algorithm == "STANDALONE" and model:
        return Drafts("draft", tokens, model)
    flags.fault(
        flag,
        f"{algorithm}{' with a draft of its own' * bool(model)}: not modelled",
        "EAGLE, NEXTN, NGRAM or STANDALONE",
    )
    return None


def _wasteful(flags: Mapping[str, list[str]], chunk: int | None) -> list[str]:
    found = []
    if "--disable-cuda-graph" in flags:
        found.append("--disable-cuda-graph: the host starts every kernel of every iteration.")
    if chunk == -1:
        found.append("--chunked-prefill-size -1: whole prompts hold up everybody who generates.")
    if "--disable-radix-cache" in flags:
        found.append("--disable-radix-cache: prompts that begin alike are computed again.")
    return found
