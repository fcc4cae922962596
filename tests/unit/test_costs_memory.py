"""Activations and model states: the published tables and figures of Korthikanti et al., ZeRO and FSDP."""

import pytest

from planner.costs import (
    activation_bytes,
    checkpoint_bytes,
    checkpoint_segments,
    cross_host_traffic,
    flash_activation_bytes,
    fsdp_parameter_peak_bytes,
    hybrid_shard_traffic,
    interleaved_memory_factor,
    logits_bytes,
    megatron_state_bytes,
    zero_plus_plus_traffic,
    zero_state_bytes,
    zero_traffic,
)

GIB = 2.0**30
# name: layers, hidden, heads, micro-batch, pipeline stages, virtual stages (arXiv:2205.05198, Table 3), t =
# 8, s = 2048
MODELS = {
    "22B": (48, 6144, 64, 4, 1, 1),
    "175B": (96, 12288, 96, 1, 8, 3),
    "530B": (105, 20480, 128, 1, 35, 3),
    "1T": (128, 25600, 160, 1, 64, 1),
}


def first_stage_bytes(name, **options):
    layers, hidden, heads, batch, pp, vpp = MODELS[name]
    # p micro-batches in flight of l/p layers each
    return (
        layers
        * activation_bytes(2048, batch, hidden, heads, 8, **options)
        * interleaved_memory_factor(pp, vpp)
    )


@pytest.mark.parametrize(
    ("name", "states", "baseline", "present"),
    [  # GiB, arXiv:2205.05198, Figure 1
        ("22B", 45.5625, 59.25, 9.5625),
        ("175B", 45.5625, 66.84375, 12.3515625),
        ("530B", 31.640625, 114.0234375, 23.076171875),
        ("1T", 32.958984375, 131.25, 26.5625),
    ],
)
def test_memory_of_the_first_stage(name, states, baseline, present):
    layers, hidden, _, _, pp, _ = MODELS[name]
    assert megatron_state_bytes(12 * layers * hidden**2 / (8 * pp)) / GIB == pytest.approx(states, rel=1e-12)
    assert first_stage_bytes(name) / GIB == pytest.approx(baseline, rel=1e-12)
    both = first_stage_bytes(name, sequence_parallel=True, recompute="selective")
    assert both / GIB == pytest.approx(present, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "sequence", "selective", "both", "full"),
    # Per cent of the tensor-parallel baseline, as the paper's figure of relative memory prints them.
    [
        ("22B", None, None, 16.18, 7.64),
        ("175B", 62.04, 56.53, 18.49, 8.71),
        ("530B", 58.31, 62.04, 20.27, 9.42),
    ],
)
def test_activation_memory_relative_to_tensor_parallelism(name, sequence, selective, both, full):
    _, hidden, heads, batch, _, _ = MODELS[name]

    def percent(**options):
        baseline = activation_bytes(2048, batch, hidden, heads, 8)
        return 100 * activation_bytes(2048, batch, hidden, heads, 8, **options) / baseline

    # The figure was read to about a tenth of a per cent.
    if sequence is not None:
        assert percent(sequence_parallel=True) == pytest.approx(sequence, abs=0.15)
        assert percent(recompute="selective") == pytest.approx(selective, abs=0.15)
    assert percent(sequence_parallel=True, recompute="selective") == pytest.approx(both, abs=0.06)
    assert percent(recompute="full") == pytest.approx(full, abs=0.11)


def test_activations_without_parallelism():
    # Table 2, first row: sbh(34 + 5as/h) with s = 2048, a = 16, h = 2048, so 5as/h = 80
    assert activation_bytes(2048, 1, 2048, 16) == 2048 * 2048 * (34 + 80)


def test_sequence_parallelism_does_not_matter_on_one_rank():
    assert activation_bytes(2048, 2, 4096, 32, sequence_parallel=True) == activation_bytes(2048, 2, 4096, 32)


def test_flash_activations_split_by_hand():
    # s = b = 1, h = 8, f = 16, a = 2, h_kv = 4, t = 2: whole 8·8 = 64; split 4·8 + 4·4 + 6·16 + 4·2 = 152
    shape = (1, 1, 8, 16, 2, 4)
    assert flash_activation_bytes(*shape) == 216
    assert flash_activation_bytes(*shape, 2) == 108
    assert flash_activation_bytes(*shape, 2, sequence_parallel=False) == 64 + 76
    assert flash_activation_bytes(*shape, 2, 2) == 54
    assert flash_activation_bytes(*shape, gated=False) == 216 - 2 * 16


