"""Intervals of serving at a source that nothing was fitted to: the fit recovers what is put in, and every source counts once."""

import math

import numpy as np
import pytest

from planner.specs.device_file import load_device
from planner.specs.stack import load_stack
from planner.uncertainty.serving import LOADS, NOVELTIES, QUANTITIES, novelty_of, serving_interval
from planner.validation.serving_spreads import ServingResidual, fit_serving_spreads, held_of_sources

Z80 = 1.2816  # of a normal distribution, 80 % lie within so many deviations: z(0.9) of its table


def drawn(sources, rows, within, between, seed=0):
    """Runs that err by ``within`` around what their source errs by as a whole."""
    draw = np.random.default_rng(seed)
    return [
        ServingResidual("tpot_s", "dense", f"source {n}", error, whole + error)
        for n, whole in enumerate(draw.normal(0.0, between, sources))
        for error in draw.normal(0.0, within, rows)
    ]


def test_spreads_within_and_between_sources_add_up_as_independent_errors_do():
    """3 % within and 4 % between are 5 %, of which 80 % lie within 6.4 %."""
    found = fit_serving_spreads(drawn(2000, 3, 0.03, 0.04))["tpot_s"]
    assert found["within"]["dense"] == pytest.approx(Z80 * 0.03, rel=0.05)
    assert math.hypot(found["within"]["dense"], found["between"]["closed"]["source"]) == pytest.approx(
        Z80 * 0.05, rel=0.05
    )


def test_a_source_counts_once_however_many_runs_it_has():
    """Nine sources are off by a tenth, one with a thousand runs by a half: nine of ten hold with a tenth."""
    small = [ServingResidual("ttft_s", "dense", f"small {n}", 0.0, 0.1) for n in range(9)]
    large = [ServingResidual("ttft_s", "dense", "large", 0.0, 0.5)] * 1000
    assert fit_serving_spreads([*small, *large])["ttft_s"]["between"]["closed"]["source"] == pytest.approx(
        0.1
    )


def test_intervals_hold_eight_of_ten_runs_of_sources_left_out():
    held = held_of_sources(drawn(60, 20, 0.05, 0.1, seed=1))["tpot_s"]["published"]
    assert held["held"] == pytest.approx(0.8, abs=0.05)
    assert held["sources"] == 60


def test_runs_without_a_prediction_and_kinds_without_models_left_out_are_not_counted():
    known = ServingResidual("tpot_s", "dense", "a", 0.1, 0.1)
    silent = ServingResidual("tpot_s", "dense", "b", math.nan, math.nan)
    alone = ServingResidual("tpot_s", "pools", "b", math.nan, 9.0)
    found = fit_serving_spreads([known, silent, alone])["tpot_s"]
    assert (found["rows"], found["sources"], found["between"]["closed"]["source"]) == (1, 1, 0.0)


def test_what_is_newer_is_no_better_known():
    """An engine is off by 0.3, a device by 0.2: a new device comes with an engine that is new on it."""
    off = {"source": 0.1, "engine": 0.3, "device": 0.2}
    rows = [
        ServingResidual("tpot_s", "dense", f"{new} {n}", 0.0, error, novelty=new)
        for n in range(9)
        for new, error in off.items()
    ]
    found = fit_serving_spreads(rows)["tpot_s"]["between"]["closed"]
    assert found == pytest.approx({"source": 0.1, "engine": 0.3, "device": 0.3})


def test_what_comes_whenever_it_does_is_no_better_known_than_clients_that_wait():
    """Clients' runs are off by 0.2, arrivals' by 0.1 of known engines and by 0.5 of new ones."""
    told = {("closed", "source"): 0.2, ("open", "source"): 0.1, ("open", "engine"): 0.5}
    rows = [
        ServingResidual("tpot_s", "dense", f"source {n}", 0.0, error, load, new)
        for n in range(9)
        for (load, new), error in told.items()
    ]
    found = fit_serving_spreads(rows)["tpot_s"]["between"]
    assert found["closed"] == pytest.approx({"source": 0.2, "engine": 0.2, "device": 0.2})
    assert found["open"] == pytest.approx({"source": 0.2, "engine": 0.5, "device": 0.5})


def test_held_out_runs_widen_and_are_told_apart():
    """Nine published sources are off by 0.1, nine held-out ones by 0.4: eight of ten sources lie within 0.4."""
    published = [ServingResidual("tpot_s", "dense", f"known {n}", 0.0, 0.1) for n in range(9)]
    others = [
        ServingResidual("tpot_s", "dense", f"other {n}", math.nan, -0.4, held_out=True) for n in range(9)
    ]
    rows = [*published, *others]
    assert fit_serving_spreads(rows)["tpot_s"]["between"]["closed"]["source"] == pytest.approx(0.4)
    held = held_of_sources(rows)["tpot_s"]
    assert {name: (v["held"], v["held_rows"], v["sources"]) for name, v in held.items()} == {
        "published": (1.0, 1.0, 9),
        "held out": (1.0, 1.0, 9),
    }


@pytest.mark.parametrize(
    ("stack", "device", "new"),
    [("vllm", "h100-sxm", "source"), ("vllm", "l40s", "engine"), ("vllm", "gaudi3", "device")],
)
def test_what_is_new_of_an_engine_on_a_device(stack, device, new):
    """vLLM was fitted on Hopper; on Ada its kernels were measured, by other engines; Gaudi's nobody measured."""
    assert novelty_of(load_stack(stack), load_device(device)) == new


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("pools", [False, True])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("novelty", NOVELTIES)
def test_every_prediction_lies_in_its_interval(experts, pools, load, novelty):
    """Rates of pools, of which few were published, have the spread of their kind of model."""
    found = serving_interval(experts, pools, load, novelty, dict.fromkeys(QUANTITIES, 2.0) | {"other": 1.0})
    assert set(found) == set(QUANTITIES)
    for low, high in found.values():
        assert low < 2.0 < high
        assert low * high == pytest.approx(4.0)
