"""What a PyTorch profiler exports, as measured kernels: a ``key_averages`` table, or a Chrome trace.

Both need ``record_shapes=True``; the table is that of ``key_averages(group_by_input_shape=True)`` with ``row_limit=-1``. A call
is a product, an attention, an element-wise kernel or a collective by the name of its operator, and all calls of one shape are
one measurement, their median (in a table: their mean). Where a device's kernels are in the trace they are the time, else
the operator's own on the CPU. What a table does not say is asked for (``dtype``) or as in the training of a language model
(attention is causal).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from planner.calibration.measurements import (
    COLLECTIVES,
    Attention,
    Measurement,
    Message,
    Product,
    Stream,
    Work,
    dtype_named,
)
from planner.costs.precision import dtype_bytes
from planner.errors import Problem, SpecError

__all__ = ["is_profile", "read_profile"]

_ELEMENTWISE = frozenset(
    f"aten::{name}" for name in ("add", "add_", "mul", "mul_", "copy_", "gelu", "silu", "relu", "native_layer_norm", "_softmax")
)  # fmt: skip
_READS_ITS_RESULT = frozenset(("aten::copy_",))  # the result is among the inputs
_SDPA = re.compile(
    r"aten::_scaled_dot_product_(flash|efficient|cudnn|fused)_attention(_for_cpu)?(_backward)?$"
)
_NEEDS_SHAPES = "operators with their input shapes: record_shapes=True"
_UNITS_S = {"us": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "ns": 1e-9}
_TIME = re.compile(r"([\d.]+)\s*(ns|us|μs|ms|s)$")


def is_profile(text: str) -> bool:
    """Whether the text is a profiler's table or trace."""
    head = text.lstrip()[:1]
    return (head in ("{", "[") and "traceEvents" in text) or ("Self CPU" in text and "# of Calls" in text)


