"""Tables of measured kernels: what a row of each known form says was run, on which device and with whose kernels.

A form is told by its columns. Rows with the same device, kernel library and number formats become one batch of arrays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from planner.errors import PlannerError
from planner.specs.device import Device
from planner.specs.device_file import find_device, load_device
from planner.specs.formats import KERNEL_FORMATS, KernelFormat
from planner.specs.kernel_library import KernelLibrary, library_for
from planner.validation.kernel_work import Attention, Experts, Mixed, Product, Stream, Work, power_law_loads
from planner.validation.layer_shapes import latent_shape, layer_work, model_heads
from planner.validation.table import Row, Table, Unsupported

__all__ = ["Batch", "Call", "batches", "device_of"]

_SECONDS = {"latency_ms": 1e-3, "latency_us": 1e-6, "time_us": 1e-6, "latency_ns": 1e-9}
_COLLECTION_COPIES = 6.0
"""Copies of the weights that aiconfigurator's collectors use in turn (collector/sglang and vllm/collect_gemm.py; TensorRT-LLM's
takes as many as fill the cache, five at most)."""


_PAGED_PROMPT = ("bf16", "bf16", False, True, 1.0, True, False)
"""A prompt's attention as serving engines run it, as fixed arguments of :class:`Attention`."""


@dataclass(frozen=True, slots=True)
class Call:
    """One row: what was run (``kind`` with its fixed and its per-row arguments) and how long it took.

    Attributes:
        metric: gemm, attention_prefill, attention_decode, moe or elementwise.
        kernel: framework and kernel, for the choice of a library.
        label: the number format as printed.
    """

    row: Row
    metric: str
    device: str
    kernel: str
    label: str
    kind: type
    fixed: tuple[Any, ...]
    numbers: tuple[Any, ...]
    measured_s: float


@dataclass(frozen=True, slots=True)
class Batch:
    """Calls that are priced together."""

    metric: str
    device: Device
    library: KernelLibrary
    work: Work
    rows: tuple[Row, ...]
    measured_s: Any

    def take(self, keep: Any) -> Batch:
        """The rows that a mask selects."""
        rows = tuple(row for row, kept in zip(self.rows, keep, strict=True) if kept)
        return replace(self, work=self.work.take(keep), rows=rows, measured_s=self.measured_s[keep])


def batches(table: Table) -> tuple[list[Batch], list[tuple[Row, str, str]]]:
    """The calls of a table in batches, and the rows that are none: with the metric and the reason."""
    form = next((form for columns, form in _FORMS if columns <= set(table.columns)), None)
    groups: dict[Any, list[Call]] = defaultdict(list)
    refused: list[tuple[Row, str, str]] = []
    for row in table.rows:
        metric = _metric_of(row)
        try:
            if form is None:
                raise Unsupported("no known form of a table of kernels")
            call = form(row)
            device_of(call.device)
        except Unsupported as error:
            refused.append((row, metric, str(error)))
            continue
        groups[call.metric, call.device, call.kernel, call.label, call.kind, call.fixed].append(call)
    return [_batch(calls) for calls in groups.values()], refused


@lru_cache(maxsize=128)
def device_of(name: str) -> Device:
    """The profile of a device as a table prints it.

    Raises:
        Unsupported: there is none.
    """
    found = find_device(name)
    if found is None:
        raise Unsupported(f"no profile of the accelerator {name!r}")
    try:
        return load_device(found)
    except PlannerError as error:
        raise Unsupported(str(error)) from None


def _batch(calls: Sequence[Call]) -> Batch:
    first = calls[0]
    columns = list(zip(*(call.numbers for call in calls), strict=True))
    operation = {
        "attention_prefill": "attention",
        "attention_decode": "attention",
        "elementwise": "stream",
    }.get(first.metric, first.metric)
    device = device_of(first.device)
    return Batch(
        metric=first.metric,
        device=device,
        library=library_for(operation, first.kernel, first.label, device.generation),
        work=_WORKS[first.kind](first.fixed, columns),
        rows=tuple(call.row for call in calls),
        measured_s=np.array([call.measured_s for call in calls]),
    )


