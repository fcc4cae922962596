"""One time limit for all searches of a command."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner import load_model
from planner.plans.plan import SearchResult
from planner.solve import time_limit
from planner.solve.layerwise.search import search_layerwise
from planner.solve.mixed.search import search_mixed
from planner.solve.time_limit import OutOfTimeError, TimeLimit, ask
from planner.solve.train import search
from planner.specs.hardware import load_cluster
from planner.specs.problem import Problem
from planner.specs.stack import load_stack
from planner.specs.workload import TrainWorkload


class Clock:
    """A clock that goes on by a millisecond whenever it is read."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self) -> float:
        self.reads += 1
        return 1e-3 * self.reads


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time_limit, "perf_counter", clock)
    return clock


def job(**changes) -> Problem:
    fixed = {"tp": "1", "cp": "1", "sequence_parallel": "false", "tensor_overlap": "none"}
    problem = Problem(
        load_model("opt-1.3b"), load_cluster("rtx-4090:2x2"), TrainWorkload(16, 2048), load_stack(), fixed=fixed, reserve=0.5,
        forbidden=("*_offload",),
    )  # fmt: skip
    return replace(problem, **changes)


def test_a_limit_ends_what_asks_and_the_narrowest_holds():
    ask()
    with TimeLimit(3600.0).enforced():
        ask()
        with TimeLimit(-1.0).enforced(), TimeLimit(3600.0).enforced(), pytest.raises(OutOfTimeError):
            ask()
        ask()
    ask()


def test_what_a_search_leaves_goes_to_the_next_one(clock):
    limit = TimeLimit(1.0)
    assert limit.share(4).seconds == pytest.approx(0.25, abs=2e-3)
    clock.reads += 100
    assert limit.share(3).seconds == pytest.approx(0.9 / 3, abs=2e-3)
    clock.reads += 10_000
    assert limit.left_s == 0.0


def test_the_search_before_that_of_degrees_gets_half_of_the_time():
    given = []

    def base(problem, top, on_progress, time_limit_s) -> SearchResult:
        given.append(time_limit_s)
        return search(problem, top, on_progress)

    search_mixed(job(), 1, base=base, time_limit_s=600.0)
    assert given == [pytest.approx(300.0, rel=1e-3)]


@pytest.mark.parametrize("steps", [0, 3, 30, 100])
@pytest.mark.parametrize("which", [search_layerwise, search_mixed])
def test_a_search_that_is_out_of_time_ends_at_once_with_a_bound_that_holds(clock, which, steps):
    """Wherever the time ends; the whole search's plan is no faster than the bound."""
    whole = which(job(), 1).best.estimate.step_time_s
    clock.reads = 0
    found = which(job(), 1, time_limit_s=1e-3 * steps)
    account = found.layerwise if which is search_layerwise else found.mixed
    assert account["stopped"] == "time"
    assert found.best.optimality.status == "gap"
    assert 0.0 < found.best.optimality.bound_s <= whole * (1 + 1e-9)
    assert clock.reads <= steps + 10
