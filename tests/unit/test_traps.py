"""Errors that surveys and common formulas of training techniques make, each as a test that a model without it passes."""

from __future__ import annotations

import numpy as np
import pytest

from planner.costs import pipeline
from planner.costs.flop import gpt_iteration_flop, gpt_parameters, model_flop_utilization, training_s
from planner.costs.memory import activation_bytes, megatron_state_bytes, zero_state_bytes
from planner.costs.offload import zero_offload_bytes
from planner.schedule.engine import simulate
from planner.schedule.order import make_order, repeated
from planner.technique import catalogue, discover
from planner.techniques import figures
from planner.techniques.training.schedule.chimera import CONCATENATED
from planner.techniques.training.schedule.dualpipe import BOTH_WAYS
from planner.techniques.training.schedule.hanayo import ORDER as HANAYO
from planner.techniques.training.schedule.zero_bubble import H2

VOCAB, SEQ = 51200, 2048


def test_pipedream_with_two_weights_is_2bw():
    # A survey prints "PipeDream-2BM"; arXiv:2006.09503 is titled after double-buffered weights, 2BW.
    entry = catalogue()["pipedream_2bw"]
    assert "2bw" in entry.choices
    assert entry.source == "arXiv:2006.09503"


def test_zero_offload_leaves_weights_on_the_device():
    # arXiv:2101.06840, section 3: 16-bit weights stay, gradients and fp32 states go; a survey says part of the parameters goes.
    parts = {}
    for choice in ("none", "cpu+gradients"):
        ledger, _ = figures.recipe(
            model="gpt2-xl", precision="fp16", optimizer_offload=choice, zero_stage="2", dp=2
        )
        parts[choice] = figures.held_bytes(ledger, "parameters")
        states = figures.held_bytes(ledger, "optimizer", tier="host")
    assert parts["cpu+gradients"] == parts["none"] > 0
    assert states > 0
    assert (
        zero_offload_bytes(1.0) == 2.0
    )  # gradients down and weights up, 16 bits each: a sum of 4 bytes over both ways


def test_interleaving_has_any_number_of_chunks():
    # A survey describes exactly two; arXiv:2104.04473, section 2.2.2, has v, and the bubble is divided by it.
    for v in (2, 3, 4):
        seconds = [np.full(4 * v, s / v) for s in (1.0, 2.0)]
        assert simulate(make_order("interleaved", 4, 8, v), *seconds).bubble_s.max() == pytest.approx(9.0 / v)


def test_flexflow_searches_parallelism():
    # A survey cites the CNN accelerator of HPCA 2017 for it; the planner's entry is Jia et al. (arXiv:1807.05358), a solver.
    assert discover("training")["flexflow"].kind == "solver"
    assert discover("training")["flexflow"].source == "arXiv:1807.05358"


def test_utilisation_never_exceeds_the_peak():
    # ZeRO-Infinity reaches over 25 petaFLOP/s on 512 V100, 40 % of their peak (arXiv:2104.07857, abstract), not 40 % above it.
    assert model_flop_utilization(25e15, 1.0, 512, 125e12) == pytest.approx(0.39, abs=0.005)


@pytest.mark.parametrize("depth", [4, 8, 16])
def test_chimeras_bubble_ratio_depends_on_the_backward(depth):
    # (D − 2)/(2N + D − 2) is for t_b = t_f; at t_b = 2t_f it is (D − 2)/(1.5N + D − 2), here with N = D.
    for backward_s, micro_batches in ((1.0, 2.0 * depth), (2.0, 1.5 * depth)):
        bubble_s = figures.bubble_s(CONCATENATED, depth, depth, 2, 1.0, backward_s)
        whole_s = figures.makespan_s(CONCATENATED, depth, depth, 2, 1.0, backward_s)
        assert bubble_s / whole_s == pytest.approx((depth - 2) / (micro_batches + depth - 2))


def test_a_bubble_names_what_it_is_a_share_of():
    # (p − 1)/m of the ideal step, (p − 1)/(m + p − 1) of the whole one: 7/32 and 7/39.
    assert pipeline.bubble_ratio_to_ideal(8, 32) == pytest.approx(7 / 32)
    assert pipeline.bubble_fraction_of_total(8, 32) == pytest.approx(7 / 39)


def test_b_is_the_input_gradient_alone_or_the_full_backward():
    # Zero Bubble's B is without W; in DualPipe's table (arXiv:2412.19437, Table 2: (PP/2 − 1)(F&B + B − 3W)) it is with it.
    f, b, w = 1.0, 1.0, 1.0
    split_s = figures.bubble_s(BOTH_WAYS, 8, 20, 2, f, b, w)
    assert split_s == pytest.approx((8 / 2 - 1) * ((f + (b + w)) + (b + w) - 3 * w))
    assert pipeline.span_bubble_zb_h1_s(8, f, b, w) == pytest.approx(7 * (f + b - w))


