"""Finds a model by name, file or folder, and loads it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from planner.errors import Problem, SpecError, did_you_mean
from planner.specs.library import canonical, models_folder, resolve
from planner.specs.model import Model
from planner.specs.model_file import model_from_table
from planner.specs.reader import read_file

__all__ = ["list_models", "load_model", "named_precision"]

_ALIASES = "aliases"
_SQUASH = re.compile(r"[^a-z0-9.]+")
# What hubs add to a model's name without changing its shape: releases, precisions, dates, versions.
_RELEASE = re.compile(
    r"meta|nvidia|\d+k|instruct|it|chat|base|pt|hf"
    r"|bf16|fp16|fp8|fp4|nvfp4|mxfp4|awq|gptq|int4|int8|bnb|4bit|quantized"
)
_DATE = re.compile(r"2[2-9](0[1-9]|1[0-2])|(0[1-9]|1[0-2])([0-2]\d|3[01])")
_VERSION = re.compile(r"v\d+(\.\d+)*")


def list_models() -> list[str]:
    """Names of the shipped models, sorted; reads no file.

    Raises:
        SpecError: the installation lacks its data.
    """
    return sorted(path.stem for path in models_folder().glob("*.toml") if path.stem != _ALIASES)


def load_model(name_or_path: str | Path) -> Model:
    """A model by shipped name, by hub id, or from a file.

    Args:
        name_or_path: a shipped name or a hub id in any case (``"llama3.1-405b"``,
            ``"meta-llama/Llama-3.1-405B"``), a ``.toml`` file, a Hugging Face ``config.json``, or its folder.

    Raises:
        SpecError: no such model or file, or what is wrong inside the file, all at once.

    >>> load_model("openai-community/GPT2-XL").n_layers
    48
    """
    text = str(name_or_path)
    if not text.strip():
        raise SpecError(Problem("model", "is empty", "a shipped model's name or a file"))
    shipped = list_models()
    if not isinstance(name_or_path, Path):
        name = _shipped_name(text, shipped)
        if name is not None:
            return _from_file(models_folder() / f"{name}.toml")
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            path = path / "config.json"
        found = path.suffix.lower() in (".toml", ".json") or path.is_file()
    except (OSError, ValueError, RuntimeError):  # not a path at all: too long, a null byte, no such user
        found = False
    if found:
        return _from_file(path)
    hint = did_you_mean(canonical(text.rsplit("/", 1)[-1])[:80], shipped)
    raise SpecError(
        Problem(
            "model",
            f"{text[:80]!r} is not a shipped model or a file",
            "a shipped name, a .toml file, a config.json or a folder that holds one",
            hint or "See the list of shipped models.",
        )
    )


def squash(name: str) -> str:
    """A name without case and separators, for comparison.

    >>> squash("Llama-3.1-405B")
    'llama3.1405b'
    """
    return _SQUASH.sub("", name.lower())


def _shipped_name(text: str, shipped: Collection[str]) -> str | None:
    """The shipped model that a name means: as spelled, by alias, then with ever fewer words of the hub's."""
    name = resolve(text, shipped, {})
    if name is not None or text.lower().endswith((".toml", ".json")):
        return name
    by_squashed = {squash(known): known for known in shipped}
    aliases = _aliases()
    words = canonical(text.rstrip("/").rsplit("/", 1)[-1]).split("-")
    attempts = [[text], words]
    for noise in (_RELEASE, _DATE, _VERSION):
        words = [word for word in words if not noise.fullmatch(word)]
        attempts.append(words)
    for number, attempt in enumerate(attempts):
        key = squash("".join(attempt))
        match = by_squashed.get(key) or aliases.get(key)
        unversioned = number == len(attempts) - 1  # is no name of a model that is of another version
        if match in shipped and not (unversioned and _other_version(attempts[1], str(match).split("-"))):
            return match
    return None


def _other_version(asked: Sequence[str], found: Sequence[str]) -> bool:
    """Whether both names state a version, and not the same."""
    versions = [{word for word in words if _VERSION.fullmatch(word)} for words in (asked, found)]
    return all(versions) and versions[0] != versions[1]


def _aliases() -> Mapping[str, str]:
    """Other names of shipped models, squashed."""
    path = models_folder() / f"{_ALIASES}.toml"
    if not path.is_file():
        return {}
    return {squash(alias): name for name, row in read_file(path).items() for alias in row}


def _from_file(path: Path) -> Model:
    data = read_file(path)
    if path.suffix.lower() == ".json":
        from planner.specs.huggingface import model_from_config

        return model_from_config(data, str(path))
    return model_from_table(data, path.stem, str(path))


_PRECISIONS = {
    "fp8": "fp8", "fp4": "nvfp4", "nvfp4": "nvfp4", "mxfp4": "w4a16_mxfp4", "awq": "int4_wo", "gptq": "int4_wo",
    "int4": "int4_wo", "4bit": "int4_wo", "int8": "int8_wo",
}  # fmt: skip


def named_precision(name: str) -> str | None:
    """The number format of weights that a hub's name ends in; None where it says none.

    >>> named_precision("Qwen/Qwen3-32B-FP8"), named_precision("llama3.1-70b")
    ('fp8', None)
    """
    words = canonical(name.rstrip("/").rsplit("/", 1)[-1]).split("-")[1:]
    return next((_PRECISIONS[word] for word in words if word in _PRECISIONS), None)