def _metric_of(row: Row) -> str:
    """What a row of an unknown form would have been scored as."""
    if row.text("phase"):
        return "attention_decode" if row.text("phase") == "decode" else "attention_prefill"
    if row.text("moe_dtype"):
        return "moe"
    return "attention_prefill" if row.text("prefill_chunk") or row.text("prefill_chunk_size") else "gemm"


# -- forms of tables ---------------------------------------------------------------------------------------------------


def _gemm(row: Row) -> Call:
    """m, n, k and a number format; also the operators of LLMCompass and of vidur, which may be other kernels."""
    operation = row.text("op") or "matmul"
    if row.number("k") is None:
        return _stream(row, operation)
    label = row.text("dtype").lower()
    form = _format(label)
    collected = bool(
        row.text("framework")
    )  # a layer's own operators run one after another, each with other weights
    copies = (
        _COLLECTION_COPIES
        if collected
        else 1.0
        if row.text("op") == "matmul" or not row.text("op")
        else np.inf
    )
    fixed = (form.dtype, form.inputs, form.weights, copies)
    return _call(row, "gemm", label, Product, fixed, tuple(_needed(row, name) for name in ("m", "n", "k")))


def _attention(row: Row) -> Call:
    decode = row.text("phase") == "decode"
    dtype, stored = (_format(row.text(name).lower()).dtype for name in ("attn_dtype", "kv_cache_dtype"))
    queries = _needed(row, "q_len")
    keys = row.number("kv_len_total") or queries + (row.number("past_kv_len") or 0.0)
    heads, kv_heads, width = (_needed(row, name) for name in ("num_heads", "num_key_value_heads", "head_dim"))
    numbers = (
        _needed(row, "batch_size"),
        heads,
        kv_heads,
        queries,
        keys,
        width,
        width,
        row.number("window_size") or np.inf,
    )
    metric = "attention_decode" if decode else "attention_prefill"
    causal = row.truth("causal") is not False
    fixed = (dtype, stored, decode, causal, row.number("passes") or 1.0, False, False)
    return _call(row, metric, dtype, Attention, fixed, numbers)


def _latent_attention(row: Row) -> Call:
    """Multi-head latent attention: per-head keys in the prompt's phase, one latent for all heads in generation."""
    decode = row.text("phase") == "decode"
    dtype, stored = (_format(row.text(name).lower()).dtype for name in ("mla_dtype", "kv_cache_dtype"))
    queries, heads = _needed(row, "q_len"), _needed(row, "num_heads")
    kv_heads, qk_dim, v_dim = latent_shape(decode, heads)
    keys = queries + (row.number("past_kv_len") or 0.0)
    numbers = (_needed(row, "batch_size"), heads, kv_heads, queries, keys, qk_dim, v_dim, np.inf)
    metric = "attention_decode" if decode else "attention_prefill"
    return _call(
        row, metric, f"latent-{dtype}", Attention, (dtype, stored, decode, True, 1.0, False, decode), numbers
    )


def _experts(row: Row) -> Call:
    label = row.text("moe_dtype").lower()
    form = _format(label)
    names = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    tokens, hidden, ffn, top_k, experts, tp, ep = (_needed(row, name) for name in names)
    if experts % ep:
        raise Unsupported(f"{experts:g} experts on {ep:g} ranks")
    loads = _loads(row.text("distribution").lower(), tokens, top_k, int(experts), int(ep))
    wide = 1.0 if "nongated" in row.text("kernel_source") else 2.0
    fixed = (form.dtype, form.inputs, form.weights, wide)
    return _call(row, "moe", label, Experts, fixed, (tokens, hidden, ffn / tp, tokens * top_k, loads))


