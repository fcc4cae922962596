"""Collectives that others measured: recorded errors on a sample, what tables may look like, what is not known."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from planner.specs.exchange_library import exchange_libraries
from planner.validation.call_machine import Machine, cluster_of, device_name, levels_of
from planner.validation.collectives import SMALL_BYTES, bus_bytes_per_s, calls, score_collectives
from planner.validation.expert_exchange import exchanges, is_exchange, traffic_bytes

SAMPLE = Path(__file__).parents[1] / "data" / "collectives"
# Median absolute error of the sample when the constants were fitted, rounded up to a quarter more: a recorded bound, no aim.
BOUNDS = {
    ("aic_nccl_blackwell_and_b60", "collective_large"): 0.06,
    ("aic_nccl_blackwell_and_b60", "collective_small"): 0.06,
    ("aic_nccl_hopper_ampere_ada", "collective_large"): 0.10,
    ("aic_nccl_hopper_ampere_ada", "collective_small"): 0.155,
    ("aic_custom_allreduce", "collective_large"): 0.11,
    ("aic_custom_allreduce", "collective_small"): 0.29,
    ("vidur_collectives", "collective_large"): 0.15,
    ("apex_collectives", "collective_large"): 0.08,
    ("apex_collectives", "collective_small"): 0.08,
    ("aic_deepep_lowlatency_a2a", "expert_all_to_all"): 0.125,
    ("aic_deepep_normal_a2a", "expert_all_to_all"): 0.145,
    ("aic_trtllm_alltoall_gb200", "expert_all_to_all"): 0.06,
}


@pytest.mark.parametrize("path", sorted(SAMPLE.glob("*.csv")), ids=lambda path: path.stem)
def test_recorded_errors_hold(path):
    errors = defaultdict(list)
    for row in score_collectives(path):
        assert row.status == "scored", row.reason
        errors[path.stem, row.metric].append(abs(row.error))
    for key, found in errors.items():
        if key in BOUNDS:
            assert np.median(found) <= BOUNDS[key], key
    assert any(key in BOUNDS for key in errors)


def test_small_and_large_are_parted_at_64_kib():
    for path in SAMPLE.glob("aic_nccl*.csv"):
        found, refused = calls(path)
        assert not refused
        assert {call.metric for call in found if call.n_bytes <= SMALL_BYTES} == {"collective_small"}
        assert {call.metric for call in found if call.n_bytes > SMALL_BYTES} == {"collective_large"}


def test_bus_bandwidth_is_what_nccl_tests_prints():
    # H100, 8 ranks, 512 MiB in 2111 µs: algorithm 254.3 GB/s, times 2·7/8
    assert bus_bytes_per_s("all_reduce", 2.0**29, 2111e-6, 8) == pytest.approx(445.1e9, rel=1e-3)
    assert bus_bytes_per_s("point_to_point", 1e9, 0.01, 2) == 1e11


def written(tmp_path, text):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    return path


NCCL = "source,accelerator,collective,n_nodes,n_devices,size_bytes,latency_ms\n"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a,H100-SXM5-80GB,all_reduce,1,8,1024,", "latency_ms is ''"),
        ("a,H100-SXM5-80GB,gather_scatter,1,8,1024,1", "none of all_reduce"),
        ("a,Abacus 3000,all_reduce,1,8,1024,1", "no profile of accelerator 'Abacus 3000'"),
        ("a,H100-SXM5-80GB,all_reduce,1,x,1024,1", "n_devices is 'x'"),
    ],
)
def test_rows_that_cannot_be_scored_say_why(tmp_path, row, reason):
    (scored,) = score_collectives(written(tmp_path, NCCL + row + "\n"))
    assert scored.status == "unsupported"
    assert reason in scored.reason


def test_a_table_of_no_known_form_is_unsupported(tmp_path):
    (scored,) = score_collectives(written(tmp_path, "accelerator,collective\nH100,all_reduce\n"))
    assert (scored.status, scored.reason) == ("unsupported", "no known form of a table of collectives")


@pytest.mark.parametrize(
    ("device", "inside", "name"),
    [
        ("A100-80GB", "pairwise NVLink (PCIe servers)", "a100-pcie-80gb"),
        ("A100-SXM-80GB", "DGX NVSwitch", "a100-sxm-80gb"),
        ("H100-SXM5-80GB", "", "h100-sxm"),
        ("GB200", "", "gb200-nvl72"),
    ],
)
def test_products_find_their_profiles(device, inside, name):
    assert device_name(Machine(device, 1, 2, inside)) == name


def test_bridged_pairs_are_joined_across_the_host():
    tiers = cluster_of(Machine("A100-80GB", 1, 4, "pairwise NVLink (PCIe servers)")).tiers
    # 600 GB/s over both directions of the bridge
    assert [(tier.name, tier.size, tier.bytes_per_s) for tier in tiers] == [
        ("nvlink", 2, 300e9),
        ("pcie-host", 4, 13.5e9),
    ]


def test_nodes_that_nothing_is_said_of_share_ethernet():
    one, eight = (levels_of(Machine("A100-SXM-80GB", 2, n))[0][-1].bytes_per_s for n in (1, 8))
    assert one == 6.9e9  # one device reaches one interface
    assert eight == pytest.approx(3 * 6.9e9 / 8)  # eight share three


def test_traffic_of_dispatch_kernels():
    (path,) = SAMPLE.glob("aic_deepep_lowlatency*.csv")
    assert is_exchange(tuple(path.read_text().splitlines()[0].split(",")))
    kernel = exchange_libraries()["deepep-low-latency"]["dispatch"]
    found = next(e for e in exchanges(path) if e.kernel == "dispatch" and e.machine.nodes == 1)
    levels, _ = levels_of(found.machine)
    link_bytes, remote_bytes = traffic_bytes(found, kernel, levels)
    # every copy by itself, fp8 and a 4-byte scale per 128: hidden + 4·hidden/128 bytes
    assert link_bytes == pytest.approx(found.tokens * found.topk * found.hidden * (1 + 4 / 128))
    assert remote_bytes == 0.0