def test_zb_h2_is_without_bubbles_within_a_devices_span_alone():
    # arXiv:2401.10241, section 2: with a barrier the skew of (p − 1)F stays; without one, steps follow each other at their work.
    seconds = [np.ones(8)] * 3
    line = simulate(make_order(H2, 8, 32), *seconds)
    assert line.span_bubble_s.max() == pytest.approx(0.0)
    assert line.makespan_s == pytest.approx(3 * 32 + 7)
    two = simulate(repeated(H2, 8, 32, 1, 2), *seconds)
    assert two.makespan_s - line.makespan_s == pytest.approx(3 * 32)
    assert not H2.barrier


def test_selective_recomputation_runs_the_forward_of_attention_once_more():
    # 2.7 % and 1.6 % (arXiv:2205.05198, section 5) are relative to the forward: 4bs²h of 24bsh²(1 + s/6h); the paper's hardware
    # FLOP count s/3h, three times that.
    for hidden, percent in ((12288, 2.7), (20480, 1.6)):
        once = 4.0 * SEQ / (24.0 * hidden * (1.0 + SEQ / (6.0 * hidden)))
        assert 100 * once == pytest.approx(percent, abs=0.05)
        layer = [gpt_iteration_flop(1, SEQ, 1, hidden, 0, r) for r in ("none", "selective")]
        assert (layer[1] - layer[0]) / (4.0 * SEQ**2 * hidden) == pytest.approx(3.0)


def test_34_counts_bytes_already():
    # arXiv:2205.05198, equation 1: sbh(34 + 5as/h) bytes, 16-bit tensors and 1-byte masks. Not elements.
    s, b, h, a = 2048, 1, 4096, 32
    assert activation_bytes(s, b, h, a, 1) == s * b * h * (34 + 5 * a * s / h)


def test_16_18_and_20_bytes_are_three_conventions():
    # ZeRO: fp16 gradients; Megatron-LM: fp32 gradients; ZeRO-Infinity (arXiv:2104.07857, section 3): both.
    assert zero_state_bytes(1.0, 1.0, 0) == 16.0
    assert megatron_state_bytes(1.0) == 18.0
    held = {}
    for gradient in ("fp16", "fp32"):
        ledger, _ = figures.recipe(model="gpt2-xl", precision="fp16", gradient_dtype=gradient)
        held[gradient] = figures.held_bytes(ledger) / figures.parameters(ledger)
    assert held == pytest.approx({"fp16": 16.0, "fp32": 18.0})


def test_eight_t_p_over_n_x_is_a_little_low():
    # arXiv:2104.04473, equation 4 drops s/6h and V/16lh of equation 3: 1 to 2.3 % on the two models of Table 2.
    lows = []
    for layers, hidden, devices, rate in ((96, 12288, 1024, 140e12), (128, 25600, 3072, 163e12)):
        parameters = gpt_parameters(layers, hidden, VOCAB, SEQ)
        exact_s = gpt_iteration_flop(1, SEQ, layers, hidden, VOCAB, "full") / (devices * rate)
        lows.append(1.0 - training_s(parameters, SEQ, devices, rate) / exact_s)
    assert min(lows) > 0.005
    assert max(lows) < 0.03


def test_megatrons_own_estimator_assumes_recomputation():
    # megatron/training/theoretical_memory_usage.py counts 34sbh/t: sequence parallelism with selective recomputation. Without
    # these a stage keeps more than twice as much.
    s, b, h, a, t = 2048, 1, 12288, 96, 8
    assumed = activation_bytes(s, b, h, a, t, sequence_parallel=True, recompute="selective")
    assert assumed == pytest.approx(34 * s * b * h / t)
    assert activation_bytes(s, b, h, a, t) > 2.0 * assumed


def test_hanayos_printed_ratio_is_not_a_work_conserving_waves():
    # (2P − 2)/(3PW + P − 1) comes within 7 % from two waves on; with one wave it says 14/31 = 0.45 of the step, and an order that
    # never waits without need idles for 7/19 = 0.37.
    printed = 14 / 31
    found = figures.bubble_s(HANAYO, 8, 8, 2) / figures.makespan_s(HANAYO, 8, 8, 2)
    assert printed == pytest.approx(0.4516, abs=1e-4)
    assert found == pytest.approx(7 / 19)


def test_paged_attention_is_for_serving():
    # A survey lists it under training.
    pages = [t for t in catalogue().values() if "paged" in t.key or "paged attention" in t.name.lower()]
    assert pages
    assert {t.job for t in pages} == {"serving"}
