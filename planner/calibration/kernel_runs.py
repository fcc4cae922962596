"""Grids of products, attention and streams, timed with PyTorch on one device.

Shapes are those of transformers' layers, in even steps from the smallest to the largest that takes a fifth of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import product
from typing import Any

from planner.calibration.measure import DTYPES, Setting, processor_name, torch_module
from planner.calibration.stopwatch import Timing, keep_freed_memory, timed
from planner.costs.attention_kernel import FLASH_BACKWARD_PASSES
from planner.costs.precision import dtype_bytes

__all__ = ["KERNELS", "measure_kernels"]

_ROWS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_WIDTHS = (64, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384)
_BATCHES, _HEADS, _HEAD_DIMS, _LENGTHS = (
    (1, 2, 4, 8),
    (4, 8, 16),
    (32, 64, 128),
    (64, 128, 256, 512, 1024, 2048, 4096),
)
_STREAM_BYTES = tuple(2**power for power in range(12, 31))
_LONGEST_S = 0.2
_FEW, _MANY = 60, 240  # shapes of a quick and a full grid
_RATE_PROBE = (512, 512, 512)


def measure_kernels(family: str, setting: Setting) -> list[dict[str, Any]]:
    """Rows of one family of :data:`KERNELS`."""
    torch = torch_module()
    if setting.on == "cpu":
        torch.set_num_threads(setting.threads)
        keep_freed_memory()
    torch.manual_seed(0)
    with torch.no_grad():
        return list(KERNELS[family](_Bench(torch, setting)))


class _Bench:
    """Tensors and timing of one setting, and the columns that all rows share."""

    def __init__(self, torch: Any, setting: Setting) -> None:
        self.torch, self.setting = torch, setting
        self.dtype = getattr(torch, DTYPES[setting.dtype])
        self.width = dtype_bytes(setting.dtype)
        self.shapes = _FEW if setting.quick else _MANY
        m, n, k = _RATE_PROBE
        a, b = self.tensor(m, k), self.tensor(k, n)
        self.flop_per_s = 2.0 * m * n * k / self.time(lambda: torch.mm(a, b)).seconds
        self.origin = {
            "source": f"planner calibrate measure {datetime.now(UTC).date().isoformat()}",
            "accelerator": processor_name(setting),
            "library": "torch",
            "version": torch.__version__,
        }

    def tensor(self, *shape: int) -> Any:
        return self.torch.randn(*shape, device=self.setting.on, dtype=self.torch.float32).to(self.dtype)

    def time(self, call: Callable[[], object]) -> Timing:
        wait = self.torch.cuda.synchronize if self.setting.on == "cuda" else None
        return timed(call, wait, self.setting.threads)

    def row(self, kernel: str, columns: dict[str, Any], timing: Timing) -> dict[str, Any]:
        threads = f" {self.setting.threads} threads" if self.setting.on == "cpu" else ""
        return {
            **self.origin,
            "kernel_source": f"{kernel}{threads}",
            **columns,
            "latency_ms": f"{timing.seconds * 1e3:.6g}",
            "latency_min_ms": f"{timing.least_s * 1e3:.6g}",
            "latency_max_ms": f"{timing.most_s * 1e3:.6g}",
            "repeats": timing.repeats,
            "quiet": str(timing.quiet).lower(),
        }


def _gemm(bench: _Bench) -> Iterator[dict[str, Any]]:
    most = bench.flop_per_s * _LONGEST_S / 2.0
    shapes = [s for s in product(_ROWS, _WIDTHS, _WIDTHS) if s[0] * s[1] * s[2] <= most]
    for m, n, k in _spread(sorted(shapes, key=lambda s: (s[0] * s[1] * s[2], s)), bench.shapes):
        x, weight, out = bench.tensor(m, k), bench.tensor(n, k), bench.tensor(m, n)
        timing = bench.time(lambda x=x, w=weight, y=out: bench.torch.mm(x, w.t(), out=y))  # type: ignore[misc]
        yield bench.row("aten::mm", {"dtype": DTYPES[bench.setting.dtype], "m": m, "n": n, "k": k}, timing)


def _attention(bench: _Bench) -> Iterator[dict[str, Any]]:
    attend = bench.torch.nn.functional.scaled_dot_product_attention
    most = bench.flop_per_s * _LONGEST_S / 4.0
    shapes = [
        s
        for s in product(_BATCHES, _HEADS, _HEAD_DIMS, _LENGTHS)
        if s[0] * s[1] * s[2] * s[3] ** 2 * 2 <= most
    ]
    for batch, heads, width, length in _spread(sorted(shapes, key=_attention_size), bench.shapes // 2):
        columns = {
            "batch_size": batch, "q_len": length, "kv_len_total": length, "num_heads": heads, "num_key_value_heads": heads,
            "head_dim": width, "window_size": 0, "attn_dtype": DTYPES[bench.setting.dtype],
            "kv_cache_dtype": DTYPES[bench.setting.dtype],
        }  # fmt: skip
        q, k, v = (bench.tensor(batch, heads, length, width).requires_grad_() for _ in range(3))
        timing = bench.time(lambda q=q, k=k, v=v: attend(q, k, v, is_causal=True))  # type: ignore[misc]
        yield bench.row("scaled_dot_product_attention", {"phase": "prefill", "passes": 1, **columns}, timing)
        with bench.torch.enable_grad():
            timing = bench.time(_backward(bench, attend(q, k, v, is_causal=True), (q, k, v)))
        yield bench.row(
            "scaled_dot_product_attention",
            {"phase": "prefill", "passes": FLASH_BACKWARD_PASSES, **columns},
            timing,
        )


def _backward(bench: _Bench, out: Any, inputs: tuple[Any, ...]) -> Callable[[], object]:
    """The gradients of the inputs, again and again."""
    slope = bench.tensor(*out.shape)
    return lambda: bench.torch.autograd.grad(out, inputs, slope, retain_graph=True)


def _stream(bench: _Bench) -> Iterator[dict[str, Any]]:
    torch = bench.torch
    for size in _STREAM_BYTES if not bench.setting.quick else _STREAM_BYTES[::2]:
        count = int(size / bench.width)
        x, y, z = (bench.tensor(count) for _ in range(3))
        calls: tuple[tuple[str, float, Callable[[], object]], ...] = (
            ("copy", 2.0, lambda y=y, x=x: y.copy_(x)),  # type: ignore[misc]
            ("add", 3.0, lambda x=x, y=y, z=z: torch.add(x, y, out=z)),  # type: ignore[misc]
            ("mul", 2.0, lambda x=x, z=z: torch.mul(x, 0.5, out=z)),  # type: ignore[misc]
            ("sum", 3.0, lambda x=x, y=y: y.add_(x, alpha=0.5)),  # type: ignore[misc]
        )
        for name, passes, call in calls:
            columns = {
                "op": name,
                "dtype": DTYPES[bench.setting.dtype],
                "bytes_moved": int(passes * count * bench.width),
            }
            yield bench.row(f"aten::{name}", columns, bench.time(call))


KERNELS: dict[str, Callable[[_Bench], Iterator[dict[str, Any]]]] = {
    "gemm": _gemm, "attention": _attention, "stream": _stream,
}  # fmt: skip
"""Families of kernels, by the name of their file."""


def _attention_size(shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    batch, heads, width, length = shape
    return batch * heads * width * length * length, shape


def _spread(shapes: Sequence[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """At most ``count`` shapes at even spacing, both ends included."""
    if len(shapes) <= count:
        return list(shapes)
    return [shapes[round(i * (len(shapes) - 1) / (count - 1))] for i in range(count)]
