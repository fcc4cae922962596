"""FLOP, optimizers, formats, experts, parallel volumes, offload, energy and money: published numbers."""

import numpy as np
import pytest

from planner.costs import (
    FORMAT_BITS,
    KNOWN_OPTIMIZERS,
    all_gather_attention_elements,
    arithmetic_intensity,
    average_power_w,
    contiguous_imbalance,
    dense_training_flop,
    device_hours,
    dispatch_bytes,
    distinct_domains,
    distinct_experts,
    dtype_bytes,
    emitted_kg,
    energy_j,
    expert_capacity,
    expert_parameters,
    gpt_iteration_flop,
    gpt_parameters,
    host_adam_s,
    model_flop_utilization,
    muon_overhead,
    neighbouring_domains,
    offload_efficiency,
    offload_required_bytes_per_s,
    optimizer_state_bytes,
    optimizer_touched_bytes,
    random_load_factor,
    rental_usd,
    ring_attention_elements,
    ring_attention_s,
    ring_overlap_tokens,
    tensor_parallel_2d_elements,
    tensor_parallel_3d_elements,
    tensor_parallel_elements,
    tesseract_elements,
    training_s,
    ulysses_elements,
    usd_per_token,
    usp_elements,
)

VOCAB, SEQ = 51200, 2048

# arXiv:2104.04473, Table 1: layers, hidden, batch, parameters (1e9); FLOP (1e15) are equation 3 by hand
PTDP = [
    (24, 2304, 512, 1.7, 15.5),
    (30, 3072, 512, 3.6, 32.7),
    (36, 4096, 512, 7.5, 67.2),
    (40, 6144, 1024, 18.4, 324.8),
    (48, 8192, 1536, 39.1, 1021.2),
    (60, 10240, 1792, 76.1, 2302.0),
    (80, 12288, 2304, 145.6, 5641.7),
    (96, 16384, 2160, 310.1, 11194.0),
    (105, 20480, 2520, 529.6, 22215.9),
    (128, 25600, 3072, 1008.0, 51390.5),
]


@pytest.mark.parametrize(("layers", "hidden", "batch", "billions", "petaflop"), PTDP)
def test_ptdp_table_1(layers, hidden, batch, billions, petaflop):
    assert gpt_parameters(layers, hidden, VOCAB, SEQ) / 1e9 == pytest.approx(billions, abs=0.051)
    flop = gpt_iteration_flop(batch, SEQ, layers, hidden, VOCAB, "full")
    assert flop / 1e15 == pytest.approx(petaflop, abs=0.051)


@pytest.mark.parametrize(
    ("parameters", "tokens", "devices", "flop_per_s", "days"),
    [  # arXiv:2104.04473, section 5.1 as printed: GPT-3 in 34 days, 1T (1008e9) in 84 days
        (175e9, 300e9, 1024, 140e12, 34),
        (1008e9, 450e9, 3072, 163e12, 84),
    ],
)
def test_training_days(parameters, tokens, devices, flop_per_s, days):
    assert training_s(parameters, tokens, devices, flop_per_s) / 86400 == pytest.approx(days, abs=0.5)


@pytest.mark.parametrize(
    ("layers", "hidden", "batch", "devices", "step_s", "mfu", "hfu"),
    [  # arXiv:2205.05198, Table 5, per cent of 312 TFLOP/s as printed
        (48, 6144, 4, 8, 1.10, 41.5, 43.7),
        (96, 12288, 64, 64, 13.75, 51.4, 52.8),
        (105, 20480, 280, 280, 37.83, 56.0, 57.0),
        (128, 25600, 512, 512, 71.49, 56.3, 57.0),
    ],
)
def test_utilisation_of_korthikanti_table_5(layers, hidden, batch, devices, step_s, mfu, hfu):
    for recompute, percent in (("none", mfu), ("selective", hfu)):
        flop = gpt_iteration_flop(batch, SEQ, layers, hidden, VOCAB, recompute)
        share = 100 * model_flop_utilization(flop, step_s, devices, 312e12)
        assert share == pytest.approx(percent, abs=0.2)  # step times have three or four digits


