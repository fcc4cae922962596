"""Kernels: FLOP, bytes and the shape of the curves of time, worked by hand."""

import numpy as np
import pytest

from planner.costs import (
    attention_bytes,
    attention_flop,
    attention_s,
    causal_fraction,
    cool_compute_s,
    matmul_bytes,
    matmul_flop,
    matmul_s,
    matmul_waves,
    memory_bound_s,
    product_s,
    roofline_s,
    uncached_bytes,
)

CONSTANTS = {"tile": 128.0, "multiprocessors": 100.0}
ATTENTION = {
    "peak_flop_per_s": 1e15, "vector_flop_per_s": 1e14, "memory_bytes_per_s": 1e12, "multiprocessors": 100.0, "tile": 64.0,
}  # fmt: skip


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


def test_a_full_wave_runs_at_the_sustained_rate():
    # 10 × 10 tiles of 128 × 128 on 100 multiprocessors: 2·1280²·k over 1e15
    assert matmul_s(1280, 1280, 64, 1, 1e15, 0.0, 1e12, **CONSTANTS) == pytest.approx(2 * 1280**2 * 64 / 1e15)


def test_a_tile_and_a_half_pays_for_one_and_a_half():
    # 129 rows are paid as 192
    one = matmul_waves(128, 128, tile=128, multiprocessors=100)
    assert matmul_waves(129, 128, tile=128, multiprocessors=100) == pytest.approx(1.5 * one)
    assert one == pytest.approx(0.01)


def test_a_split_contraction_takes_time_with_the_root_of_its_length():
    # the optimum of a·k/s + b·s over s is 2·√(a·b·k)
    short, long = (matmul_s(1, 1, k, 1, 1e30, 0.0, 1e12, **CONSTANTS, split_s=5e-8) for k in (1024.0, 4096.0))
    assert short == pytest.approx(32 * 5e-8)
    assert long == pytest.approx(2 * short)


def test_loads_of_unlike_experts_add_up():
    # 128 and 1 rows: one tile and a half
    loads = np.array([128.0, 1.0, 0.0])
    waves = matmul_waves(loads, 128.0, tile=128, multiprocessors=100).sum()
    assert waves == pytest.approx(0.015)
    constants = {"tile": 128.0, "multiprocessors": 100.0}
    time_s = product_s(waves, 1000.0, 0.0, 1e15, 1e12, **constants)
    assert time_s == pytest.approx(1.5 * 2 * 128 * 128 * 1000 / 1e15)


def test_one_row_times_a_matrix_is_memory_bound():
    # 2 bytes · 8192² of weights at 80 % of 3.35 TB/s
    n_bytes = matmul_bytes(1, 8192, 8192)
    time_s = matmul_s(1, 8192, 8192, 1, 989e12, n_bytes, 3.35e12, **CONSTANTS, memory=0.8)
    assert time_s == pytest.approx(2 * (8192**2 + 2 * 8192) / (0.8 * 3.35e12))


def test_small_kernels_take_a_launch_and_empty_ones_nothing():
    sizes = np.array([0.0, 8.0])
    np.testing.assert_allclose(
        matmul_s(sizes, 8.0, 8.0, 1.0, 1e15, sizes, 1e12, **CONSTANTS, launch_s=3e-6), [0.0, 3e-6], rtol=1e-4
    )
    np.testing.assert_allclose(memory_bound_s(sizes, 1e12, launch_s=3e-6), [0.0, 3e-6], rtol=1e-4)
    attention = attention_s(sizes, 1.0, 1.0, 1.0, 1.0, 1.0, **ATTENTION, bytes_=sizes, launch_s=3e-6)
    np.testing.assert_allclose(attention, [0.0, 3e-6], rtol=1e-4)


def test_memory_reaches_half_of_its_rate_where_it_takes_as_long_as_the_launch():
    # Hockney: r∞/2 at n½ = launch · rate
    assert memory_bound_s(1.8e6, 1e12, memory=0.9, launch_s=2e-6) == pytest.approx(2 * 1.8e6 / 0.9e12)