def _mixed(row: Row) -> Call:
    """A prompt's chunk with sequences that decode, of a model on some ranks."""
    heads, kv_heads, width = model_heads(row.text("model"), row.number("tp") or 1.0)
    chunk, decodes = row.number("prefill_chunk") or 0.0, row.number("n_decode") or 0.0
    numbers = (
        heads, kv_heads, width, float(chunk > 0), chunk, chunk + (row.number("kv_prefill") or 0.0), decodes,
        (row.number("kv_decode") or 0.0) + 1.0,
    )  # fmt: skip
    dtype = _format(row.text("dtype").lower() or "bf16").dtype
    metric = "attention_prefill" if chunk else "attention_decode"
    return _call(row, metric, dtype, Mixed, (dtype,), numbers)


def _batched(row: Row) -> Call:
    """A prompt's chunks, or sequences that decode, of a model on some ranks."""
    heads, kv_heads, width = model_heads(row.text("model"), row.number("tp") or 1.0)
    prefill = row.truth("is_prefill")
    past = row.number("kv_cache_size") or 0.0
    queries = _needed(row, "prefill_chunk_size") if prefill else 1.0
    numbers = (_needed(row, "batch_size"), heads, kv_heads, queries, past + queries, width, width, np.inf)
    metric = "attention_prefill" if prefill else "attention_decode"
    fixed = _PAGED_PROMPT if prefill else ("bf16", "bf16", True, True, 1.0, True, False)
    return _call(row, metric, "bf16", Attention, fixed, numbers)


def _layer(row: Row) -> Call:
    """An operator of a model's layer, by name."""
    name = row.text("layer") or row.text("layer_name")
    count = row.number("n") if row.text("layer") else row.number("n_tokens")
    if not count:
        raise Unsupported("no count of tokens")
    if name == "attn":  # of a prompt
        heads, kv_heads, width = model_heads(row.text("model"), row.number("tp") or 1.0)
        keys = count + (row.number("kv_cache") or 0.0)
        numbers = (1.0, heads, kv_heads, count, keys, width, width, np.inf)
        return _call(row, "attention_prefill", "bf16", Attention, _PAGED_PROMPT, numbers)
    found = layer_work(row.text("model"), name, row.number("tp") or 1.0, count)
    if isinstance(found, float):
        return _call(row, "elementwise", name, Stream, (), (found,))
    fixed = ("bf16", "bf16", "bf16", np.inf)
    return _call(row, "gemm", "bf16", Product, fixed, found)


def _stream(row: Row, operation: str) -> Call:
    """A memory-bound operator of vidur or LLMCompass."""
    rows = _needed(row, "m") if row.number("m") else _needed(row, "num_tokens")
    tp = row.number("tp") or 1.0
    if row.number("n_embd"):
        width, heads, kv_heads = (_needed(row, name) for name in ("n_embd", "n_head", "n_kv_head"))
        moved = {
            "add": 3.0 * width,
            "input_layernorm": 2.0 * width,
            "post_attention_layernorm": 2.0 * width,
            "emb": 2.0 * width,
            "attn_rope": 2.0 * width * (1.0 + kv_heads / heads) / tp,
            "mlp_act": (3.0 if row.text("use_gated_mlp").lower() == "true" else 2.0)
            * _needed(row, "n_expanded_embd")
            / tp,
        }.get(operation)
    else:
        columns = row.number("n") or 1.0
        moved = {"softmax": 2.0, "layernorm": 2.0, "gelu": 2.0}.get(operation)
        moved = None if moved is None else moved * columns
    if moved is None:
        raise Unsupported(f"operator {operation!r}: not modelled")
    return _call(row, "elementwise", operation, Stream, (), (2.0 * rows * moved,))