@pytest.mark.parametrize(
    ("devices", "flop_per_s", "seconds"),
    [(2240, 126e12, 59.97), (2800, 121e12, 49.96), (3360, 113e12, 44.58)],
)
def test_mt_nlg_iteration(devices, flop_per_s, seconds):
    # Equation 3 of arXiv:2104.04473 with B = 1920 over n·X: 16.93 EFLOP / (2240 · 126 TFLOP/s) and so on
    flop = gpt_iteration_flop(1920, SEQ, 105, 20480, VOCAB, "full")
    assert flop / (devices * flop_per_s) == pytest.approx(seconds, abs=0.005)


def test_rule_of_six():
    assert dense_training_flop(1e12, 20e12) == pytest.approx(1.2e26)
    # GPT-3's own count: (1 + s/6h + V/12lh)/(1 + 13/12h + (V + s)/12lh) = 1.031395/1.003850 of 6·N·D
    flop = gpt_iteration_flop(1, SEQ, 96, 12288, VOCAB)
    six = dense_training_flop(gpt_parameters(96, 12288, VOCAB, SEQ), SEQ)
    assert flop / six == pytest.approx(1.02744, abs=1e-5)


def test_parameters_of_gpt_are_counted_to_the_last_one():
    # GPT-2 as published has 124,439,808; the last normalisation's 2·768 are not in the paper's formula.
    assert gpt_parameters(12, 768, 50257, 1024) == 124_439_808 - 2 * 768


def test_optimizer_states():
    # AdamW 4 + 4 + 4 (ZeRO's K = 12); one moment 4 + 4; two 8-bit moments with an FP32 scale per 2048
    states = {name: optimizer_state_bytes(name) for name in KNOWN_OPTIMIZERS}
    assert states["adamw"] == states["lamb"] == 12
    assert states["lion"] == states["sgd_momentum"] == states["lars"] == states["muon"] == 8
    assert states["adafactor"] == states["sgd"] == 4
    assert states["adam8bit"] == 4 + 2 * (1 + 4 / 2048)
    assert optimizer_state_bytes("adamw", moment_bytes=2.0) == 8
    with pytest.raises(ValueError, match="adamw"):
        optimizer_state_bytes("adam")


def test_adam_touches_28_bytes_and_the_copy():
    # reads p, m, v, g; writes p, m, v in FP32: 7 · 4; the 16-bit copy 2
    assert optimizer_touched_bytes(12.0, weight_bytes=0.0) == 28
    assert optimizer_touched_bytes(12.0) == 30


@pytest.mark.parametrize(("width", "tokens", "percent"), [(768, 524288, 0.732), (16384, 16e6, 0.512)])
def test_muon_overhead_is_5m_over_t(width, tokens, percent):
    assert 100 * muon_overhead(width, width, tokens) == pytest.approx(percent, abs=5e-4)
    assert muon_overhead(64, 256, 1e6) == muon_overhead(256, 64, 1e6)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("mxfp8", 8.25),
        ("mxfp6", 6.25),
        ("mxfp4", 4.25),
        ("nvfp4", 4.5),
        ("fp8_block", 8.25),
        ("int4_g128", 4.125),
    ],
)
def test_block_formats(name, bits):
    # OCP MX: 8 bits per 32; NVFP4: 8 bits per 16; DeepSeek-V3: 32 bits per 128
    assert FORMAT_BITS[name] == bits
    assert dtype_bytes(name) == bits / 8


def test_qlora_65b_base_weights():
    # 65e9 · 4.127 bits, arXiv:2305.14314, section 3: 0.127 bits of quantisation constants
    assert 65e9 * dtype_bytes("nf4_double") / 1e9 == pytest.approx(33.53, abs=0.005)


def test_unknown_format_names_the_known_ones():
    with pytest.raises(ValueError, match="nvfp4"):
        dtype_bytes("bfloat")


def test_experts_of_mixtral():
    # 32 layers of 8 experts of 3·4096·14336: 45.1e9 of the 46.7e9 that its card gives
    assert 32 * expert_parameters(8, 4096, 14336) == 45_097_156_608