def test_arithmetic_and_traffic_overlap_but_for_a_part():
    assert roofline_s(2.0, 3.0) == 3.0
    assert roofline_s(2.0, 3.0, 0.5) == 4.0
    assert roofline_s(2.0, 3.0, 1.0) == 5.0


def test_a_repeated_kernel_reads_from_the_cache_what_fits_in_it():
    # wholly in the cache: at its rate; far larger than the cache: from memory; as large: half and half
    assert uncached_bytes(1e3, 50e6, 4.0) == pytest.approx(250.0)
    assert uncached_bytes(1e10, 50e6, 4.0) == pytest.approx(1e10, rel=1e-6)
    assert uncached_bytes(50e6, 50e6, 4.0) == pytest.approx(50e6 * (1 - 0.75 / 2))


def test_a_short_kernel_on_its_own_is_not_throttled():
    assert cool_compute_s(1e-7, 0.25) == pytest.approx(0.8e-7, rel=1e-3)
    assert cool_compute_s(1e-2, 0.25) == pytest.approx(1e-2 / 1.125)  # half of the boost at 10 ms
    assert cool_compute_s(100.0, 0.25) == pytest.approx(100.0, rel=1e-3)


def test_attention_of_many_tiles_runs_at_the_products_rate():
    # 4·2·8192²·128 FLOP of one head and batch, full mask, 32 heads
    time_s = attention_s(1, 32, 32, 8192, 8192, 128, **ATTENTION, bytes_=0.0)
    assert time_s == pytest.approx(4 * 32 * 8192**2 * 128 / 1e15)


def test_the_longest_tile_of_attention_is_walked_by_one_multiprocessor():
    # one head, 128 queries, 8192 keys: two tiles of 64 rows on 100 multiprocessors; the walk takes 1.5 of what a
    # 100th of the rate needs for 64·8192 scores
    one = dict(ATTENTION, straggler=1.5)
    walk_s = 1.5 * 4 * 64 * 8192 * 128 * 100 / 1e15
    total_s = 4 * 128 * 8192 * 128 / 1e15
    assert attention_s(1, 1, 1, 128, 8192, 128, **one, bytes_=0.0) == pytest.approx(total_s + walk_s)


def test_decode_splits_the_walk_over_idle_multiprocessors():
    decode = dict(ATTENTION, straggler=1.5, split_s=5e-8)
    long, longer = (attention_s(1, 1, 1, 1, keys, 128, **decode, bytes_=0.0) for keys in (65536, 262144))
    assert long == pytest.approx(5e-8 * 256 + 4 * 64 * 65536 * 128 / 1e15)
    assert longer < 3 * long


def test_heads_that_share_keys_share_tiles():
    # 8 queries of 8 heads on one head of keys fill one tile of 64 rows; as heads of their own they fill eight
    shared = attention_s(1, 8, 1, 8, 1024, 128, **ATTENTION, bytes_=0.0, tile_s=1e-6)
    own = attention_s(1, 8, 8, 8, 1024, 128, **ATTENTION, bytes_=0.0, tile_s=1e-6)
    assert own == pytest.approx(8 * shared)


def test_a_causal_mask_pays_for_whole_blocks_on_its_edge():
    # 64 queries and keys are one block: half of it is visible, all of it is computed
    causal, full = (attention_s(1, 1, 1, 64, 64, 128, **ATTENTION, bytes_=0.0, visible=v) for v in (0.5, 1.0))
    assert causal == pytest.approx(full)
    # 6400: a hundredth of the invisible half comes on top
    long = attention_s(1, 1, 1, 6400, 6400, 128, **ATTENTION, bytes_=0.0, visible=0.5)
    assert long == pytest.approx(0.505 * 4 * 6400**2 * 128 / 1e15)
