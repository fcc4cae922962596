"""The fit of kernels' constants: it finds the constants that made the times, from all calls and from a dozen."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from planner.specs.device import Sourced
from planner.validation.kernel_tables import batches
from planner.validation.table import read_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def kernel_fit():
    spec = importlib.util.spec_from_file_location("kernel_fit", ROOT / "benchmarks" / "kernel_fit.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel_fit"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["kernel_fit"]


def prompts():
    """Calls of SGLang's FlashAttention over prompts in bf16 on A100."""
    found, _ = batches(read_table(ROOT / "tests/data/kernels/aic_attention_prefill_a100_sxm.csv"))
    return next(b for b in found if b.library.name == "FlashAttention, Ampere")


def with_constants(batch, **values):
    """A batch whose library has some other constants."""
    own = {name: Sourced(value, "fitted", "kernel-fit") for name, value in values.items()}
    return replace(batch, library=replace(batch.library, constants={**batch.library.constants, **own}))


def test_a_dozen_calls_find_the_constants_that_made_them(kernel_fit):
    batch = kernel_fit.as_any_library(prompts())
    truth = with_constants(batch, call_s=2.3e-5, rate=0.5, walk=3.0)
    made = replace(batch, measured_s=kernel_fit.Fit({}).seconds(truth))
    every = np.argsort(made.measured_s)[np.linspace(0, len(made.rows) - 1, 12).round().astype(int)]
    mask = np.isin(np.arange(len(made.rows)), every)
    told = kernel_fit.fit_few([made.take(mask)], {})
    left = made.take(~mask)
    assert told.seconds(left) == pytest.approx(left.measured_s, rel=0.05)
    assert told.values["", "attention: FlashAttention, Ampere", "call_s"] == pytest.approx(2.3e-5, rel=0.15)


def test_calls_that_share_no_constant_are_fitted_apart(kernel_fit):
    one = prompts()
    other = replace(one, library=replace(one.library, name="another"))
    keys = [kernel_fit.keys_of(b, "attention") for b in (one, other)]
    libraries = [[key for key in own if key[1]] for own in keys]
    assert len(kernel_fit._linked([one, other], libraries)) == 2
    assert len(kernel_fit._linked([one, other], keys)) == 1  # their device's constants are the same


def test_two_libraries_of_one_name_keep_what_each_is_like(kernel_fit):
    found = kernel_fit.Fit({})
    slow, fast = (with_constants(prompts(), rate=rate) for rate in (0.1, 0.9))
    assert found.library(slow.library)["rate"] == 0.1
    assert found.library(fast.library)["rate"] == 0.9


def test_a_constant_nudged_prices_as_if_it_were_fitted_anew(kernel_fit):
    batch = prompts()
    for key in (("ampere", "", "attention"), ("", "attention: FlashAttention, Ampere", "call_s")):
        base = kernel_fit.Fit(
            {("ampere", "", "attention"): 0.6, ("", "attention: FlashAttention, Ampere", "call_s"): 1e-5}
        )
        base.seconds(batch)  # what is kept of it must not be the other's
        nudged = base.nudged(key, 0.2)
        anew = kernel_fit.Fit({**base.values, key: base.values[key] * float(np.exp(0.2))})
        assert nudged.seconds(batch) == pytest.approx(anew.seconds(batch), rel=1e-12)
        assert np.abs(nudged.seconds(batch) / base.seconds(batch) - 1.0).max() > 1e-3