_FORMS: tuple[tuple[set[str], Callable[[Row], Call]], ...] = (
    ({"moe_dtype", "inter_size"}, _experts),
    ({"mla_dtype", "past_kv_len"}, _latent_attention),
    ({"attn_dtype", "head_dim"}, _attention),
    ({"prefill_chunk", "n_decode"}, _mixed),
    ({"is_prefill", "kv_cache_size"}, _batched),
    ({"layer", "n"}, _layer),
    ({"layer_name", "n_tokens"}, _layer),
    ({"m", "n", "k"}, _gemm),
)


# -- cells -------------------------------------------------------------------------------------------------------------


def _call(
    row: Row, metric: str, label: str, kind: type, fixed: tuple[Any, ...], numbers: tuple[Any, ...]
) -> Call:
    names = (row.text("source"), row.text("framework"), row.text("kernel_source"), row.text("version"))
    return Call(
        row, metric, row.text("accelerator"), " ".join(filter(None, names)), label, kind, fixed, numbers, _measured_s(row)
    )  # fmt: skip


def _measured_s(row: Row) -> float:
    """What the row measured, whatever its unit; elements per second are turned round."""
    for column, unit in _SECONDS.items():
        value = row.number(column)
        if value:
            return value * unit
    if row.text("reported_unit") == "G elements/s" and row.number("reported"):
        return (row.number("m") or 1.0) * (row.number("n") or 1.0) / (1e9 * _needed(row, "reported"))
    raise Unsupported("no time is given")


def _needed(row: Row, column: str) -> float:
    value = row.number(column)
    if not value:
        raise Unsupported(f"no {column} is given")
    return value


def _format(label: str) -> KernelFormat:
    if label not in KERNEL_FORMATS:
        raise Unsupported(f"number format {label!r}: not modelled")
    return KERNEL_FORMATS[label]


def _loads(distribution: str, tokens: float, top_k: float, experts: int, ranks: int) -> Any:
    if distribution in ("balanced", "uniform"):
        # Choices go round the experts, so that none is repeated before all were chosen.
        busy = min(float(experts), tokens * top_k) / ranks
        local = np.zeros(experts // ranks)
        local[: max(1, round(busy))] = tokens * top_k / ranks / max(1, round(busy))
        return local
    name, _, exponent = distribution.rpartition("_")
    if name != "power_law":
        raise Unsupported(f"distribution {distribution!r} of tokens over experts: not modelled")
    return power_law_loads(tokens, top_k, experts, ranks, float(exponent))


def _padded(loads: Sequence[Any]) -> Any:
    """Loads of rows with unlike numbers of experts as one array (experts, rows)."""
    found = np.zeros((max(len(local) for local in loads), len(loads)))
    for column, local in enumerate(loads):
        found[: len(local), column] = local
    return found


def _arrays(columns: Sequence[Any]) -> list[Any]:
    return [np.array(column, dtype=np.float64) for column in columns]


def _mixed_work(fixed: tuple[Any, ...], columns: Sequence[Any]) -> Work:
    heads, kv_heads, width, chunks, queries, keys, decodes, decode_keys = _arrays(columns)
    endless, one = np.full_like(heads, np.inf), np.ones_like(heads)
    (dtype,) = fixed
    queries, keys = np.maximum(queries, 1.0), np.maximum(keys, 1.0)
    chunk = (chunks, heads, kv_heads, queries, keys, width, width, endless)
    decode = (decodes, heads, kv_heads, one, decode_keys, width, width, endless)
    return Mixed(
        Attention(dtype, dtype, False, True, 1.0, True, False, *chunk),
        Attention(dtype, dtype, True, True, 1.0, True, False, *decode),
    )


_WORKS: Mapping[type, Callable[[tuple[Any, ...], Sequence[Any]], Work]] = {
    Attention: lambda fixed, columns: Attention(*fixed, *_arrays(columns)),
    Mixed: _mixed_work,
    Product: lambda fixed, columns: Product(*fixed, *_arrays(columns)),
    Experts: lambda fixed, columns: Experts(*(*fixed, *_arrays(columns[:4]), _padded(columns[4]))),
    Stream: lambda fixed, columns: Stream(*_arrays(columns)),
}
