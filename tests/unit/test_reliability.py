"""Failures and checkpoints: the closed forms against chance, brute force and a published run."""

from __future__ import annotations

import numpy as np
import pytest

from planner.costs.reliability import (
    best_interval_s,
    checkpoint_stall_s,
    daly_interval_s,
    expected_slowdown,
    fleet_mtbf_s,
    young_interval_s,
)
from planner.report.goodput import Failures, checkpoint_bytes, goodput
from planner.solve.named import examine
from planner.specs.cluster_file import load_cluster
from planner.specs.models import load_model
from planner.specs.problem import Problem
from planner.specs.stack import load_stack
from planner.specs.workload import TrainWorkload


def played(interval, stall, restart, mtbf, segments, seed):
    """A run of many segments with failures drawn one by one; a failure in a segment or a restart begins the restart again."""
    rng = np.random.default_rng(seed)
    clock = 0.0
    for _ in range(segments):
        while True:
            failure = rng.exponential(mtbf)
            if failure >= interval + stall:
                clock += interval + stall
                break
            clock += failure
            while (again := rng.exponential(mtbf)) < restart:
                clock += again
            clock += restart
    return clock / (segments * interval)


@pytest.mark.parametrize(
    ("interval", "stall", "restart", "mtbf"), [(1000.0, 50.0, 120.0, 5000.0), (300.0, 30.0, 600.0, 1500.0)]
)
def test_expected_slowdown_is_that_of_drawn_failures(interval, stall, restart, mtbf):
    expected = expected_slowdown(interval, stall, restart, mtbf)
    assert played(interval, stall, restart, mtbf, 40_000, 1) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("stall", [0.01, 1.0, 60.0, 900.0, 9000.0])
@pytest.mark.parametrize("mtbf", [1800.0, 1e4, 1e7])
def test_the_best_interval_is_the_best(stall, mtbf):
    best = float(best_interval_s(stall, mtbf))
    grid = np.geomspace(best / 10, best * 10, 20001)
    brute = grid[np.argmin(expected_slowdown(grid, stall, 300.0, mtbf))]
    assert best == pytest.approx(brute, rel=1e-3)
    assert 0.0 < best < mtbf


def test_youngs_and_dalys_intervals():
    # A stall of 5 minutes, a failure a day: √(2·300·86400) = 7200 s; Daly's terms take off the stall and add a little.
    assert young_interval_s(300.0, 86400.0) == pytest.approx(7200.0)
    assert daly_interval_s(300.0, 86400.0) == pytest.approx(
        7200.0 * (1 + 0.0416667 / 3 + 0.0416667**2 / 9) - 300.0, rel=1e-6
    )
    assert (
        daly_interval_s(10.0, 2.0) == 2.0
    )  # a stall longer than two failures apart: the mean time between failures
    assert daly_interval_s(300.0, 86400.0) == pytest.approx(best_interval_s(300.0, 86400.0), rel=1e-3)


@pytest.mark.reaches("datastates_llm")
def test_stalls_by_mode():
    # 14 GB per device, 1 GB/s to the store, 28 GB/s to the host, 0.2 s of forward and backward.
    assert [
        checkpoint_stall_s(mode, 14e9, 1e9, 28e9, 0.2) for mode in ("sync", "async", "lazy")
    ] == pytest.approx([14.0, 0.5, 0.3])
    with pytest.raises(ValueError, match="sync, async or lazy"):
        checkpoint_stall_s("never", 1.0, 1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def llama_3():
    """Llama 3 405B on 16,384 H100, tp 8, pp 16 (arXiv:2407.21783, Table 4)."""
    fixed = {"tp": "8", "pp": "16"}
    workload = TrainWorkload(2048, 8192, tokens=15.6e12)
    return examine(
        Problem(
            load_model("llama3.1-405b"), load_cluster("h100-sxm:2048x8"), workload, load_stack(), fixed=fixed
        )
    )


def test_checkpoints_hold_weights_and_states_once(llama_3):
    # 2 bytes of weights and 12 of fp32 weights and moments per parameter, 405.85e9 of them; the ends hold an embedding more.
    every = checkpoint_bytes(llama_3) * 16384
    assert every == pytest.approx(14 * 405.85e9, rel=0.06)


def test_goodput_of_llama_3(llama_3):
    """ "Higher than 90 % effective training time" with 419 failures in 54 days (arXiv:2407.21783, section 3.3.4)."""
    found = goodput(llama_3, Failures(), 50e9)
    assert found["mtbf_s"] / 3600 == pytest.approx(54 * 24 / 419)
    assert 0.90 < found["goodput"] < 0.97
    assert found["run"]["run_s"] == pytest.approx(15.6e12 / (2048 * 8192) * found["expected_step_s"])
    assert sum(found["lost"].values()) == pytest.approx(1.0 - found["goodput"])


def test_goodput_grows_as_failures_become_rare(llama_3):
    each = [goodput(llama_3, Failures(device_mtbf_s=m), 50e9)["goodput"] for m in (1e7, 1e8, 1e9, 1e12)]
    assert each == sorted(each)
    assert each[-1] == pytest.approx(1.0, abs=1e-3)
    by_mode = [goodput(llama_3, Failures(mode=mode), 50e9)["goodput"] for mode in ("sync", "async", "lazy")]
    assert by_mode == sorted(by_mode)


def test_a_fleet_fails_as_often_as_all_its_devices():
    assert fleet_mtbf_s(1e8, np.array([1.0, 1000.0])).tolist() == [1e8, 1e5]
