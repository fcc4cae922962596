"""What a user has measured, as the kernels and messages that it was: one record per row, in SI units.

Rows come from CSV files (this module), from the text that nccl-tests prints, and from a PyTorch profiler.
:func:`read_measurements` tells them apart by their content.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from planner.errors import Problem, SpecError
from planner.specs.device_file import DTYPES
from planner.validation.table import Row, Table, Unsupported, read_table

__all__ = [
    "COLLECTIVES",
    "Attention",
    "Measurement",
    "Message",
    "Product",
    "Stream",
    "dtype_named",
    "octaves",
    "read_measurements",
]

COLLECTIVES = {
    "all_reduce": "all_reduce",
    "allreduce": "all_reduce",
    "all_gather": "all_gather",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "all_to_allv": "all_to_all",
    "broadcast": "broadcast",
    "sendrecv": "point_to_point",
    "send_recv": "point_to_point",
}
"""Names of collectives in files, and ours."""

_DTYPES = {
    "float32": "fp32", "float": "fp32", "fp32": "fp32", "tf32": "tf32", "bfloat16": "bf16", "bf16": "bf16", "float16": "fp16",
    "half": "fp16", "fp16": "fp16", "c10::half": "fp16", "c10::bfloat16": "bf16", "fp8": "fp8", "float8_e4m3fn": "fp8",
    "c10::float8_e4m3fn": "fp8", "int8": "int8",
}  # fmt: skip
_CUT = 10  # problems of one file that are named


@dataclass(frozen=True, slots=True)
class Product:
    """``groups`` products of (m, k) by (k, n) in one kernel."""

    m: float
    n: float
    k: float
    groups: float
    dtype: str


@dataclass(frozen=True, slots=True)
class Attention:
    """One fused causal attention, forward or backward; ``window`` 0 is none."""

    batch: float
    heads: float
    kv_heads: float
    queries: float
    keys: float
    head_dim: float
    window: float
    causal: bool
    backward: bool
    dtype: str


@dataclass(frozen=True, slots=True)
class Stream:
    """A memory-bound kernel: bytes read and written."""

    n_bytes: float


@dataclass(frozen=True, slots=True)
class Message:
    """A collective of ``ranks`` ranks, ``per_node`` of them in each node, on ``n_bytes``.

    Bytes are those of the full tensor, for all-to-all and point-to-point what one rank holds.
    """

    kind: str
    ranks: int
    per_node: int
    n_bytes: float


Work: TypeAlias = Product | Attention | Stream | Message


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds that a kernel or a message took.

    Attributes:
        where: file and line, for messages.
        work: what was measured.
        seconds: how long it took.
        alone: it was repeated by itself (a microbenchmark), not met in a training step.
        accelerator: what the file calls the device; empty where it does not say.
    """

    where: str
    work: Work
    seconds: float
    alone: bool = True
    accelerator: str = ""

    @property
    def family(self) -> str:
        """The kind of work: ``product``, ``attention``, ``attention backward``, ``stream``, or the collective."""
        if isinstance(self.work, Message):
            return self.work.kind
        backward = isinstance(self.work, Attention) and self.work.backward
        return type(self.work).__name__.lower() + (" backward" if backward else "")

    @property
    def group(self) -> Hashable:
        """What rows must share to be left out together: the shape within an octave, or the curve that a message lies on."""
        work = self.work
        if isinstance(work, Product):
            return "product", octaves(work.m, work.n, work.k, work.groups)
        if isinstance(work, Attention):
            shape = octaves(work.batch, work.heads, work.queries, work.keys)
            return "attention", shape, work.backward
        if isinstance(work, Stream):
            return "stream", octaves(work.n_bytes)
        return work.kind, work.ranks, work.per_node, octaves(work.n_bytes)[0] // 2


def octaves(*sizes: float) -> tuple[int, ...]:
    """Sizes to the nearest power of two: what a neighbouring row shares.

    >>> octaves(4096, 5000)
    (12, 12)
    """
    return tuple(round(math.log2(max(size, 1.0))) for size in sizes)


def dtype_named(text: str) -> str | None:
    """Our name of a dtype; None where it is none that kernels are priced in."""
    name = text.strip().lower()
    found = _DTYPES.get(name, name)
    return found if found in DTYPES else None


def read_measurements(path: str | Path, dtype: str | None = None) -> list[Measurement]:
    """The measurements in a file: CSV, output of nccl-tests, a profiler's table, or its Chrome trace.

    Args:
        path: the file.
        dtype: format of products and attention where the file does not state it (a profiler's table).

    Raises:
        SpecError: it cannot be read, is none of these, holds nothing that can be priced, or has a wrong cell
            (all problems at once).
    """
    from planner.calibration.nccl_tests import is_nccl_tests, read_nccl_tests
    from planner.calibration.profiler import is_profile, read_profile

    path = Path(path)
    text = _text(path)
    if is_nccl_tests(text):
        found = read_nccl_tests(text, str(path))
    elif is_profile(text):
        found = read_profile(text, str(path), dtype)
    else:
        found = _from_table(read_table(path), str(path))
    if not found:
        raise SpecError(Problem(str(path), "holds no kernel or collective that can be priced", _FORMS))
    return found


