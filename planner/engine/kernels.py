"""Seconds of kernels on one device: the closed forms of ``planner.costs`` with the constants of a device profile.

The engine prices a ledger's kernels here, and so does whoever holds single kernels against measurements.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from planner.costs.arrays import Real
from planner.costs.attention_kernel import attention_bytes, attention_s
from planner.costs.compute import (
    matmul_bytes,
    matmul_waves,
    memory_bound_s,
    product_s,
    uncached_bytes,
)
from planner.costs.precision import FORMAT_BITS
from planner.specs.device import Device, Sourced

__all__ = ["WIDE_HEAD", "Kernels"]

WIDE_HEAD = 128.0
"""Width beyond which accumulators of a head spill where a library's kernels are not made for it."""


class Kernels:
    """Prices kernels on one device; all arguments broadcast.

    Args:
        device: whose constants apply.
        alone: the kernel is timed by itself, over and over: its operands may still be in the second-level cache, and a short
            one runs before the chip has throttled its clocks. False: it is one of many in a step, and finds neither.
        start_share: of a kernel's fixed cost (its start and end, and splitting a contraction), what is not hidden behind the
            kernels before and after it.
    """

    def __init__(self, device: Device, *, alone: bool = False, start_share: float = 1.0) -> None:
        eff = device.efficiency
        self.device = device
        self.alone = alone
        self.launch_s = float(device.launch_s) * start_share
        boost = float(eff.matmul_burst) - 1.0 if alone else 0.0
        self._memory: dict[str, Any] = {
            "memory_bytes_per_s": float(device.memory_bytes_per_s),
            "memory": float(eff.memory),
        }
        self._roofline: dict[str, Any] = {
            **self._memory, "overlap_loss": float(eff.overlap_loss), "split_s": float(eff.split_s) * start_share,
            "multiprocessors": float(device.multiprocessors),
        }  # fmt: skip
        self._product: dict[str, Any] = {**self._roofline, "boost": boost}
        self._tile = float(eff.matmul_tile)
        self._attention: dict[str, Any] = {
            **self._roofline, "tile": float(eff.attention_tile), "straggler": float(eff.attention_straggler),
            "tile_s": float(eff.attention_tile_s), "softmax_flop": float(eff.softmax_flop),
            "vector_flop_per_s": float(device.vector_flop_per_s),
            "boost": boost,
        }  # fmt: skip

    def peak_flop_per_s(self, dtype: str) -> tuple[float, str]:
        """Dense matrix rate for a dtype, and the dtype whose rate it is: the nearest wider one that the device has."""
        for name in _WIDER[dtype]:
            if name in self.device.peak_flop_per_s:
                return float(self.device.peak_flop_per_s[name]), name
        return float(self.device.vector_flop_per_s), "fp32"

    def product_flop_per_s(self, dtype: str, *, grouped: bool = False) -> float:
        """Rate that a large matrix product sustains."""
        eff = self.device.efficiency
        peak, name = self.peak_flop_per_s(dtype)
        reached = _by_width(name, eff.matmul, eff.matmul_8bit, eff.matmul_4bit)
        return peak * reached * (float(eff.grouped_matmul) if grouped else 1.0)

    def attention_flop_per_s(self, dtype: str, *, backward: bool = False) -> float:
        """Rate that the products of a long fused attention sustain."""
        eff = self.device.efficiency
        peak, name = self.peak_flop_per_s(dtype)
        reached = _by_width(name, eff.attention, eff.attention_8bit, eff.attention_8bit)
        return peak * reached * (float(eff.attention_backward) / float(eff.attention) if backward else 1.0)

    def matmul_s(
        self,
        m: Real,
        n: Real,
        k: Real,
        groups: Real,
        flop_per_s: Real,
        bytes_per_element: Real,
        out_bytes_per_element: Real,
        weight_bytes_per_element: Real | None = None,
        working_set_bytes: Real | None = None,
        tile: float | None = None,
        split: bool = True,
    ) -> Real:
        """Seconds of ``groups`` products of (m, k) by (k, n) in one kernel, at a rate of :meth:`product_flop_per_s`.

        ``working_set_bytes`` is what a kernel timed alone reads before it comes back to the same operands; left out: its own.
        ``tile`` is the edge of a library's output tiles; left out: the device's. ``split``: idle multiprocessors share a
        contraction; else every tile is one multiprocessor's, so that few of them take as long as a wave.
        """
        n_bytes = matmul_bytes(
            m, n, k, groups, bytes_per_element, out_bytes_per_element, weight_bytes_per_element
        )
        waves = self.waves(m, n, groups, tile)
        if not split:
            waves = np.maximum(waves, 1.0)
        return self.product_s(waves, k, n_bytes, flop_per_s, working_set_bytes)

    def product_s(
        self, waves: Real, k: Real, bytes_: Real, flop_per_s: Real, working_set_bytes: Real | None = None
    ) -> Real:
        """Seconds of a kernel of products that fills ``waves`` waves of tiles and moves ``bytes_``."""
        return product_s(
            waves, k, self.moved(bytes_, working_set_bytes), flop_per_s, tile=self._tile, launch_s=self.launch_s,
            **self._product,
        )  # fmt: skip

    def waves(self, m: Real, n: Real, groups: Real = 1.0, tile: float | None = None) -> Real:
        """Work of ``groups`` products with an (m, n) result each, in waves of the device's tiles; it adds up over experts.

        Edges are rounded up to half of ``tile`` (left out: the device's).
        """
        edge = tile or self._tile
        waves = matmul_waves(m, n, groups, tile=edge, multiprocessors=self._roofline["multiprocessors"])
        return waves if edge == self._tile else waves * (edge / self._tile) ** 2

    def stream_s(self, bytes_: Real, launches: Real = 1.0, flop: Real = 0.0) -> Real:
        """Seconds of ``launches`` memory-bound kernels that move ``bytes_`` together, and do ``flop`` vector operations."""
        seconds = memory_bound_s(self.moved(bytes_), launch_s=launches * self.launch_s, **self._memory)
        if np.any(flop):
            seconds = np.maximum(seconds, flop / float(self.device.vector_flop_per_s))
        return seconds

    def attention_s(
        self,
        batch: Real,
        heads: Real,
        kv_heads: Real,
        queries: Real,
        keys: Real,
        qk_dim: Real,
        v_dim: Real,
        flop_per_s: Real,
        *,
        visible: Real = 1.0,
        passes: float = 1.0,
        bytes_per_element: Real = 2.0,
        kv_bytes_per_element: Real | None = None,
        split_s: float | None = None,
        splits: float = np.inf,
        tile_share: float = 1.0,
        walk_share: float = 1.0,
        working_set_bytes: Real | None = None,
    ) -> Real:
        """Seconds of one fused attention kernel at a rate of :meth:`attention_flop_per_s`.

        ``passes`` is 1 forward and 2.5 backward, whose tensors are twice as many. ``keys`` are those that any query sees: where
        a window hides the first of them from all, they do not count. ``split_s`` replaces the device's (infinite: the walk over
        keys is never split), ``splits`` is how many share it at most, ``tile_share`` scales what a tile costs, ``walk_share``
        the longest one's walk, and ``working_set_bytes`` is as in :meth:`matmul_s`.
        """
        n_bytes = attention_bytes(
            batch, heads, kv_heads, queries, keys, qk_dim, v_dim, bytes_per_element,
            passes=max(1.0, passes - 0.5), kv_bytes_per_element=kv_bytes_per_element,
        )  # fmt: skip
        constants = {
            **self._attention,
            "tile_s": tile_share * self._attention["tile_s"],
            "straggler": walk_share * self._attention["straggler"],
        }
        if split_s is not None:
            constants["split_s"] = split_s
        return attention_s(
            batch, heads, kv_heads, queries, keys, qk_dim, v_dim, visible=visible, passes=passes,
            peak_flop_per_s=flop_per_s, bytes_=self.moved(n_bytes, working_set_bytes), launch_s=self.launch_s, splits=splits,
            **constants,
        )  # fmt: skip

    def moved(self, bytes_: Real, working_set_bytes: Real | None = None) -> Real:
        """Bytes that the memory sees."""
        if not self.alone:
            return bytes_
        return uncached_bytes(
            bytes_, float(self.device.l2_bytes), float(self.device.efficiency.l2_speedup), working_set_bytes
        )


def _by_width(dtype: str, wide: Sourced, eight: Sourced, four: Sourced) -> float:
    """The constant of a dtype's width."""
    bits = FORMAT_BITS[dtype]
    return float(wide if bits > 8 else eight if bits > 4 else four)


_WIDER = {
    "fp4": ("fp4", "fp8", "bf16", "fp16", "fp32"),
    "fp8": ("fp8", "bf16", "fp16", "fp32"),
    "int8": ("int8", "bf16", "fp16", "fp32"),
    "bf16": ("bf16", "fp32"),
    "fp16": ("fp16", "bf16", "fp32"),
    "fp32": ("fp32",),
    "tf32": ("tf32", "fp32"),
}