@pytest.mark.parametrize(
    ("topk", "experts", "domains"),
    [
        (8, 256, 64),
        (8, 256, 8),
        (8, 128, 8),
        (22, 512, 64),
        (4, 128, 64),
        (6, 128, 8),
        (8, 384, 32),
        (6, 64, 64),
    ],
)
def test_experts_dealt_in_turn_lie_on_so_many_domains(topk, experts, domains):
    dealt = [(token * topk + choice) % experts for token in range(experts) for choice in range(topk)]
    homes = np.array(dealt).reshape(-1, topk) // (experts // domains)
    counted = np.mean([len(set(of_token)) for of_token in homes.tolist()])
    assert float(neighbouring_domains(topk, experts, domains)) == pytest.approx(counted)


def test_dispatch_and_capacity():
    # 7 of 8 parts of 2 · 1024 tokens · 512 · 2 bytes leave; 1.25 · 2 · 1000/64 = 39.06 rounds up
    assert dispatch_bytes(1024, 2, 512, 8) == 7 / 8 * 2 * 1024 * 512 * 2
    assert dispatch_bytes(1024, 2, 512, 8, copies=1) == dispatch_bytes(1024, 1, 512, 8)
    assert expert_capacity(1000, 2, 64, 1.25) == 40


def test_distinct_experts_and_nodes_against_draws():
    rng = np.random.default_rng(0)
    draws = rng.random((4000, 24, 32)).argpartition(4, axis=-1)[..., :4]  # 24 tokens choose 4 of 32
    touched = np.mean([len(np.unique(batch)) for batch in draws])
    assert distinct_experts(24, 4, 32) == pytest.approx(touched, rel=5e-3)
    nodes = np.mean([len(np.unique(token // 4)) for token in draws[:, 0]])  # 8 nodes of 4 experts
    # with replacement: 8·(1 − (7/8)⁴) = 3.31; without: 8·(1 − 28·27·26·25/(32·31·30·29)) = 3.45
    assert distinct_domains(4, 8) == pytest.approx(nodes, rel=0.06)


def test_random_load_factor_against_draws():
    rng = np.random.default_rng(0)
    loads = rng.multinomial(16384, np.full(64, 1 / 64), size=2000)
    measured = loads.max(axis=1).mean() / 256
    # the leading term of the extreme overestimates the excess by a fifth at 64 ranks
    assert random_load_factor(4096, 4, 64) - 1 == pytest.approx(measured - 1, rel=0.25)
    assert random_load_factor(4096, 4, 64) > measured


def test_ulysses_and_ring_volumes():
    # arXiv:2309.14509: 4Nh/P in the limit; per rank of 8: 2·(4096 + 4096)·8192/8 · 7/8
    assert ulysses_elements(1, 8192, 4096, 4096, 8) == 2 * 8192 * 1024 * 7 / 8
    # ring, grouped queries: 7 steps of K and V blocks of 1024 · 1024; backward K V dK dV
    assert ring_attention_elements(1, 8192, 1024, 8) == 7 * 2 * 1024 * 1024
    assert ring_attention_elements(1, 8192, 1024, 8, backward=True) == 7 * 4 * 1024 * 1024
    assert all_gather_attention_elements(2, 8192, 1024, 8) == 14 * 2 * 1024 * 1024


def test_usp_has_both_methods_as_its_ends():
    shape = (2, 8192, 4096, 1024)
    assert usp_elements(*shape, 8, 1) == ulysses_elements(*shape, 8)
    assert usp_elements(*shape, 1, 8) == ring_attention_elements(2, 8192, 1024, 8)
    # 2 × 4: all-to-all on 2048 tokens over 2, ring over 4 on 512-wide K and V
    mixed = ulysses_elements(2, 2048, 4096, 1024, 2) + ring_attention_elements(2, 8192, 512, 4)
    assert usp_elements(*shape, 2, 4) == mixed


@pytest.mark.parametrize(("bytes_per_s", "tokens"), [(300e9, 1040), (12.5e9, 24960)])
def test_ring_hides_behind_blocks_of_peak_over_bandwidth(bytes_per_s, tokens):
    # F/W: 312 TFLOP/s over NVLink (300 GB/s) and over one 100 Gbit/s interface
    assert ring_overlap_tokens(312e12, bytes_per_s, 4096, 4096) == tokens
    # at exactly that block a step's transfer takes as long as its attention
    compute_s = 4 * tokens**2 * 4096 / 312e12
    transfer_s = 2 * tokens * 4096 * 2 / bytes_per_s
    assert compute_s == pytest.approx(transfer_s)
    assert ring_attention_s(compute_s, transfer_s, 8) == pytest.approx(8 * compute_s)


@pytest.mark.parametrize("cp", [1, 2, 5, 8])
def test_contiguous_imbalance_counts_the_triangle(cp):
    work = np.tril(np.ones((cp, cp))) - 0.5 * np.eye(cp)  # whole blocks below, half on the diagonal
    assert contiguous_imbalance(cp) == pytest.approx(work.sum(axis=1).max() / work.sum(axis=1).mean())


def test_tensor_parallel_volumes_on_64_ranks():
    # bs = 2h, in units of h², forward: 4·2·63/64; (14 + 12)·6/16; (3.5 + 12)·2/4; (32 + 12)·3/64
    assert tensor_parallel_elements(1, 2, 1, 64, passes=1) == 7.875
    assert tensor_parallel_2d_elements(1, 2, 1, 8) == 9.75
    assert tesseract_elements(1, 2, 1, 4, 4) == 7.75
    assert tensor_parallel_3d_elements(1, 2, 1, 4) == 2.0625
    # arXiv:2104.04473, section 3.2: 8bsh(t−1)/t with the backward
    assert tensor_parallel_elements(2, 2048, 4096, 8) == 8 * 2 * 2048 * 4096 * 7 / 8


def test_host_adam():
    # 28 B · 10e9 at 100 GB/s
    assert host_adam_s(10e9, 100e9) == pytest.approx(2.8)


@pytest.mark.parametrize(
    ("efficiency", "intensity", "bytes_per_s"),
    [  # peak 70 TFLOP/s; rates by hand, 70e12·E/(ait·(1 − E))
        (0.5, arithmetic_intensity("parameters", tokens=2048), 34.2e9),
        (0.9, arithmetic_intensity("optimizer", tokens=2048), 1.23e12),
        (0.5, arithmetic_intensity("activations", hidden=2048), 1.42e9),
        (0.5, arithmetic_intensity("activations", hidden=8192), 0.356e9),
    ],
)
def test_bandwidth_that_offload_needs(efficiency, intensity, bytes_per_s):
    needed = offload_required_bytes_per_s(efficiency, intensity, 70e12)
    assert needed == pytest.approx(bytes_per_s, rel=3e-3)
    assert offload_efficiency(intensity, needed, 70e12) == pytest.approx(efficiency)


def test_money_of_published_runs():
    # DeepSeek-V3, arXiv:2412.19437, Table 1: 180 thousand H800 hours per 1e12 tokens, 3.7 days on 2048
    assert 180e3 / device_hours(86400, 2048) == pytest.approx(3.7, abs=0.05)
    # DeepSeek's inference overview of March 2025: 226.75 nodes of 8 at 2 $/h cost 87,072 $ a day
    assert rental_usd(device_hours(86400, 226.75 * 8), 2.0) == pytest.approx(87072)
    assert usd_per_token(2.0, 8, 16 / 3600 * 1e6) == pytest.approx(1e-6)


def test_energy_of_a_day():
    # 8 parts at 100 + 0.75·600 = 550 W for a day, PUE 1.2: 8·13.2·1.2 = 126.72 kWh; at 0.5 kg each
    power_w = average_power_w(100, 700, 0.75)
    energy = energy_j(power_w, 86400, 8, 1.2)
    assert energy / 3.6e6 == pytest.approx(126.72)
    assert emitted_kg(energy, 0.5) == pytest.approx(63.36)
