"""A launch of SGLang as one pool: a script with ``sglang.launch_server``, or the YAML of its ``--config``."""

from __future__ import annotations

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
    "--schedule-policy --schedule-conservativeness --random-seed --page-size --attention-backend --max-prefill-tokens "
    "--enable-prefill-cp --cp-strategy --moe-dense-tp-size"
)


def read_sglang(path: str | Path) -> LaunchedPool:
    """The pool that a launch of SGLang describes.

    Raises:
        SpecError: the file cannot be read, flags are wrong or ask for what is not modelled; all at once.
    """
    expected = "a script with python -m sglang.launch_server, or the YAML of its --config"
    flags, _, notes = read_flags(path, expected, ("sglang.launch_server",), _SHORT)
    flags.refuse(_UNMODELLED, idle=("1",))
    fixed: dict[str, Any] = _ranks(flags, notes)
    fixed |= launched_formats(flags, notes) | _batches(flags, fixed, notes)
    roles = {"null": "aggregated", "prefill": "prefill", "decode": "decode"}
    role = flags.choice("--disaggregation-mode", "null", roles)
    fraction, context = flags.number("--mem-fraction-static", None), flags.integer("--context-length", None)
    if fraction is None:
        notes.append("--mem-fraction-static is left out: taken as the stack has it.")
    wasteful, drafts = _wasteful(flags), _drafts(flags)
    adapters = launched_adapters(flags, "--max-loras-per-batch", 8)
    model = flags.text("--model-path", "")
    errors = [
        (f"{flag} is gone in SGLang 0.5.23: {now}", "its parser, before anything starts")
        for flag, now in _REMOVED.items()
        if flags.present(flag)
    ]
    ignored = strangers(flags, _PASSIVE, "SGLang")
    return LaunchedPool(
        "sglang", role, model, fixed, context, fraction, True, tuple(errors), tuple(wasteful),
        (*notes, *ignored_note(ignored)), ignored, drafts, adapters,
    )  # fmt: skip


def _ranks(flags: FlagReader, notes: list[str]) -> dict[str, Any]:
    """Degrees, of which attention has its own: its ranks share requests (dp), or a prompt's tokens (cp)."""
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
        text = f"{replicas} replicas of {ranks * pp} devices"
        notes.append(f"--dp-size {replicas} without attention ranks: {text}.")
    exchange = flags.text("--moe-a2a-backend", "none")
    if exchange != "none" and ep != ranks:
        # SGLang's own adjustment (srt/arg_groups/overrides.py, 0.5.23).
        fixed["ep"] = ranks
        notes.append(
            f"--moe-a2a-backend {exchange} spreads experts over all {ranks} ranks, whatever --ep-size says."
        )
    fixed["experts"] = "gathered" if exchange == "none" or attention * shared == 1 else "exchanged"
    fixed["micro_batches"] = two_batches(flags, "--enable-two-batch-overlap", fixed, notes)
    return fixed


def _batches(flags: FlagReader, ranks: Mapping[str, Any], notes: list[str]) -> dict[str, int]:
    """Tokens of an iteration and sequences, of each attention rank (and stage); SGLang counts those of all together."""
    chunk = flags.integer("--chunked-prefill-size", None)
    sequences = flags.integer("--max-running-requests", None)
    found = {}
    if chunk is None:
        notes.append("--chunked-prefill-size is left out: taken as the stack has it.")
    elif chunk > 0:
        found["chunk_tokens"] = max(chunk // ranks["dp"], 1)
    if sequences is not None:
        found["max_sequences"] = max(-(-sequences // (ranks["dp"] * ranks["pp"])), 1)
    return found


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


def _wasteful(flags: FlagReader) -> list[str]:
    found = []
    if flags.present("--disable-cuda-graph"):
        found.append("--disable-cuda-graph: the host starts every kernel of every iteration.")
    if flags.flags.get("--chunked-prefill-size") == ["-1"]:
        found.append("--chunked-prefill-size -1: whole prompts hold up everybody who generates.")
    if flags.present("--disable-radix-cache"):
        found.append("--disable-radix-cache: prompts that begin alike are computed again.")
    return found