def read_profile(text: str, where: str, dtype: str | None = None) -> list[Measurement]:
    """Kernels of a table or a trace.

    Raises:
        SpecError: it is malformed, has no shapes, or does not say the dtype and none is given.
    """
    if text.lstrip()[:1] not in ("{", "["):
        return _collected(_from_table(text, where, dtype), where)
    try:
        return _collected(_from_trace(text, where, dtype), where)
    except (
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # a field that is there, but holds something else
        raise SpecError(
            Problem(where, f"an event is malformed ({error})", "a trace that PyTorch wrote")
        ) from None


def _collected(calls: Iterator[tuple[Work, float]], where: str) -> list[Measurement]:
    """All calls of one shape as one measurement."""
    seconds: dict[Work, list[float]] = defaultdict(list)
    for work, duration_s in calls:
        if duration_s > 0.0:
            seconds[work].append(duration_s)
    return [Measurement(where, work, median(times), alone=False) for work, times in seconds.items()]


# -- the trace -------------------------------------------------------------------------------------------------------------


def _from_trace(text: str, where: str, dtype: str | None) -> Iterator[tuple[Work, float]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(Problem(where, f"is not valid JSON ({error})", "a Chrome trace")) from None
    events = content.get("traceEvents", []) if isinstance(content, dict) else content
    events = [
        e for e in events if isinstance(e, dict) and e.get("ph") == "X" and isinstance(e.get("args"), dict)
    ]
    kernels: dict[Any, float] = defaultdict(float)
    for event in events:
        if event.get("cat") == "kernel":
            kernels[event["args"].get("External id")] += float(event.get("dur", 0.0))
            message = _message(event["args"])
            if message is not None:
                yield message, float(event.get("dur", 0.0)) * 1e-6
    operators = [e for e in events if e.get("cat") == "cpu_op"]
    if operators and not any("Input Dims" in e["args"] for e in operators):
        raise SpecError(Problem(where, "has no input shapes", _NEEDS_SHAPES))
    for event in operators:
        args = event["args"]
        duration_us = kernels.get(args.get("External id"), 0.0) if kernels else float(event.get("dur", 0.0))
        types = [dtype_named(str(name)) for name in args.get("Input type", [])]
        known = next((name for name in types if name), dtype)
        causal = "True" in [str(value) for value in args.get("Concrete Inputs", ["True"])]
        work = _work(str(event.get("name")), args.get("Input Dims", []), known, causal)
        if work is not None:
            yield work, duration_us * 1e-6


def _message(args: dict[str, Any]) -> Message | None:
    """The collective that a kernel of a communication library says it is; one node is taken."""
    kind = COLLECTIVES.get(str(args.get("Collective name", "")).lower())
    dtype = dtype_named(str(args.get("dtype", "")))
    sizes = [args.get("In msg nelems"), args.get("Out msg nelems")]
    ranks = args.get("Group size")
    if kind is None or dtype is None or not isinstance(ranks, int) or ranks < 2:
        return None
    elements = max((float(n) for n in sizes if isinstance(n, int | float)), default=0.0)
    return Message(kind, ranks, ranks, elements * dtype_bytes(dtype)) if elements else None


# -- the table -------------------------------------------------------------------------------------------------------------


def _from_table(text: str, where: str, dtype: str | None) -> Iterator[tuple[Work, float]]:
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if "# of Calls" in line)
    names = re.split(r"\s{2,}", lines[start].strip())
    if "Input Shapes" not in names:
        raise SpecError(Problem(where, "has no input shapes", "key_averages(group_by_input_shape=True)"))
    column = next((name for name in names if re.match(r"Self (CUDA|XPU|HPU|MTIA)$", name)), "Self CPU")
    wanted = names.index(column)
    for number, line in enumerate(lines[start + 1 :], start + 2):
        cells = re.split(r"\s{2,}", line.strip())
        if len(cells) < len(names) or not cells[0].startswith("aten::"):
            continue
        values = dict(zip(names, cells, strict=False))
        time, calls = _TIME.match(cells[wanted]), values["# of Calls"]
        if time is None or not calls.isdecimal():
            raise SpecError(
                Problem(f"{where}:{number}", f"{cells[wanted]!r} of {calls!r} calls", "a time and a count")
            )
        try:
            shapes = json.loads(values["Input Shapes"])
        except ValueError:
            continue  # cut off: max_shapes_column_width was too small for this row
        if (dtype is None) and _work(cells[0], shapes, "fp32", True) is not None:
            hint = "Say it with --dtype, such as --dtype bf16."
            raise SpecError(
                Problem(f"{where}:{number}", "a profiler's table does not name dtypes", "a dtype", hint)
            )
        work = _work(cells[0], shapes, dtype, True)
        if work is not None:
            yield work, float(time[1]) * _UNITS_S[time[2]] / int(calls)


# -- an operator and its shapes ----------------------------------------------------------------------------------------------


def _work(name: str, shapes: Sequence[Any], dtype: str | None, causal: bool) -> Work | None:
    """What an operator with these input shapes does; None where it is none of the priced kinds."""
    dims = [
        list(shape) for shape in shapes if isinstance(shape, list) and shape and isinstance(shape[0], int)
    ]
    if dtype is None or not dims or any(size <= 0 for shape in dims for size in shape):
        return None
    last_two = dims[1:3] if name == "aten::addmm" else dims[:2]
    if name in ("aten::mm", "aten::addmm") and [len(shape) for shape in last_two] == [2, 2]:
        (m, k), (_, n) = last_two
        return Product(m, n, k, 1.0, dtype)
    if name == "aten::bmm" and [len(shape) for shape in last_two] == [3, 3]:
        (groups, m, k), (_, _, n) = last_two
        return Product(m, n, k, groups, dtype)
    sdpa = _SDPA.match(name)
    if sdpa is not None:
        return _attention([shape for shape in dims if len(shape) == 4], dtype, causal, backward=bool(sdpa[3]))
    if name in _ELEMENTWISE:
        elements = [_count(shape) for shape in dims]
        moved = sum(elements) + (0 if name in _READS_ITS_RESULT else max(elements))
        return Stream(moved * dtype_bytes(dtype))
    return None


def _attention(
    shapes: Sequence[Sequence[int]], dtype: str, causal: bool, *, backward: bool
) -> Attention | None:
    """Shapes are (batch, heads, length, width): queries, keys; the backward has the output's gradient before them."""
    tensors = shapes[1:] if backward else shapes
    if len(tensors) < 2:
        return None
    (batch, heads, queries, width), (_, kv_heads, keys, _) = tensors[:2]
    return Attention(batch, heads, kv_heads, queries, keys, width, 0.0, causal, backward, dtype)


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
