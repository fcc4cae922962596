"""Kernels: FLOP, bytes and the shape of the efficiency curves, worked by hand."""

import numpy as np
import pytest

from planner.costs import (
    attention_bytes,
    attention_flop,
    attention_s,
    causal_fraction,
    matmul_bytes,
    matmul_efficiency,
    matmul_flop,
    matmul_s,
    memory_bound_s,
    memory_efficiency,
)

CONSTANTS = {"matmul": 0.8, "tile": 128.0, "half_k": 64.0, "multiprocessors": 100.0}


def test_gpt_layer_projections_are_24_bsh2():
    # Narayanan et al. 2021, appendix: QKV 6, output 2, MLP 16, times b·s·h²
    tokens, h = 4 * 2048, 6144
    shapes = [(3 * h, h), (h, h), (4 * h, h), (h, 4 * h)]
    assert sum(matmul_flop(tokens, n, k) for n, k in shapes) == 24.0 * tokens * h * h


def test_attention_forward_is_4_bs2h():
    # Narayanan et al. 2021, appendix: QKᵀ and attention over values, 2·b·s²·h each
    assert attention_flop(4, 64, 2048, 2048, 96) == 4.0 * 4 * 2048**2 * 6144


def test_attention_with_different_key_and_value_widths():
    # multi-head latent attention: 192 wide keys, 128 wide values: 2·(192 + 128)
    assert attention_flop(1, 1, 1, 1, 192, 128) == 640.0


def test_attention_backward_bytes_are_twice_the_forward():
    # reads Q K V O dO, writes dQ dK dV: 4 query-sized and 4 key-sized tensors against 2 and 2
    once = attention_bytes(2, 32, 8, 4096, 4096, 128)
    assert once == 2 * 2 * 128 * 4096 * (2 * 32 + 2 * 8)
    assert attention_bytes(2, 32, 8, 4096, 4096, 128, passes=2) == 2 * once


@pytest.mark.parametrize("window", [1, 3, 5, 8, np.inf])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (4, 4), (3, 8), (8, 8)])
def test_causal_fraction_counts_the_mask(queries, keys, window):
    row, column = np.arange(queries)[:, None] + keys - queries, np.arange(keys)[None, :]
    mask = (column <= row) & (column > row - window)
    assert causal_fraction(queries, keys, window) == pytest.approx(mask.mean())


def test_a_full_wave_reaches_k_over_k_plus_half_k():
    # 10 × 10 tiles on 100 multiprocessors
    assert matmul_efficiency(1280, 1280, 64, **CONSTANTS) == pytest.approx(0.8 / 2)
    assert matmul_efficiency(1280, 1280, 6336, **CONSTANTS) == pytest.approx(0.8 * 0.99)


def test_a_tile_and_a_half_pays_for_one_and_a_half():
    # 129 rows are paid as 192; the waves follow, 0.01·1.5 of one
    exact = matmul_efficiency(128, 128, 1e9, **CONSTANTS)
    assert exact == pytest.approx(0.8, rel=1e-4)
    assert matmul_efficiency(129, 128, 1e9, **CONSTANTS) == pytest.approx(0.8 * 129 / 192, rel=1e-4)


def test_matmul_time_is_flop_over_peak_times_efficiency():
    m, n, k, batch = np.array([130.0, 4096.0]), 1000.0, 768.0, np.array([3.0, 1.0])
    time_s = matmul_s(m, n, k, batch, 1e15, 0.0, 1e12, **CONSTANTS)
    expected = matmul_flop(m, n, k, batch) / (1e15 * matmul_efficiency(m, n, k, batch, **CONSTANTS))
    np.testing.assert_allclose(time_s, expected, rtol=1e-12)


def test_one_row_times_a_matrix_is_memory_bound():
    # 2 bytes · 8192² of weights at 80 % of 3.35 TB/s
    n_bytes = matmul_bytes(1, 8192, 8192)
    time_s = matmul_s(1, 8192, 8192, 1, 989e12, n_bytes, 3.35e12, **CONSTANTS, memory=0.8)
    assert time_s == pytest.approx(2 * (8192**2 + 2 * 8192) / (0.8 * 3.35e12))


def test_small_kernels_take_the_floor_and_empty_ones_nothing():
    sizes = np.array([0.0, 8.0])
    np.testing.assert_array_equal(
        matmul_s(sizes, 8.0, 8.0, 1.0, 1e15, sizes, 1e12, **CONSTANTS, floor_s=3e-6), [0.0, 3e-6]
    )
    np.testing.assert_array_equal(memory_bound_s(sizes, 1e12, floor_s=3e-6), [0.0, 3e-6])
    np.testing.assert_array_equal(
        attention_s(sizes, sizes, 1e15, 1e12, attention=0.7, floor_s=3e-6), [0.0, 3e-6]
    )


def test_memory_reaches_half_of_its_rate_at_half_bytes():
    # Hockney: r∞/2 at n½
    assert memory_efficiency(2e6, 0.9, 2e6) == 0.45
    assert memory_bound_s(2e6, 1e12, memory=0.9, memory_half_bytes=2e6) == pytest.approx(2e6 / 0.45e12)


def test_few_attention_tiles_leave_multiprocessors_idle():
    # 25 tiles on 100 multiprocessors: four times slower; 400 tiles: full rate
    few, many = (
        attention_s(1e12, 0.0, 1e15, 1e12, attention=0.5, tiles=tiles, multiprocessors=100.0)
        for tiles in (25, 400)
    )
    assert few == pytest.approx(8e-3)
    assert many == pytest.approx(2e-3)
