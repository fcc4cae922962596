"""Experts' products of training, against Transformer Engine's as they were timed on a B200."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from planner.engine.kernel_prices import KernelPrices
from planner.ledger import Axes, Matmul
from planner.specs.device_file import load_device
from planner.specs.stack import load_stack

# MooreThreads/SimuMax configs/system/b200_bf16_ceperm.json @4dcaae5 (Transformer Engine 2.11's grouped products of DeepSeek-V2's
# and V3's experts, 128 to 9,832 tokens each, forward, backward and weight gradients); nothing is fitted to them.
_ROWS = Path(__file__).parents[1] / "data" / "expert_products.csv"


def test_experts_are_products_of_their_own_one_after_the_other():
    with _ROWS.open() as file:
        rows = list(csv.DictReader(file))
    apart, together = (np.array([_error(row, single=single) for row in rows]) for single in (False, True))
    assert len(rows) == 108
    assert np.median(np.abs(apart)) < 0.09  # found: 8.0 %
    assert np.median(np.abs(together)) > 0.15  # as one kernel of an inference library: 18 %
    assert np.percentile(np.abs(apart), 90) < 0.35  # found: 33 %


def _error(row: dict[str, str], *, single: bool) -> float:
    """Relative error of the predicted seconds, with a library's best kernels."""
    # A weight gradient is added to what has been accumulated: read and written.
    passes = 2.0 if row["pass"] == "weight" else 1.0
    item = Matmul(
        what="moe.fc1", block="moe", m="m", n="n", k="k", groups="experts", grouped=True, single=single, dtype="bf16",
        out_bytes=passes * {"bf16": 2.0, "fp32": 4.0}[row["written"]],
    )  # fmt: skip
    axes = Axes({name: float(row[name]) for name in ("m", "n", "k", "experts")})
    (seconds,) = KernelPrices(load_device("b200-sxm"), load_stack()).matmuls([item], axes)
    return float(np.ravel(seconds)[0]) / (float(row["latency_ms"]) / 1e3) - 1.0
