"""Laws of the closed forms: one rank costs nothing, more is never less, a scalar is a row of a vector."""

import inspect
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planner.costs as costs
from planner.costs import Level

COLLECTIVES = [
    costs.all_reduce_s,
    costs.all_gather_s,
    costs.reduce_scatter_s,
    costs.all_to_all_s,
    costs.broadcast_s,
    costs.point_to_point_s,
]
ALGORITHMS = ["auto", "ring", "tree", "hierarchical", "direct"]

fast = settings(max_examples=60)
sizes = st.floats(1.0, 1e12)
rates = st.floats(1e8, 1e13)
latencies = st.floats(0.0, 1e-4)


@st.composite
def networks(draw):
    """Up to three tiers whose members nest."""
    members, levels = 1, []
    for _ in range(draw(st.integers(1, 3))):
        members *= draw(st.integers(1, 8))
        levels.append(Level(float(members), draw(rates), draw(latencies)))
    return levels


@fast
@given(n=sizes, levels=st.lists(st.builds(partial(Level, 1.0), rates, latencies), min_size=1, max_size=4))
def test_a_group_of_one_costs_exactly_nothing(n, levels):
    assert all(time_s(n, levels) == 0.0 for time_s in COLLECTIVES)
    assert all(costs.all_reduce_s(n, levels, name) == 0.0 for name in ALGORITHMS)
    for sent in (
        costs.all_reduce_bytes,
        costs.all_gather_bytes,
        costs.all_to_all_bytes,
        costs.broadcast_bytes,
    ):
        assert sent(n, 1) == 0.0


@fast
@given(n=sizes, factor=st.floats(1.0, 10.0), levels=networks())
def test_more_bytes_are_never_faster(n, factor, levels):
    assert all(time_s(n * factor, levels) >= time_s(n, levels) for time_s in COLLECTIVES)


@fast
@given(n=sizes, factor=st.floats(1.0, 10.0), levels=networks(), tier=st.integers(0, 2))
def test_more_bandwidth_is_never_slower(n, factor, levels, tier):
    better = list(levels)
    level = better[tier % len(levels)]
    better[tier % len(levels)] = Level(level.members, level.bytes_per_s * factor, level.latency_s)
    assert all(time_s(n, better) <= time_s(n, levels) for time_s in COLLECTIVES)
    assert all(costs.all_reduce_s(n, better, a) <= costs.all_reduce_s(n, levels, a) for a in ALGORITHMS)


@fast
@given(n=sizes, group=st.integers(1, 512), rate=rates, latency=latencies)
def test_hierarchical_on_one_tier_is_the_ring(n, group, rate, latency):
    levels = [Level(float(group), rate, latency)]
    for time_s in (costs.all_reduce_s, costs.all_gather_s, costs.reduce_scatter_s):
        assert time_s(n, levels, "hierarchical") == pytest.approx(time_s(n, levels, "ring"), rel=1e-12)


@fast
@given(n=sizes, levels=networks(), rate=rates, latency=latencies)
def test_a_tier_that_is_not_crossed_costs_nothing(n, levels, rate, latency):
    group = levels[-1].members
    longer = [*levels, Level(group, rate, latency)]
    inner = [Level(1.0, rate, latency), *levels]
    for time_s in COLLECTIVES:
        assert time_s(n, longer) == pytest.approx(time_s(n, levels), rel=1e-12)
        assert time_s(n, inner) == pytest.approx(time_s(n, levels), rel=1e-12)


@fast
@given(n=sizes, levels=networks())
def test_all_reduce_is_a_reduce_scatter_and_an_all_gather(n, levels):
    for name in ("ring", "hierarchical", "direct"):
        halves = costs.reduce_scatter_s(n, levels, name) + costs.all_gather_s(n, levels, name)
        assert costs.all_reduce_s(n, levels, name) == pytest.approx(halves, rel=1e-12)


@fast
@given(
    rows=st.lists(
        st.tuples(sizes, st.integers(1, 8), st.integers(1, 64), rates, latencies), min_size=1, max_size=5
    )
)
def test_a_scalar_collective_is_a_row_of_a_vector(rows):
    n, inner, outer, rate, latency = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    vector = [Level(inner, rate * 8, latency), Level(inner * outer, rate, latency)]
    for time_s in COLLECTIVES:
        row = time_s(n, vector)
        for i in range(len(rows)):
            scalar = [
                Level(float(inner[i]), float(rate[i] * 8), float(latency[i])),
                Level(float(inner[i] * outer[i]), float(rate[i]), float(latency[i])),
            ]
            assert time_s(float(n[i]), scalar) == row[i]


@fast
@given(
    shape=st.tuples(*[st.integers(1, 20000)] * 3, st.integers(1, 64)),
    grow=st.integers(0, 3),
    extra=st.integers(0, 5000),
)
def test_a_larger_product_is_never_faster(shape, grow, extra):
    def time_s(m, n, k, batch):
        n_bytes = costs.matmul_bytes(m, n, k, batch)
        return costs.matmul_s(
            m, n, k, batch, 0.8e15, n_bytes, 3e12, tile=128.0, multiprocessors=132.0, memory=0.9, overlap_loss=0.2,
            split_s=5e-8, launch_s=2e-6,
        )  # fmt: skip

    larger = list(shape)
    larger[grow] += extra
    assert time_s(*larger) >= time_s(*shape)
    assert time_s(*shape) >= costs.matmul_flop(*shape) / (0.8 * 1e15)
    assert time_s(*shape) >= costs.matmul_bytes(*shape) / (0.9 * 3e12)


