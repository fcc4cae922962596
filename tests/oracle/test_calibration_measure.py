"""Microbenchmarks run where PyTorch is installed, and what they write is read back as what was measured."""

import importlib.util

import pytest

from planner.calibration import collective_runs, kernel_runs
from planner.calibration.measure import Setting, measure_families, table_text
from planner.calibration.measurements import read_measurements
from planner.costs.compute import matmul_flop

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(
        not importlib.util.find_spec("torch"), reason="torch is not installed (extra: measure)"
    ),
]


@pytest.fixture
def small(monkeypatch):
    """Grids of a few shapes."""
    monkeypatch.setattr(kernel_runs, "_FEW", 6)
    monkeypatch.setattr(kernel_runs, "_LONGEST_S", 0.01)
    monkeypatch.setattr(kernel_runs, "_STREAM_BYTES", (2**14, 2**20))


def test_kernels(tmp_path, small):
    tables = measure_families(["gemm", "attention", "stream"], Setting(quick=True))
    assert {name: len(rows) for name, rows in tables.items()} == {"gemm": 6, "attention": 6, "stream": 4}
    for name, rows in tables.items():
        path = tmp_path / f"{name}.csv"
        path.write_text(table_text(rows))
        for row in read_measurements(path):
            assert 1e-8 < row.seconds < 1.0
            if name == "gemm":  # no core does more than 64 multiply-adds a cycle at 6 GHz
                assert matmul_flop(row.work.m, row.work.n, row.work.k) / row.seconds < 64 * 2 * 6e9


def test_collectives(tmp_path, monkeypatch):
    monkeypatch.setattr(collective_runs, "_SIZES_BYTES", (1024,))
    path = tmp_path / "collectives.csv"
    path.write_text(table_text(measure_families(["collectives"], Setting())["collectives"]))
    kinds = {row.work.kind for row in read_measurements(path)}
    assert kinds >= {"all_reduce", "all_gather", "broadcast", "all_to_all"}
