"""Kernels of a ledger on one device, with the libraries that a software stack runs: lists of items, priced over all rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from planner.costs.alignment import alignment_efficiency
from planner.costs.arrays import Real
from planner.costs.collectives import Level
from planner.costs.expert_exchange import expert_exchange_s
from planner.costs.precision import FORMAT_BITS, dtype_bytes
from planner.costs.state_space import PRODUCT_SHARE
from planner.engine.kernels import WIDE_HEAD, Kernels
from planner.ledger import Array, AttentionCore, Axes, Collective, Item, Matmul, Stream
from planner.specs.device import Device
from planner.specs.exchange_library import ExchangeKernel
from planner.specs.formats import KERNEL_FORMATS
from planner.specs.kernel_library import KernelLibrary, library_for
from planner.specs.stack import Stack

__all__ = ["KernelPrices", "beside_nothing", "exchange_s", "slowdown_constant"]

_VECTORS = 8.0  # rows of a product by vectors: llama.cpp ggml/src/ggml-cuda/mmvq.cuh (MMVQ_MAX_BATCH_SIZE)
_SCALED_BEFORE = (
    "fp8",
)  # vLLM docs/design/fusions.md: fuse_norm_quant and fuse_act_quant of static fp8 scales
_INSTRUCTION_ROWS = 16.0  # PTX mma.m16n8k16
_FEW_ROWS = 64.0  # vLLM csrc/quantization/w8a8/cutlass/c3x/scaled_mm_sm90_fp8_dispatch.cuh: tiles of 64 rows up to 64 rows


class KernelPrices:
    """Prices kernels; a stack that serves says what of their starts and of libraries' small kernels its graphs hide."""

    def __init__(self, device: Device, stack: Stack) -> None:
        self.device, self.stack = device, stack
        software = stack.serving
        self.kernels = Kernels(device, start_share=1.0 if software is None else float(software.start_share))
        self._libraries: dict[tuple[str, str], KernelLibrary | None] = {}
        self._call_share = 1.0 if software is None else float(software.call_share)
        self._small_flop_per_s = PRODUCT_SHARE * self.kernels.peak_flop_per_s("bf16")[0]

    def matmuls(self, items: list[Matmul], axes: Axes) -> Iterable[Array]:
        """Seconds of products."""
        found: dict[int, Array] = {}
        by_tile: dict[tuple[float, bool], list[tuple[Matmul, KernelLibrary | None]]] = {}
        for item in items:
            library = self._library("moe" if item.grouped else "gemm", item.format)
            tiling = (0.0, True) if library is None else (library["tile"], not library["unsplit"])
            by_tile.setdefault(tiling, []).append((item, library))
        for (tile, split), group in by_tile.items():
            priced = self._products(group, axes, tile or None, split)
            found |= zip((id(i) for i, _ in group), priced, strict=True)
        return [found[id(item)] for item in items]

    def _products(
        self, items: list[tuple[Matmul, KernelLibrary | None]], axes: Axes, tile: float | None, split: bool
    ) -> Iterable[Array]:
        """Products whose kernels have tiles of one size, and split contractions or not."""
        formats = [KERNEL_FORMATS.get(item.format) for item, _ in items]
        plain = [item for item, _ in items]
        width = _column(
            [dtype_bytes(f.inputs if f else i.dtype) for i, f in zip(plain, formats, strict=True)]
        )
        stored = _column(
            [dtype_bytes(f.weights if f else i.dtype) for i, f in zip(plain, formats, strict=True)]
        )
        out = _written(plain, axes)
        rate = _column(
            [self.kernels.product_flop_per_s(i.dtype, grouped=i.grouped and not i.apart) for i in plain]
        )
        m, n, k, groups = (
            _stack([getattr(item, name) for item in plain], axes) for name in ("m", "n", "k", "groups")
        )
        apart = np.array([[item.apart] for item in plain])
        launches = _column([item.launches for item in plain]) * np.where(apart, groups, 1.0)
        groups = np.where(apart, 1.0, groups)
        # Frameworks pad the vocabulary, whatever its size (Megatron-LM: to multiples of 128 per rank).
        padded = np.array([["vocab" in item.n or "vocab" in item.k] for item in plain])
        element = _column([dtype_bytes(item.dtype) for item in plain])  # scales of blocks lie apart
        aligned = rate * np.where(padded, 1.0, alignment_efficiency(n, k, element))
        libraries = [library for _, library in items]
        if any(libraries):
            aligned = aligned * _column([1.0 if x is None else x["rate"] for x in libraries])
            own = [0.0 if x is None else x["weight_bytes"] for x in libraries]
            stored = np.where(_column(own) > 0.0, _column(own), stored)
        aligned = aligned * self._few_rows(plain, m)
        price = partial(self.kernels.matmul_s, m, n, k, groups, aligned, width, out, stored, split=split)
        narrow = tile is not None and tile < float(self.device.efficiency.matmul_tile)
        seconds: Array = price(tile=tile if narrow else None) * launches
        if tile is not None and not narrow:  # a library with wide tiles has narrow ones as well, for few rows
            seconds = np.where(m > _FEW_ROWS, price(tile=tile) * launches, seconds)
        if any(libraries):
            drawn_s = self._drawn_s(libraries, n * k * groups * stored) * launches
            seconds = np.where((m <= _VECTORS) & (seconds > 0.0), np.maximum(seconds, drawn_s), seconds)
            seconds = seconds + (seconds > 0.0) * self._beside_products(plain, libraries, m, k)
        return seconds

    def _drawn_s(self, libraries: list[KernelLibrary | None], weight_bytes: Array) -> Array:
        """Seconds in which the multiprocessors draw the weights, where a library's kernels have too few loads in flight."""
        each_s = _column([0.0 if x is None else x["byte_s"] for x in libraries])
        return np.asarray(weight_bytes * each_s / float(self.device.multiprocessors))

    def _few_rows(self, items: list[Matmul], m: Array) -> Array:
        """How much less than half a tile of rows a plain product multiplies that has fewer: its kernels' tiles have 16."""
        half = 0.5 * float(self.device.efficiency.matmul_tile)
        grouped = np.array([[item.grouped] for item in items])
        narrow = np.ceil(np.maximum(m, 1.0) / _INSTRUCTION_ROWS) * _INSTRUCTION_ROWS
        return np.asarray(np.where((narrow < half) & ~grouped, half / narrow, 1.0))

    def _beside_products(
        self, items: list[Matmul], libraries: list[KernelLibrary | None], m: Array, k: Array
    ) -> Array:
        """Seconds of a library's small kernels beside its products; the two products of experts are one call.

        Engines fuse those of a plain product into the kernels around it, wholly where a tensor's one scale is known beforehand;
        routing and summing stay what they are.
        """
        call = _column(
            [
                0.0 if x is None else x["call_s"] / (2.0 if i.grouped else 1.0)
                for i, x in zip(items, libraries, strict=True)
            ]
        )
        quantised, row_s = (
            _column(
                [0.0 if x is None or i.grouped else x[name] for i, x in zip(items, libraries, strict=True)]
            )
            for name in ("quantise_bytes", "row_s")
        )
        known = 1.0 if self.stack.serving is None else 0.0
        share = _column(
            [1.0 if i.grouped else known if i.format in _SCALED_BEFORE else self._call_share for i in items]
        )
        return np.asarray((call + row_s * m + self.kernels.stream_s(m * k * quantised, 0.0)) * share)

    def streams(self, items: list[Stream], axes: Axes) -> Iterable[Array]:
        """Seconds of memory-bound kernels, and of small products between them."""
        size = _stack([item.size for item in items], axes)
        bytes_per_element, launches, flop_per_element, product_flop_per_element = (
            np.array([[getattr(item, name)] for item in items])
            for name in ("bytes_per_element", "launches", "flop_per_element", "product_flop_per_element")
        )
        flop = size * flop_per_element if flop_per_element.any() else 0.0
        seconds = np.asarray(self.kernels.stream_s(size * bytes_per_element, launches, flop))
        if product_flop_per_element.any():
            seconds = seconds + size * product_flop_per_element / self._small_flop_per_s
        return seconds

    def attention(self, items: list[AttentionCore], axes: Axes) -> Iterable[Real]:
        """Seconds of fused attention, one item at a time."""
        for item in items:
            rate: Real = self.kernels.attention_flop_per_s(item.dtype, backward=item.passes != 1.0)
            extra: dict[str, Any] = {}
            beside_s = 0.0
            if item.stored:
                rate, beside_s, extra = self._cached_attention(
                    item, rate, axes[item.qk_dim], axes[item.v_dim]
                )
            seconds = self.kernels.attention_s(
                axes[item.batch], axes[item.heads], axes[item.kv_heads], axes[item.q], axes[item.kv], axes[item.qk_dim],
                axes[item.v_dim], rate, visible=axes[item.visible], passes=item.passes,
                bytes_per_element=dtype_bytes(item.dtype), **extra,
            )  # fmt: skip
            yield seconds + beside_s * np.greater(seconds, 0.0) if beside_s else seconds

    def _cached_attention(
        self, item: AttentionCore, rate: Real, qk_dim: Array, v_dim: Array
    ) -> tuple[Real, float, dict[str, Any]]:
        """Rate, seconds of small kernels and further arguments of an attention over a cache, by its library."""
        label = f"latent-{item.dtype}" if item.latent else item.dtype
        library = self._library("attention", label)
        shared = qk_dim / (qk_dim + v_dim) if item.latent else 1.0
        extra: dict[str, Any] = {"kv_bytes_per_element": dtype_bytes(item.stored) * shared}
        if library is None:
            return rate, 0.0, extra
        narrow = dtype_bytes(item.stored) < dtype_bytes(item.dtype)
        beside_s = library["decode_call_s" if item.decode else "call_s"] + (
            library["cast_s"] if narrow else 0.0
        )
        extra |= {
            "split_s": library["split_s"] or None,
            "splits": library["splits"] or np.inf,
            "tile_share": library["decode_tile" if item.decode else "prefill_tile"],
            "walk_share": library["walk"],
        }
        width = np.maximum(np.maximum(qk_dim, v_dim) / WIDE_HEAD, 1.0)
        return rate * library["rate"] / width ** library["wide_head"], beside_s * self._call_share, extra

    def _library(self, operation: str, label: str) -> KernelLibrary | None:
        """The library whose kernel the stack runs; None: it names none, and the device's own constants hold."""
        if (operation, label) not in self._libraries:
            generation = self.device.generation
            kernel = self.stack.kernel(operation, label, generation) if label else None
            library = None if kernel is None else library_for(operation, kernel, label, generation)
            self._libraries[operation, label] = library
        return self._libraries[operation, label]