@fast
@given(
    shape=st.tuples(st.integers(1, 64), st.integers(1, 16), st.integers(1, 8), *[st.integers(1, 20000)] * 2),
    grow=st.integers(0, 4),
    extra=st.integers(0, 500),
    causal=st.booleans(),
)
def test_a_larger_attention_is_never_faster(shape, grow, extra, causal):
    def time_s(batch, group, kv_heads, past, queries):
        heads, keys = group * kv_heads, past + queries
        visible = costs.causal_fraction(queries, keys) if causal else 1.0
        n_bytes = costs.attention_bytes(batch, heads, kv_heads, queries, keys, 128)
        return costs.attention_s(
            batch, heads, kv_heads, queries, keys, 128, visible=visible, peak_flop_per_s=6e14, bytes_=n_bytes,
            vector_flop_per_s=6e13, memory_bytes_per_s=3e12, multiprocessors=132.0, tile=64.0, softmax_flop=5.0,
            straggler=1.5, tile_s=3e-6, split_s=5e-8, memory=0.9, overlap_loss=0.2, launch_s=2e-6,
        )  # fmt: skip

    larger = list(shape)
    larger[grow] += extra
    # Packing rows into tiles is exact only for whole tiles: a row more may fill one that another head began.
    assert time_s(*larger) >= time_s(*shape) * (1.0 - 1e-9)


@fast
@given(
    streams=st.lists(st.floats(0.0, 1e3), min_size=1, max_size=5),
    chunks=st.integers(1, 64),
    slow=st.floats(1, 3),
)
def test_overlap_lies_between_the_longest_stream_and_the_sum(streams, chunks, slow):
    together = costs.overlapped_s(streams, slow)
    pipelined = costs.pipelined_s(streams, chunks, slow)
    tolerance = 1e-9 * sum(streams)
    assert max(streams) <= together + tolerance
    assert together <= pipelined + tolerance
    assert pipelined <= sum(streams) + tolerance
    assert costs.pipelined_s(streams, chunks * 2, slow) <= pipelined + tolerance


@fast
@given(parameters=st.floats(1e6, 1e13), shards=st.integers(1, 4096))
def test_every_zero_stage_holds_no_more_than_the_one_before(parameters, shards):
    held = [costs.zero_state_bytes(parameters, shards, stage) for stage in (0, 1, 2, 3)]
    assert held == sorted(held, reverse=True)
    assert held[3] * shards == pytest.approx(held[0], rel=1e-12)  # nothing is lost


LEVELS = (Level(np.array([1.0, 4.0, 8.0]), 4e11, 1e-6), Level(np.array([4.0, 4.0, 64.0]), 5e10, 5e-6))
TABLES = {
    "arithmetic_intensity",
    "block_layer_s",
    "block_tokens_per_s",
    "bound_1f1b_s",
    "bound_flush_s",
    "bound_interleaved_s",
    "bucket_exposure_s",
    "collective_costs",
    "dtype_bytes",
    "fastest_s",
    "latency_alpa_s",
    "operator_update_bytes",
    "optimizer_state_bytes",
    "phases_run_s",
    "priority_wait_s",
    "reshard_bytes",
    "resharding_steps",
    "serial_finish_s",
    "skewed_load_factor",
    "whole_replicas",
    "zipf_shares",
}
NUMERIC = sorted(
    name
    for name in costs.__all__
    if inspect.isfunction(getattr(costs, name))
    # names or keywords alone are required, or the first axis has a meaning; the unit tests cover these
    and name not in TABLES
)
CHOICES = {
    "stage": 3,
    "strategy": "hybrid",
    "state": "activations",
    "recompute": "none",
    "algorithm": "auto",
    "mode": "sync",
}


def arguments(function, scale):
    """Values for every required parameter: a different array of whole numbers each, or a fixed choice."""
    values = {}
    for i, parameter in enumerate(inspect.signature(function).parameters.values()):
        if parameter.default is not inspect.Parameter.empty:
            continue
        name = parameter.name
        if name == "levels":
            values[name] = LEVELS
        elif name == "streams":
            values[name] = [scale(3), scale(5)]
        elif name == "efficiency":
            values[name] = scale(1) / 100
        else:
            values[name] = CHOICES[name] if name in CHOICES else scale(i + 1)
    return values


def row(value, i):
    """Row ``i`` of an argument, as Python numbers."""
    if isinstance(value, np.ndarray):
        return value[i].item()
    if isinstance(value, Level):
        return Level(row(value.members, i), value.bytes_per_s, value.latency_s)
    return type(value)(row(v, i) for v in value) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", NUMERIC)
def test_every_formula_broadcasts(name):
    """Integer arrays, float arrays and single numbers agree; numbers give a number, not an array."""
    function = getattr(costs, name)
    whole = arguments(function, lambda i: np.array([1, 2, 4]) * 2**i)
    real = arguments(function, lambda i: np.array([1.0, 2.0, 4.0]) * 2**i)
    result = np.asarray(function(**real))
    np.testing.assert_allclose(np.asarray(function(**whole)), result, rtol=1e-12)
    for i in range(3):
        single = function(**{key: row(value, i) for key, value in real.items()})
        np.testing.assert_allclose(single, result[..., i], rtol=1e-12)
        assert all(np.isscalar(part) for part in (single if isinstance(single, tuple) else (single,)))


def test_trillion_parameter_products_do_not_overflow_integers():
    # 96·3072·2048·128·25600² = 5.1e19 is beyond a 64-bit integer
    array = np.array([3072])
    flop = costs.gpt_iteration_flop(
        array, np.array([2048]), np.array([128]), np.array([25600]), np.array([51200]), "full"
    )
    assert flop[0] == pytest.approx(51390.5e15, rel=1e-5)
