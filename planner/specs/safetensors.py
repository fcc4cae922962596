"""Exact sizes of published weights: the headers of safetensors files, or the index that lists them.

A header is eight bytes that say how long it is, then JSON: for each tensor its dtype, its shape and where its bytes lie
(safetensors, ``docs/source/metadata_parsing``). Only headers are read, never the weights.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.errors import Problem, SpecError

__all__ = ["Weights", "read_weights"]

INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"
_MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit
_ELEMENT_BYTES: Mapping[str, float] = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2, "F8_E4M3": 1,
    "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1, "F4": 0.5,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weights:
    """What is stored.

    Attributes:
        tensors: how many.
        elements: of all tensors; None where only an index was there, which lists bytes.
        n_bytes: of all tensors.
        elements_by_dtype: the same by dtype.
        files: whose headers were read; 0 where only an index was there.
    """

    tensors: int
    elements: int | None
    n_bytes: int
    elements_by_dtype: Mapping[str, int]
    files: int


def read_weights(path: str | Path) -> Weights | None:
    """Sizes of the weights in a folder, in one safetensors file, or behind an index.

    Args:
        path: the folder or file; of an index, the shards beside it are read as far as all of them are there.

    Returns:
        None where the folder holds no weights.

    Raises:
        SpecError: a file is missing or malformed.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _from_headers([path])
    index = path / INDEX if path.is_dir() else path
    if index.name.endswith(".index.json") and index.exists():
        return _from_index(index)
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    # Some folders hold the same weights a second time under other names (consolidated.safetensors).
    own = [file for file in found if file.name.startswith("model")]
    return _from_headers(own or found) if found else None


def _from_index(index: Path) -> Weights:
    where = str(index)
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
        names = data["weight_map"]
        shards = [index.parent / name for name in sorted(set(names.values()))]
        n_bytes = int(data.get("metadata", {}).get("total_size", 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        expected = "an index of safetensors files (metadata.total_size, weight_map)"
        raise SpecError(Problem(where, f"is no index ({type(error).__name__}: {error})", expected)) from None
    if shards and all(shard.exists() and not _is_pointer(shard) for shard in shards):
        return _from_headers(shards)
    if n_bytes <= 0:
        raise SpecError(
            Problem(where, "has no metadata.total_size, and its shards are not beside it", "either")
        )
    return Weights(len(names), None, n_bytes, {}, 0)


def _from_headers(paths: list[Path]) -> Weights:
    tensors, n_bytes, elements = 0, 0.0, Counter[str]()
    for path in paths:
        for dtype, shape in _tensors(path):
            count = math.prod(shape)
            tensors += 1
            elements[dtype] += count
            n_bytes += count * _ELEMENT_BYTES[dtype]
    return Weights(tensors, sum(elements.values()), round(n_bytes), dict(elements), len(paths))


def _is_pointer(path: Path) -> bool:
    """Whether a file only says where its content lies, as Git LFS leaves it until it is asked for."""
    with path.open("rb") as stream:
        return stream.read(len(_POINTER)) == _POINTER


def _tensors(path: Path) -> Iterator[tuple[str, list[int]]]:
    """Dtype and shape of every tensor of a file."""
    where, expected = str(path), "a safetensors file"
    try:
        with path.open("rb") as stream:
            head = stream.read(len(_POINTER))
            if head == _POINTER:
                raise SpecError(
                    Problem(where, "is a pointer of Git LFS, not the weights", expected, "git lfs pull")
                )
            stream.seek(0)
            size = int.from_bytes(stream.read(8), "little")
            if not 2 <= size <= _MAX_HEADER_BYTES:
                raise SpecError(Problem(where, f"says that its header has {size} bytes", expected))
            header: Any = json.loads(stream.read(size))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(Problem(where, f"has no header that can be read ({error})", expected)) from None
    if not isinstance(header, dict):
        raise SpecError(Problem(where, f"has a {type(header).__name__} as header", expected))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = entry["dtype"], [int(size) for size in entry["shape"]]
        except (KeyError, TypeError, ValueError):
            raise SpecError(Problem(f"{where}: {name}", "has no dtype or no shape", expected)) from None
        if dtype not in _ELEMENT_BYTES:
            raise SpecError(
                Problem(f"{where}: {name}", f"dtype {dtype!r}", f"one of {', '.join(_ELEMENT_BYTES)}")
            )
        yield dtype, shape