def test_logits_of_llama_3_8b():
    # 4 bytes · 8192 tokens · 128256 words
    assert logits_bytes(8192, 1, 128256) == 4202692608
    assert logits_bytes(8192, 1, 128256, 8, copies=2) == 4202692608 / 4


@pytest.mark.parametrize(
    ("parameters", "shards", "gigabytes"),
    [  # arXiv:1910.02054: Figure 1 (7.5B on 64) and Table 1 (128B and 1T on 64)
        (7.5e9, 64, (120, 31.40625, 16.640625, 1.875)),
        (128e9, 64, (2048, 536, 284, 32)),
        (1e12, 64, (16000, 4187.5, 2218.75, 250)),
    ],
)
def test_zero_states(parameters, shards, gigabytes):
    for stage, expected in enumerate(gigabytes):
        assert zero_state_bytes(parameters, shards, stage) / 1e9 == pytest.approx(expected, rel=1e-12)


def test_zero_on_one_rank_saves_nothing():
    assert len({zero_state_bytes(1e9, 1, stage) for stage in (0, 1, 2, 3)}) == 1


def test_zero_traffic_is_that_of_data_parallelism_up_to_stage_two():
    # arXiv:1910.02054, section 7: 2Ψ, 2Ψ and 3Ψ in the limit of many ranks
    assert [zero_traffic(1.0, 1e12, stage) for stage in (0, 1, 2, 3)] == pytest.approx([2, 2, 2, 3])
    # four micro-batches: four scatters and one gather; eight gathers and four scatters
    assert [zero_traffic(1.0, 1e12, stage, 4) for stage in (1, 2, 3)] == pytest.approx([2, 5, 12])


@pytest.mark.parametrize(
    ("strategy", "share"), [("replicate", 1.99609375), ("full", 2.994140625), ("hybrid", 0.24951171875)]
)
def test_fsdp_cross_host_traffic(strategy, share):
    # arXiv:2304.11277, section 3.2.2 with W = 512, G = 8: 2·511/512, 3·511/512, 2·511/(8·512)
    assert cross_host_traffic(1.0, 512, 8, strategy) == share


def test_hybrid_shards_exchange_less_than_the_paper_neglects():
    # 2/8 · 63/64 exactly, against 2/8 · 511/512
    assert hybrid_shard_traffic(1.0, 8, 64)[1] == 0.24609375


def test_zero_plus_plus_quarters_the_traffic():
    # the announcement's table: 3M to 0.5M + 0 + 0.25M
    assert zero_plus_plus_traffic(8.0) == 6.0
    off = {"quantised_weights": False, "secondary_shards": False, "quantised_gradients": False}
    assert zero_plus_plus_traffic(8.0, **off) == 24.0


def test_fsdp_peak_parameters():
    # fp32 shards 4 · 8e9/16, bf16 unit 2 · 0.5e9, twice with prefetch
    assert fsdp_parameter_peak_bytes(8e9, 0.5e9, 16) == 3e9
    assert fsdp_parameter_peak_bytes(8e9, 0.5e9, 16, live_units=2) == 4e9


def test_checkpoints_at_the_optimum_cost_twice_the_geometric_mean():
    best = checkpoint_segments(64, 4.0, 100.0)
    assert best == 40.0  # √(64·25)
    assert checkpoint_bytes(64, 4.0, 100.0, best) == 320.0  # 2√(64·4·100)
    assert checkpoint_bytes(64, 4.0, 100.0, 20) > 320.0 < checkpoint_bytes(64, 4.0, 100.0, 64)


@pytest.mark.parametrize(("shards", "bytes_per_parameter"), [(1, 18.0), (4, 9.0), (64, 6.1875)])
def test_megatron_divides_what_only_the_optimizer_reads(shards, bytes_per_parameter):
    """16-bit weights and fp32 gradients stay whole, 12 bytes are divided: Megatron-LM, theoretical_memory_usage.py."""
    assert megatron_state_bytes(1e9, shards) == 1e9 * bytes_per_parameter
