"""Scans of state-space layers against timings that others published: one constant, two unlike GPUs."""

from __future__ import annotations

import numpy as np
import pytest

from planner.costs.state_space import PRODUCT_SHARE, scan_work
from planner.engine.kernel_prices import KernelPrices
from planner.ledger import Axes, Stream
from planner.specs.device_file import load_device
from planner.specs.stack import load_stack

# Without the gate, which neither source's kernels have: its value and the ungated output; backward the gate, its gradient and
# four tensors of a kernel of its own.
_GATE, _GATE_BACKWARD = 2.0, 6.0


@pytest.mark.parametrize(
    ("tokens", "forwards", "measured_ms"),
    [(4096, 1, 51.7 / 46), (12288, 1, 71.5 / 23), (32768, 2, 258.8 / 23)],
)
def test_a_layer_of_nemotron_3_nano_takes_as_long_as_on_an_h100(
    tokens: int, forwards: int, measured_ms: float
) -> None:
    """nsys, all "mamba" kernels of a step over 23 layers and its micro-batches: GiscardBiamby/Automodel-scalingai-f26,
    mfu/results/*_nsys/nsys_breakdown.md; tokens per micro-batch from mfu/REPORT.md (rows of 4,096; the last with every layer run
    again in the backward)."""
    inner, keys = 4096, 8 * 128
    work = scan_work(inner, 128, 8, 128)
    convolved = inner + 2 * keys
    forward = work.elements - _GATE * inner + 2 * convolved, work.flop, 6.0
    backward = work.backward_elements - _GATE_BACKWARD * inner + 5 * convolved, work.backward_flop, 17.0
    items = [
        Stream(
            what="scan", block="layer", size="tokens", bytes_per_element=2 * float(elements),
            product_flop_per_element=float(flop), launches=launches,
        )
        for elements, flop, launches in (*[forward] * forwards, backward)
    ]  # fmt: skip
    prices = KernelPrices(load_device("h100-sxm"), load_stack())
    seconds = np.sum(list(prices.streams(items, Axes({"tokens": float(tokens)}))))
    assert seconds * 1e3 == pytest.approx(measured_ms, rel=0.12)  # found: -5, -1, -9 %


@pytest.mark.parametrize(("chunk", "measured_ms"), [(64, 87.611), (128, 63.571), (256, 56.995)])
def test_chunks_of_other_lengths_take_as_long_as_on_a_gb10(chunk: int, measured_ms: float) -> None:
    """DatasunriseOU/cppmega, docs/status, "Mamba SSD scan isolation", 2026-04-27: forward and backward of 4 sequences of 4,096
    tokens, 112 heads of 64, 8 groups, states of 128. GB10: 273 GB/s (its generation's share of it), 125 TFLOP/s."""
    inner, tokens = 112 * 64, 4 * 4096
    work = scan_work(inner, 128, 8, chunk)
    elements = work.elements + work.backward_elements - (_GATE + _GATE_BACKWARD) * inner
    moved_s = 2.0 * tokens * elements / (float(load_device("b200-sxm").efficiency.memory) * 273e9)
    product_s = tokens * (work.flop + work.backward_flop) / (PRODUCT_SHARE * 125e12)
    assert (moved_s + product_s) * 1e3 == pytest.approx(measured_ms, rel=0.12)  # found: -9, -3, +3 %
