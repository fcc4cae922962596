"""Rows of training tables, made from a complete one by changing cells."""

import csv
from pathlib import Path

import pytest

from planner.validation.table import Row

PUBLISHED = Path(__file__).parents[2] / "examples" / "published_runs"

# Llama-3.1 8B on two DGX H100, as torchtitan's tables would print it.
COMPLETE = {
    "row_id": "a-1", "model": "Llama-3.1-8B", "n_layers": "32", "hidden": "4096", "ffn_hidden": "14336", "n_heads": "32",
    "n_kv_heads": "8", "head_dim": "128", "vocab": "128256", "seq_len": "8192", "mlp": "swiglu", "tied_embeddings": "false",
    "accelerator": "H100-SXM", "n_devices": "16", "devices_per_node": "8", "tp": "2", "sequence_parallel": "true", "cp": "1",
    "pp": "2", "vpp": "1", "zero_stage": "1", "micro_batch": "1", "global_batch": "64", "recompute": "full", "dtype": "bf16",
    "offload": "none", "framework": "Megatron-Core", "measured_date": "2025", "step_time_s": "4.0", "score_for": "time",
}  # fmt: skip


@pytest.fixture
def row():
    """Makes a row: the complete one with some cells changed."""

    def make(**cells: str) -> Row:
        return Row("a.csv", 2, {**COMPLETE, **cells})

    return make


@pytest.fixture
def table(tmp_path):
    """Writes rows as a CSV file, all columns of all rows."""

    def write(*rows: dict[str, str], name: str = "runs.csv") -> Path:
        columns = list(dict.fromkeys(column for cells in rows for column in cells))
        path = tmp_path / name
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write
