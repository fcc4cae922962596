"""What an engine's launch says, once it is read back: one pool, and the command line or the file that it was found in."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planner.errors import Problem, SpecError
from planner.export.flags import FlagReader, parse_flags
from planner.export.launched import read_text
from planner.export.shell import read_script
from planner.export.yaml_text import read_yaml
from planner.specs.traffic import ADAPTER_RANK

__all__ = [
    "Drafts",
    "LaunchedPool",
    "launched_adapters",
    "launched_formats",
    "read_flags",
    "strangers",
    "two_batches",
]

_FORMATS: Mapping[str, str] = {
    "fp8": "fp8", "modelopt": "fp8", "modelopt_fp8": "fp8", "modelopt_fp4": "nvfp4", "nvfp4": "nvfp4", "mxfp4": "w4a16_mxfp4",
    "awq": "int4_wo", "awq_marlin": "int4_wo", "gptq": "int4_wo", "gptq_marlin": "int4_wo",
}  # fmt: skip
"""What an engine's option for the weights' format says → the planner's name."""
_MAX_PARTS = 1000  # of a map that is one option


@dataclass(frozen=True, slots=True)
class Drafts:
    """Speculative decoding as a launch asks for it.

    Attributes:
        method: one of :data:`planner.specs.speculation.METHODS`.
        tokens: drafted tokens per step.
        model: the smaller model of ``draft``, or the head of ``eagle``, as the launch names it.
    """

    method: str
    tokens: int
    model: str = ""


@dataclass(frozen=True, slots=True)
class LaunchedPool:
    """What a launch says.

    Attributes:
        launcher: key of :data:`planner.export.serving.bare.ENGINES`.
        role: ``aggregated``, ``prefill`` or ``decode``; empty for a pool of a pair that does not say which.
        model: what it serves, as it says; empty where it does not.
        fixed: knobs of ``ServeProblem.fixed``: degrees, formats, ``chunk_tokens``, and ``max_sequences`` per attention rank and
            stage.
        context_tokens: longest context that it accepts; None: the model's.
        memory_fraction: what it may take of a device's memory; None: the stack's.
        static: whether that is of weights and caches alone, without activations and what the process holds besides.
        errors: what the engine refuses, as (sentence, the layer that refuses it).
        wasteful: what costs time or memory for nothing, one sentence each.
        notes: what was taken for granted, left out or ignored, one sentence each.
        ignored: flags that were not understood, or say nothing about time and memory.
        drafts: who drafts tokens, and how many; None: nobody.
        adapters: slots for low-rank adapters beside the model, and their largest rank; None: none.
    """

    launcher: str
    role: str
    model: str
    fixed: Mapping[str, Any]
    context_tokens: int | None
    memory_fraction: float | None
    static: bool
    errors: tuple[tuple[str, str], ...] = ()
    wasteful: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    ignored: tuple[str, ...] = field(default=())
    drafts: Drafts | None = None
    adapters: tuple[int, int] | None = None


def launched_adapters(flags: FlagReader, slots: str, default: int) -> tuple[int, int] | None:
    """Slots for low-rank adapters (the flag ``slots``) and their largest rank, of a launch with ``--enable-lora``."""
    asked = flags.integer(slots, default), flags.integer("--max-lora-rank", ADAPTER_RANK)
    return asked if flags.present("--enable-lora") else None


def launched_formats(flags: FlagReader, notes: list[str]) -> dict[str, str]:
    """Formats of caches and of weights, as far as the launch says any."""
    found = {"cache": "fp8" if str(flags.text("--kv-cache-dtype", "auto")).startswith("fp8") else "bf16"}
    dtype, quantization = flags.text("--dtype", "auto"), flags.text("--quantization", None)
    if quantization is None:
        return found | ({"weights": "fp16"} if dtype in ("half", "float16") else {})
    if quantization in _FORMATS:
        return found | {"weights": _FORMATS[quantization]}
    notes.append(f"--quantization {quantization}: the weights are taken as they are published.")
    return found


