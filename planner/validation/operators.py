"""Kernels that others measured, held against the prices that the engine would give them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from planner.engine.kernels import Kernels
from planner.specs.device import Device
from planner.validation.kernel_tables import Batch, batches
from planner.validation.kernel_work import Array
from planner.validation.scores import ScoredRow
from planner.validation.table import Row, read_table

__all__ = ["METRICS", "contradictions", "price", "score_kernels"]

METRICS = ("gemm", "attention_prefill", "attention_decode", "moe", "elementwise")


def score_kernels(path: str | Path) -> list[ScoredRow]:
    """Scores every row of a table of kernels by its seconds.

    Rows of unknown accelerators, number formats, operators and models are unsupported, with the reason.

    Raises:
        SpecError: the file cannot be read.
    """
    found, refused = batches(read_table(path))
    scored = [
        ScoredRow(
            row.row_id, row.file, batch.metric, "excluded" if reason else "scored", reason, float(measured),
            float(predicted), _groups(row),
        )
        for batch in found
        for row, measured, predicted, reason in zip(
            batch.rows, batch.measured_s, price(batch), contradictions(batch), strict=True
        )
    ]  # fmt: skip
    scored += [
        ScoredRow(row.row_id, row.file, metric, "unsupported", reason, groups=_groups(row))
        for row, metric, reason in refused
    ]
    lines = {row.row_id: row.line for batch in found for row in batch.rows} | {
        row.row_id: row.line for row, _, _ in refused
    }
    return sorted(scored, key=lambda score: lines[score.row_id])


def price(batch: Batch, device: Device | None = None) -> Array:
    """Predicted seconds of a batch's rows, on its own device or another profile of it."""
    return np.asarray(batch.work.seconds(Kernels(device or batch.device, alone=True), batch.library))


def contradictions(batch: Batch) -> list[str]:
    """Why a row cannot be a measurement of what it says, empty where it can.

    A kernel that reads more than twice what the second-level cache holds reads it from memory, and no faster than the data sheet
    says. Where most of a kernel's rows that large do, what was timed is not the kernel, and none of its rows counts.
    """
    device, n_bytes = batch.device, batch.work.read_bytes()
    rate = n_bytes / batch.measured_s / float(device.memory_bytes_per_s)
    large = n_bytes > 2.0 * float(device.l2_bytes)
    impossible = large & (rate > 1.0)
    others = (
        f"{impossible.sum()} of this kernel's {large.sum()} large calls read faster than the memory can deliver"
        if impossible.sum() > 0.5 * large.sum()
        else ""
    )
    return [
        f"reads {each:.2g} times what the memory can deliver" if bad else others
        for each, bad in zip(rate, impossible, strict=True)
    ]


def _groups(row: Row) -> Mapping[str, str]:
    """What rows may be grouped by; a kernel's family is its library."""
    return {
        "family": row.text("framework") or row.text("source").partition("@")[0],
        "accelerator": row.text("accelerator"),
        "source": row.file,
        "model": row.text("model"),
    }
