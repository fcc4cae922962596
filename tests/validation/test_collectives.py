"""Collectives that others measured: recorded errors on a sample, what tables may look like, what is not known."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from planner.costs.expert_exchange import exchange_traffic
from planner.costs.moe import distinct_domains
from planner.engine.kernel_prices import exchange_s
from planner.specs.exchange_library import exchange_kernel, exchange_libraries
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


# deepseek-ai/DeepEP, branch hybrid-ep @94a9f8f6, docs/README_Hybrid-EP.md: 4,096 tokens of 7,168 in 16 bits, top 8, random: GB/s
# of the kernel alone, on GB200 (32 multiprocessors) by copies to ranks, on H100 over InfiniBand (16) by copies to nodes.
@pytest.mark.parametrize(
    ("device", "nodes", "per_node", "dispatch_gb_s", "combine_gb_s"),
    [
        ("GB200-NVL72", 1, 8, 764.03, 737.13), ("GB200-NVL72", 1, 16, 706.95, 666.26), ("GB200-NVL72", 1, 24, 665.97, 639.8),
        ("GB200-NVL72", 1, 32, 642.23, 605.15), ("GB200-NVL72", 1, 36, 632.31, 596.99),
        ("H100-SXM", 4, 8, 57.69, 57.46), ("H100-SXM", 8, 8, 49.97, 49.77),
    ],
)  # fmt: skip
def test_tokens_go_to_their_experts_as_fast_as_hybrid_ep(
    device, nodes, per_node, dispatch_gb_s, combine_gb_s
):
    levels, _ = levels_of(Machine(device, nodes, per_node, rdma=True))
    traffic = exchange_traffic(4096 * 7168 * 2.0, 8, levels)
    copies = distinct_domains(8, nodes if nodes > 1 else per_node)
    for kernel, gb_s in (("dispatch", dispatch_gb_s), ("combine", combine_gb_s)):
        seconds = exchange_s(exchange_kernel(f"hybrid-ep.{kernel}"), *traffic, levels)
        assert seconds == pytest.approx(
            copies * 4096 * 7168 * 2.0 / (gb_s * 1e9), rel=0.2
        )  # found: -9 to +16 %
