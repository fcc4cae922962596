"""Published figures of serving that are one formula of the cost library, or one iteration, away."""

import numpy as np
import pytest

import planner
from planner.costs.compute import matmul_bytes, matmul_flop, memory_bound_s, roofline_s
from planner.costs.queueing import mg1_wait_s, tandem_response_s
from planner.engine import Pricer
from planner.iteration import Iterations
from planner.mesh import Mesh
from planner.specs.stack import load_stack
from planner.specs.traffic import Traffic
from planner.technique import ServingContext, discover


@pytest.mark.parametrize(
    ("load", "communication", "imbalance"),
    [(0.5, 1.0692, 1.3333), (1.0, 1.1315, 1.2361), (1.5, 1.1111, 1.1231)],
)
def test_overhead_that_a_shared_pipeline_may_have(load, communication, imbalance):
    """Two models on a device each wait as long as on a pipeline of both with so much longer stages.

    AlpaServe (Li et al., OSDI 2023), queueing_theory_plot.py of alpa-projects/mms: D = 1, half of the requests each.
    """
    apart_s = 1.0 + mg1_wait_s(load / 2.0, 1.0, 0.0)
    assert tandem_response_s(load, communication, communication / 2.0) == pytest.approx(apart_s, rel=1e-3)
    assert tandem_response_s(load, 1.0, imbalance / 2.0) == pytest.approx(apart_s, rel=1e-3)


@pytest.mark.parametrize("rate", [0.2, 0.8, 1.5])
def test_prefill_over_two_devices(rate):
    """DistServe (Zhong et al., OSDI 2024), equations 2 and 3 with D = 1: stages, and tensor ranks that speed up K = 1.6 times."""
    stages_s = 1.0 + rate / (4.0 * (2.0 - rate))
    assert tandem_response_s(rate, 1.0, 0.5) == pytest.approx(stages_s)
    ranks_s = 1.0 / 1.6 + rate / (2.0 * 1.6 * (1.6 - rate))
    assert 1.0 / 1.6 + mg1_wait_s(rate, 1.0 / 1.6, 0.0) == pytest.approx(ranks_s)


@pytest.mark.parametrize(
    ("rows", "least", "most"),
    [(1, 3.75, 4.0), (16, 3.75, 4.0), (32, 3.75, 4.0), (64, 3.2, 3.4), (128, 1.6, 1.75)],
)
def test_four_bit_weights_by_batch(rows, least, most):
    """MARLIN (Frantar et al., PPoPP 2025): close to 4 times as fast up to batches of 32, less and less beyond.

    8,192 x 8,192 weights on an A10 (600 GB/s, 125 Tflop/s, its data sheet); a scale of 16 bits for 128 weights of 4.
    """

    def seconds(weight_bytes):
        moved = matmul_bytes(rows, 8192, 8192, weight_bytes_per_element=weight_bytes)
        return roofline_s(matmul_flop(rows, 8192, 8192) / 125e12, memory_bound_s(moved, 600e9))

    assert least <= seconds(2.0) / seconds(0.5 + 2.0 / 128.0) <= most


@pytest.mark.parametrize(("bits_per_s", "expected_s"), [(256e9, 5.5), (128e9, 11.0)])
def test_a_step_of_offloaded_bloom(bits_per_s, expected_s):
    """Petals (Borzunov et al., ACL 2023), section 3: 176 GB of 8-bit BLOOM-176B over PCIe, for each token."""
    assert memory_bound_s(176e9, bits_per_s / 8.0) == pytest.approx(expected_s)


@pytest.mark.parametrize(("batch", "expected_ms"), [(4, 2.5), (256, 21.0)])
def test_steps_of_a_30b_model(batch, expected_ms):
    """How to Scale Your Model (jax-ml.github.io/scaling-book, inference): int8, 100 kB a token, 8,192 of them, 16 v5e."""
    memory_bytes_per_s, flop_per_s = 16 * 8.1e11, 16 * 1.97e14
    cache_s = memory_bound_s(batch * 8192 * 100e3, memory_bytes_per_s)
    weights_s = roofline_s(2.0 * batch * 30e9 / flop_per_s, memory_bound_s(30e9, memory_bytes_per_s))
    assert (cache_s + weights_s) * 1e3 == pytest.approx(expected_ms, rel=0.03)


def iterations(model, cluster, **knobs):
    defaults = {t.slot: t.choices[0] for t in discover("serving").values() if t.default}
    one = np.ones(1)
    mesh, machines, stack = (
        Mesh(one, one, one, one, one, one),
        planner.load_cluster(cluster),
        load_stack("vllm"),
    )
    ctx = ServingContext(planner.load_model(model), machines, Traffic(1, 1), stack, mesh, defaults | knobs)
    return Iterations(ctx, Pricer(machines, stack))


@pytest.mark.parametrize(("batch", "expected_ms"), [(1, 4.17), (8, 5.60), (240, 52.99)])
def test_fewer_key_heads(batch, expected_ms):
    """The same book: Llama 2 13B on 8 v5e (819 GB/s) with a fifth of the cache, 8,192 tokens of context."""
    held = iterations("llama2-13b", "h100-sxm:1x1").footprint()
    n_bytes = float(held.weights_bytes[0]) + batch * 8192 * float(held.token_bytes[0]) / 5.0
    assert n_bytes / (8 * 8.19e11) * 1e3 == pytest.approx(expected_ms, rel=0.006)


def test_an_eight_bit_cache_halves_what_context_costs():
    """Llama-3.1 8B, one sequence, one H100: time between tokens grows by 54 % as much per token of context.

    The vLLM project's blog on FP8 caches (2026-04-22): 4.37e-5 and 2.37e-5 ms per token of context. The kernels' fitted
    constants say 67 %: the gain is underrated by a quarter, which is the bound here.
    """

    def slope_s(cache):
        price = iterations("llama3.1-8b", "h100-sxm:1x1", cache=cache)
        return float(price(1.0, 110_000.0, 0.0, 0.0) - price(1.0, 10_000.0, 0.0, 0.0)) / 100_000

    assert slope_s("fp8") / slope_s("bf16") == pytest.approx(0.54, rel=0.27)
    assert slope_s("bf16") * 1e3 == pytest.approx(4.37e-5, rel=0.3)
