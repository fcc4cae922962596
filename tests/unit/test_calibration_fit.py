"""The robust fit: planted constants come back, groups are left out whole, and what rows do not say is not fitted."""

import numpy as np
import pytest

from planner.calibration import Constant, fit
from planner.errors import SpecError

RATE, LATENCY = Constant("rate", 1e9, 1e6, 1e12), Constant("latency_s", 1e-4, 1e-8, 1e-1)


def line(n_bytes):
    """Hockney's α–β law of messages."""
    return lambda values: values["latency_s"] + n_bytes / values["rate"]


def messages(rows=80, noise=0.0, seed=0):
    """Sizes, and times under 25 GB/s and 8 µs with log-normal noise."""
    n_bytes = np.geomspace(1e3, 1e9, rows)
    seconds = (8e-6 + n_bytes / 25e9) * np.exp(noise * np.random.default_rng(seed).standard_normal(rows))
    return n_bytes, seconds


def test_planted_constants_come_back_exactly_without_noise():
    n_bytes, seconds = messages()
    found = fit(line(n_bytes), seconds, [RATE, LATENCY], groups=range(80))
    assert found.values == pytest.approx({"rate": 25e9, "latency_s": 8e-6}, rel=1e-4)
    assert found.left_out.median < 1e-4


def test_intervals_hold_the_truth_and_are_about_two_standard_errors_wide():
    # 5 % noise. About half of 80 rows tell of each constant, so its standard error is about 5 %/√40 = 0.8 % or somewhat more.
    held = 0
    for seed in range(20):
        n_bytes, seconds = messages(noise=0.05, seed=seed)
        rate = next(
            c
            for c in fit(line(n_bytes), seconds, [RATE, LATENCY], groups=range(80)).fitted
            if c.name == "rate"
        )
        held += rate.low <= 25e9 <= rate.high
        assert 1.02 < rate.high / rate.low < 1.12
    assert held >= 17  # 95 % of 20, less two standard deviations of a binomial count


def test_a_tenth_of_wild_outliers_moves_a_constant_by_less_than_three_percent():
    n_bytes, seconds = messages(noise=0.02)
    seconds[::10] *= 8.0
    found = fit(line(n_bytes), seconds, [RATE, LATENCY], groups=range(80))
    assert found.values["rate"] == pytest.approx(25e9, rel=0.03)
    assert found.values["latency_s"] == pytest.approx(8e-6, rel=0.03)


def test_left_out_error_is_that_of_whole_groups():
    # Four devices of unlike rates: the slowest and the fastest are worse predicted by the others than with rows of their own.
    rates = np.repeat([1.0e9, 1.2e9, 1.4e9, 1.6e9], 30)
    n_bytes = np.tile(np.geomspace(1e6, 1e9, 30), 4)
    seconds = n_bytes / rates
    by_device = fit(lambda c: n_bytes / c["rate"], seconds, [RATE], groups=[str(r) for r in rates], folds=4)
    by_row = fit(lambda c: n_bytes / c["rate"], seconds, [RATE], groups=range(120), folds=4)
    assert (by_device.groups, by_row.groups) == (4, 120)
    assert by_device.left_out.mean > 1.15 * by_row.left_out.mean
    left_out = by_device.left_out_predicted.reshape(4, 30) / n_bytes.reshape(4, 30)
    # The slowest device, predicted by three faster ones, must look faster than when it takes part.
    assert (left_out[0] < 0.99 * by_device.predicted[:30] / n_bytes[:30]).all()


def test_one_constant_per_twenty_rows():
    n_bytes, seconds = messages(rows=39)
    found = fit(line(n_bytes), seconds, [RATE, LATENCY], groups=range(39))
    assert [c.name for c in found.fitted] == ["rate"]
    assert found.values["latency_s"] == LATENCY.prior
    assert any("fewer than 20" in c.reason or "one per 20" in c.reason for c in found.kept)


def test_too_few_rows_fit_nothing_and_say_so():
    n_bytes, seconds = messages(rows=5)
    found = fit(line(n_bytes), seconds, [RATE, LATENCY], groups=range(5))
    assert found.fitted == ()
    assert {c.name for c in found.kept} == {"rate", "latency_s"}


def test_a_constant_that_no_row_depends_on_is_kept():
    n_bytes, seconds = messages()
    found = fit(line(n_bytes), seconds, [RATE, LATENCY, Constant("other", 1.0, 0.1, 10.0)], groups=range(80))
    assert [(c.name, c.reason) for c in found.kept] == [("other", "no row depends on it")]


def test_two_constants_that_only_their_product_tells_are_not_both_fitted():
    x = np.linspace(1.0, 2.0, 80)
    both = [Constant("a", 1.0, 0.1, 10.0), Constant("b", 1.0, 0.1, 10.0)]
    noise = np.exp(0.05 * np.random.default_rng(1).standard_normal(80))
    found = fit(lambda c: c["a"] * c["b"] * x, 3.0 * x * noise, both, groups=range(80))
    assert len(found.fitted) <= 1 or found.values["a"] * found.values["b"] == pytest.approx(3.0, rel=0.05)


def test_a_truth_outside_the_bounds_ends_at_the_bound_and_says_so():
    n_bytes, seconds = messages()
    found = fit(line(n_bytes), seconds, [Constant("rate", 1e9, 1e6, 5e9), LATENCY], groups=range(80))
    assert next(c for c in found.fitted if c.name == "rate").at_bound


def test_one_group_leaves_nothing_out():
    n_bytes, seconds = messages()
    found = fit(line(n_bytes), seconds, [RATE, LATENCY], groups=["same"] * 80)
    assert found.left_out is None
    assert np.isnan(found.left_out_predicted).all()


def test_the_spread_is_the_noise():
    # 80 % of a normal distribution lie within 1.28 standard deviations.
    n_bytes, seconds = messages(rows=400, noise=0.05)
    found = fit(line(n_bytes), seconds, [RATE, LATENCY], groups=range(400))
    assert found.spread == pytest.approx(1.28 * 0.05, rel=0.15)


@pytest.mark.parametrize(
    ("measured", "groups", "words"),
    [
        ([], [], "no rows"),
        ([1.0, np.nan], [0, 1], "not positive"),
        ([1.0, 0.0], [0, 1], "not positive"),
        ([1.0], [0, 1], "one per row"),
    ],
)
def test_wrong_measurements_are_one_error(measured, groups, words):
    with pytest.raises(SpecError, match=words):
        fit(lambda c: np.ones(len(measured)), measured, [RATE], groups)


def test_a_prior_outside_its_bounds_is_an_error():
    with pytest.raises(SpecError, match="outside"):
        fit(lambda c: np.ones(1), [1.0], [Constant("rate", 5.0, 0.1, 1.0)], [0])