def strangers(flags: FlagReader, passive: Collection[str], engine: str) -> tuple[str, ...]:
    """Flags that nobody read, once all others are: what was not understood.

    Raises:
        SpecError: flags are wrong, or none of them is the engine's.
    """
    flags.read |= set(passive)
    flags.raise_if_any()
    found = tuple(flags.unread())
    if flags.flags and len(found) == len(flags.flags):
        what = f"none of {', '.join(found[:5])} is an option of {engine}"
        raise SpecError(Problem(flags.where, what, f"a launch of {engine}"))
    return found


def two_batches(flags: FlagReader, flag: str, fixed: Mapping[str, Any], notes: list[str]) -> str:
    """In how many parts a launch runs a batch, where ``flag`` asks for two; ``notes`` says where that means nothing."""
    if flags.present(flag) and fixed["experts"] != "exchanged":
        notes.append(f"{flag} without an exchange of tokens to experts hides nothing: one batch.")
    return "2" if flags.present(flag) and fixed["experts"] == "exchanged" else "1"


def read_flags(
    path: str | Path, expected: str, starts: Collection[str], short: Mapping[str, str]
) -> tuple[FlagReader, list[str], list[str]]:
    """Flags of a YAML of options, or of the first command of a shell script that starts the engine.

    Args:
        path: the file.
        expected: what it should hold, for problems.
        starts: words, one of which the engine's command contains.
        short: other spellings of flags → their own.

    Returns:
        The flags, with dashes; the words before the first of them; and what could not be decided.

    Raises:
        SpecError: the file cannot be read, or starts no such engine.
    """
    where = str(path)
    if Path(path).suffix.lower() in (".yaml", ".yml", ".json"):
        return FlagReader(_from_map(read_yaml(path, expected), where), where), [], []
    script = read_script(read_text(path, expected), where)
    for command in script.commands:
        words = list(command.words)
        begin = next((index for index, word in enumerate(words) if word in starts), None)
        if begin is None:
            continue
        words = [short.get(word, word) for word in words[begin + 1 :]]
        first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
        flags = {_dashed(flag): values for flag, values in parse_flags(words[first:]).items()}
        flags = {short.get(flag, flag): values for flag, values in flags.items()}
        for config in flags.pop("--config", []):
            below = _from_map(read_yaml(Path(path).parent / config, expected), config)
            flags = below | flags  # what the command says overrules the file
        return FlagReader(flags, where), words[:first], list(script.notes)
    raise SpecError(Problem(where, f"starts no {' or '.join(starts)}", expected))


def _dashed(flag: str) -> str:
    return flag.replace("_", "-")


def _from_map(data: Mapping[str, Any], where: str) -> dict[str, list[str]]:
    """Options of a file as flags; a switch that is false is as if it were not there.

    Raises:
        SpecError: a value is no option's: lists of lists, or maps that go on and on.
    """
    found: dict[str, list[str]] = {}
    for key, value in data.items():
        flag = "--" + _dashed(str(key).lstrip("-"))
        if not _is_option(value):
            expected = "a value, a list of values, or a small map"
            raise SpecError(Problem(f"{where}: {key}", "is nested beyond any option", expected))
        if value is True:
            found[flag] = []
        elif isinstance(value, Mapping):
            found[flag] = [json.dumps(value, default=str)]
        elif isinstance(value, list):
            found[flag] = [str(item) for item in value]
        elif value is not False and value is not None:
            found[flag] = [str(value)]
    return found


def _is_option(value: Any) -> bool:
    """Whether a value is plain, a list of plain ones, or a map whose parts are few (aliases repeat what they name)."""
    if isinstance(value, list):
        return not any(isinstance(item, list | Mapping) for item in value)
    parts, left = [value], _MAX_PARTS
    while parts:
        part = parts.pop()
        left -= 1
        if left < 0:
            return False
        if isinstance(part, Mapping):
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    return True