def exchange_s(
    kernel: ExchangeKernel, link_bytes: Real, remote_bytes: Real, levels: Sequence[Level], units: float = 0.0
) -> Real:
    """Seconds of a kernel that brings tokens to their experts, or back; ``units`` are its multiprocessors (0: not known)."""
    constants: dict[str, Any] = {
        name: float(value)
        for name in ("launches", "link_fraction", "remote_s")
        if (value := getattr(kernel, name)) is not None
    }
    alone, across = kernel.unit_bytes_per_s, kernel.remote_unit_bytes_per_s
    if units and alone is not None:
        rates = float(alone), float(alone if across is None else across)
        constants |= {
            "units": units,
            "unit_bytes_per_s": np.where(np.greater(remote_bytes, 0.0), rates[1], rates[0]),
        }
    return expert_exchange_s(link_bytes, remote_bytes, levels, **constants)


def slowdown_constant(item: Item | None, stack: Stack) -> str | None:
    """Name of the stack's constant that an item's seconds are proportional to; None: its kernel is priced by itself."""
    if isinstance(item, Matmul):
        return None if item.single else stack.product_constant(FORMAT_BITS[item.dtype], grouped=item.grouped)
    if isinstance(item, AttentionCore):
        return "attention_slowdown"
    if isinstance(item, Stream):
        return "stream_slowdown"
    if isinstance(item, Collective) and item.kind != "all_to_all" and not beside_nothing(item):
        return "collective_slowdown"
    return None


def beside_nothing(item: Item) -> bool:
    """Whether an item runs once per step while its device does nothing else.

    ``collective_slowdown`` is what collectives take longer beside kernels than alone: with nothing to share the device with, they
    take what the links' profiles say (docs/decisions/0004-stacks.md has the measurements).
    """
    return item.phase == "step" and item.track == "main"


def _column(values: Sequence[float]) -> Array:
    """One value per item, to broadcast over rows."""
    return np.array(values)[:, None]


def _written(items: Sequence[Matmul], axes: Axes) -> Array:
    """Bytes per output element."""
    widths = [dtype_bytes(i.dtype) if i.out_bytes is None else i.out_bytes for i in items]
    by_row = [axes[width] if isinstance(width, str) else np.array(width) for width in widths]
    return np.stack(np.broadcast_arrays(*map(np.atleast_1d, by_row)))


def _stack(expressions: list[str], axes: Axes) -> Array:
    """Expressions over axes as one array (items, rows)."""
    return np.stack(np.broadcast_arrays(*(np.atleast_1d(axes[e]) for e in expressions)))