_FORMS = "an operators CSV, output of nccl-tests, or a PyTorch profiler's table or trace with input shapes"


def _text(path: Path) -> str:
    """The file's text; what is wrong with it is said where it is read as a table."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError):
        read_table(path)  # raises with the reason
        raise


# -- CSV: one reader per form, which its columns tell ------------------------------------------------------------------


def _from_table(table: Table, where: str) -> list[Measurement]:
    reader = _reader(set(table.columns))
    if reader is None:
        found = f"columns {', '.join(table.columns)[:200]}"
        raise SpecError(
            Problem(where, found, _FORMS, "See docs/calibration.md for the columns of each form.")
        )
    rows: list[Measurement] = []
    problems: list[Problem] = []
    for row in table.rows:
        place = f"{where}:{row.line}"
        if row.text("quiet").lower() == "false":
            continue  # other processes disturbed it, as the one who measured noticed
        try:
            work = reader(row)
            if work is not None:
                rows.append(Measurement(place, work, _seconds(row), accelerator=row.text("accelerator")))
        except Unsupported as error:
            problems.append(Problem(place, str(error), "a positive number"))
    if problems:
        raise SpecError(problems[:_CUT])
    return rows


def _reader(columns: set[str]) -> Callable[[Row], Work | None] | None:
    for needed, reader in _READERS:
        if needed <= columns and columns & {"latency_ms", "latency_us", "time_us"}:
            return reader
    return None


def _product(row: Row) -> Work | None:
    """``m``, ``n``, ``k`` and ``dtype``; rows of other operators, or of formats that are none of ours, are passed over."""
    dtype = dtype_named(row.text("dtype"))
    if row.text("op") not in ("", "gemm", "matmul", "mm", "addmm", "bmm", "linear") and not row.text("n"):
        return None
    if dtype is None:
        return None
    m, n, k = (_size(row, name) for name in ("m", "n", "k"))
    return Product(m, n, k, _size(row, "groups", 1.0), dtype)


def _attention(row: Row) -> Work | None:
    dtype = dtype_named(row.text("attn_dtype") or row.text("dtype"))
    if dtype is None:
        return None
    keys = _size(row, "kv_len_total")
    return Attention(
        batch=_size(row, "batch_size"), heads=_size(row, "num_heads"), kv_heads=_size(row, "num_key_value_heads"),
        queries=_size(row, "q_len"), keys=keys, head_dim=_size(row, "head_dim"), window=row.number("window_size") or 0.0,
        causal=row.truth("causal") is not False, backward=(row.number("passes") or 1.0) > 1.0, dtype=dtype,
    )  # fmt: skip


def _stream(row: Row) -> Work:
    return Stream(_size(row, "bytes_moved"))


def _message(row: Row) -> Work | None:
    kind = COLLECTIVES.get(row.text("collective").lower())
    ranks, nodes = int(_size(row, "n_devices")), int(_size(row, "n_nodes", 1.0))
    return (
        None
        if kind is None or ranks < 2
        else Message(kind, ranks, max(ranks // nodes, 1), _size(row, "size_bytes"))
    )


def _message_by_node(row: Row) -> Work | None:
    kind = COLLECTIVES.get(row.text("collective").lower())
    ranks, per_node = int(_size(row, "num_workers")), int(_size(row, "devices_per_node"))
    return None if kind is None or ranks < 2 else Message(kind, ranks, per_node, _size(row, "size_bytes"))


_READERS: tuple[tuple[set[str], Callable[[Row], Work | None]], ...] = (
    ({"collective", "n_devices", "size_bytes"}, _message),
    ({"collective", "num_workers", "devices_per_node", "size_bytes"}, _message_by_node),
    ({"q_len", "kv_len_total", "num_heads", "num_key_value_heads", "head_dim", "batch_size"}, _attention),
    ({"bytes_moved"}, _stream),
    ({"m", "n", "k", "dtype"}, _product),
)


def _size(row: Row, column: str, default: float | None = None) -> float:
    value = row.number(column)
    if value is None and default is not None:
        return default
    if not value:
        raise Unsupported(f"{column} is {row.text(column)!r}, no positive number")
    return value


def _seconds(row: Row) -> float:
    for column, unit_s in (("latency_ms", 1e-3), ("latency_us", 1e-6), ("time_us", 1e-6)):
        if column in row.cells:
            return _size(row, column) * unit_s
    raise Unsupported("no time is given")
