"""Collectives: the alpha–beta arithmetic worked by hand, on one tier and on several."""

import numpy as np
import pytest

from planner.costs import (
    Level,
    Transport,
    all_gather_bytes,
    all_gather_s,
    all_reduce_bytes,
    all_reduce_s,
    all_to_all_bytes,
    all_to_all_s,
    broadcast_bytes,
    broadcast_s,
    collective_costs,
    custom_all_reduce_s,
    fastest_s,
    group_members,
    point_to_point_s,
    reduce_scatter_bytes,
    reduce_scatter_s,
)

NODE = Level(8, 400e9, 1e-6)
CLUSTER = (NODE, Level(16, 50e9, 5e-6))  # two nodes of eight, one interface per device


def test_ring_all_reduce_on_one_tier_is_the_textbook_form():
    # Thakur et al. 2005: 2(G-1)α + 2(G-1)/G · n/W = 14 µs + 1.75 * 1e9 / 400e9
    assert all_reduce_s(1e9, [NODE], "ring") == pytest.approx(14e-6 + 4.375e-3)


def test_tree_all_reduce_pays_log_latency_and_full_bytes():
    # 2·log2(8)·α + 2n/W
    assert all_reduce_s(1e9, [NODE], "tree") == pytest.approx(6e-6 + 5e-3)
    # six ranks need a tree of depth 3
    assert all_reduce_s(1.0, [Level(6, 1e30, 1e-6)], "tree") == pytest.approx(6e-6)


def test_ring_uses_every_interface_of_a_node():
    # The node is left through 8 interfaces of 50 GB/s = 400 GB/s, no slower than inside: n·15/16 / 400e9.
    # Hops of one pass: 16 - 2 = 14 inside nodes, 2 - 1 = 1 between them.
    assert all_gather_s(16e9, CLUSTER, "ring") == pytest.approx(15e9 / 400e9 + 14e-6 + 5e-6)
    # One member per node: a single interface each, and the fast tier is not met at all.
    spread = (Level(1, 400e9, 1e-6), Level(16, 50e9, 5e-6))
    assert all_gather_s(16e9, spread, "ring") == pytest.approx(15e9 / 50e9 + 15 * 5e-6)


def test_hierarchical_all_reduce_sums_its_three_phases():
    # RS inside: 7/8 n at 400; AR between on n/8: 2·1/2·n/8 at 50; AG inside: 7/8 n at 400.
    n = 8e9
    phases = 7e9 / 400e9 + 7e-6 + (1e9 / 50e9 + 2 * 5e-6) + 7e9 / 400e9 + 7e-6
    assert all_reduce_s(n, CLUSTER, "hierarchical") == pytest.approx(phases)


def test_hierarchical_takes_any_number_of_tiers():
    tiers = (Level(4, 100.0, 0.0), Level(8, 10.0, 0.0), Level(32, 1.0, 0.0))
    # 3/4·n/100 + 1/2·n/4/10 + 3/4·n/8/1 with n = 800
    assert all_gather_s(800.0, tiers, "hierarchical") == pytest.approx(6 + 10 + 75)


@pytest.mark.reaches("ring_allreduce")
def test_auto_takes_the_fastest_for_each_row():
    n = np.array([1e3, 1e10])
    rows = [all_reduce_s(n, CLUSTER, name) for name in ("ring", "tree", "hierarchical")]
    auto = all_reduce_s(n, CLUSTER)
    np.testing.assert_array_equal(auto, np.min(rows, axis=0))
    assert auto[0] == rows[1][0]  # latency decides: 2·(3·1 + 1·5) µs against 2·(14·1 + 5) and 2·(7 + 5)
    assert auto[1] == rows[0][1]  # bandwidth decides: 15/16 of the tree's bytes


def test_direct_all_reduce_has_two_hops():
    assert all_reduce_s(1e9, [NODE], "direct") == pytest.approx(2e-6 + 4.375e-3)


def test_all_to_all_is_paced_by_its_slowest_tier():
    # Of 16 equal parts 8 leave the node: n/2 at 50 GB/s; 15/16 n at 400 GB/s is hidden. One hop per tier.
    assert all_to_all_s(1e9, CLUSTER) == pytest.approx(0.5e9 / 50e9 + 6e-6)


def test_all_to_all_of_a_group_inside_a_node_does_not_meet_the_network():
    inside = (NODE, Level(8, 50e9, 5e-6))
    assert all_to_all_s(1e9, inside) == all_to_all_s(1e9, [NODE])


def test_broadcast_is_pipelined():
    assert broadcast_s(4e9, [NODE], "ring") == pytest.approx(4e9 / 400e9 + 7e-6)
    assert broadcast_s(4e9, [NODE], "tree") == pytest.approx(4e9 / 400e9 + 3e-6)
    assert broadcast_s(4e9, [NODE]) == broadcast_s(4e9, [NODE], "tree")


NVLINK = Transport(launch_s=1e-5, small_fraction=0.5, bulk_hop_s=2.5e-5)
NET = Transport(launch_s=1e-5, small_fraction=0.92, bulk_hop_s=1.4e-5, scale_out=True)


def library(ranks):
    """Nodes of eight with four 100 Gb/s interfaces, driven by a library."""
    return [Level(min(ranks, 8), 230e9, 1e-6, NVLINK), Level(ranks, 6.25e9, 5e-6, NET)]


@pytest.mark.parametrize("ranks", [64, 256, 1024])
def test_a_broadcast_between_nodes_fills_its_ring_before_it_ends(ranks):
    # NVIDIA/nccl @v2.18.5, src/graph/tuning.cc: nRanks steps of 14 µs at the network's latency by Simple, and the bytes at the
    # bandwidth of all interfaces of a node.
    nccl_s = ranks * 14e-6 + 90e6 / 50e9
    assert broadcast_s(90e6, library(ranks)) == pytest.approx(nccl_s, rel=0.02)
    assert all_gather_s(90e6, library(ranks)) < 90e6 / 50e9 + ranks * 5e-6  # whose hops move one rank's part


def test_a_small_broadcast_hops_by_the_small_protocol():
    # 8 KiB over eight nodes: 63 hops of 5 µs; six of the seven interfaces hand it on again, at 46 GB/s.
    moved_s = 8192 / (8 * 6.25e9 * 0.92)
    assert broadcast_s(8192, library(64)) == pytest.approx(1e-5 + 63 * 5e-6 + 7 * moved_s)


def test_a_broadcast_inside_a_node_has_the_nodes_hops():
    # NCCL has no tree for it. Seven hops, and the bytes once over every link.
    assert broadcast_s(1e9, library(8)) == pytest.approx(1e-5 + 7 * 2.5e-5 + 1e9 / 230e9)
    assert broadcast_s(1e9, library(8)) == broadcast_s(1e9, library(8), "ring")


def test_sent_bytes():
    # (G-1)/G, twice that for an all-reduce
    assert all_gather_bytes(64.0, 64) == reduce_scatter_bytes(64.0, 64) == all_to_all_bytes(64.0, 64) == 63.0
    assert all_reduce_bytes(64.0, 64) == 126.0
    assert broadcast_bytes(64.0, 64) == 64.0
    assert broadcast_bytes(64.0, 1) == 0.0


def test_nothing_to_send_takes_no_time():
    empty = np.zeros(2)
    for time_s in (all_reduce_s, all_gather_s, reduce_scatter_s, all_to_all_s, broadcast_s, point_to_point_s):
        np.testing.assert_array_equal(time_s(empty, CLUSTER), empty)


@pytest.mark.parametrize(
    ("size", "stride", "domain", "members"),
    [
        (8, 1, 8, 8),  # fills a node
        (16, 1, 8, 8),  # two nodes
        (4, 8, 8, 1),  # one rank per node
        (16, 4, 8, 2),  # ranks 0 4 | 8 12 | …
        (6, 1, 8, 2),  # 0–5 | 6 7, 8–11 straddles: only pairs always stay together
        (12, 1, 8, 4),
        (4, 3, 8, 1),  # 0 3 | 6 9: no pair always stays together
        (4, 0.5, 8, 4),  # an invalid mesh, whose row is rejected elsewhere, does not fail here
    ],
)
def test_group_members(size, stride, domain, members):
    assert group_members(size, stride, domain) == members


@pytest.mark.parametrize("domain", [8, 64])
@pytest.mark.parametrize("shape", [(2, 4, 8), (6, 4, 4), (3, 8, 4), (16, 2, 2), (12, 4, 2)])
def test_group_members_never_promises_more_than_every_group_has(shape, domain):
    """Over all groups of a three-axis mesh: aligned blocks of the answer's size stay inside one domain."""
    ranks = np.arange(np.prod(shape)).reshape(shape[::-1])
    for axis, size in enumerate(shape):
        stride = int(np.prod(shape[:axis]))
        groups = np.moveaxis(ranks, 2 - axis, -1).reshape(-1, size)
        members = int(group_members(size, stride, domain))
        blocks = (groups // domain).reshape(-1, size // members, members)
        assert (blocks == blocks[..., :1]).all()


def test_group_members_of_a_domain_that_holds_everything():
    assert group_members(6, 1, 8) == 2
    assert group_members(6, 1, 8, ranks=6) == 6


def test_an_algorithm_that_a_collective_lacks_is_named():
    with pytest.raises(ValueError, match="'tree' is no algorithm of all_gather; there are: auto, ring"):
        all_gather_s(1.0, [NODE], "tree")


def test_costs_computed_once_price_a_stack_of_messages():
    messages = np.array([[1e3, 1e5], [1e7, 1e9]])
    costs = collective_costs("all_reduce", CLUSTER)
    np.testing.assert_array_equal(fastest_s(messages, costs), all_reduce_s(messages, CLUSTER))


# -- links that a library drives ---------------------------------------------------------------------------------

LIBRARY = Transport(
    launch_s=5e-6, small_fraction=0.5, bulk_hop_s=10e-6, own_share=0.8, exchange_s=6e-6, peer_s=0.5e-6,
    peer_bytes_per_s=10e9, bulk_exchange_s=12e-6, exchange_fraction=0.8, exchange_own_share=0.2,
    multicast_s=50e-6, multicast_fraction=0.75, direct_hop_s=3e-6, direct_fraction=0.7,
)  # fmt: skip
SWITCHED = Level(8, 400e9, 1e-6, LIBRARY)
RAIL = Transport(launch_s=8e-6, small_fraction=0.9, bulk_hop_s=14e-6, exchange_s=10e-6, scale_out=True)
NODES = (SWITCHED, Level(32, 50e9, 5e-6, RAIL))  # four nodes of eight


def test_small_messages_cost_a_launch_and_hops():
    # 5 µs + 7 hops of 1 µs + 8 B · (7 + 0.8)/8 / 200e9
    assert all_gather_s(8.0, [SWITCHED]) == pytest.approx(12e-6, rel=1e-3)
    assert all_reduce_s(8.0, [SWITCHED]) == pytest.approx(19e-6, rel=1e-3)  # two passes


def test_hops_of_the_bulk_protocol_overlap_with_the_bytes():
    n = 1e9
    moving_s = n * (7 + 0.8) / 8 / 400e9
    assert all_gather_s(n, [SWITCHED]) == pytest.approx(5e-6 + np.hypot(70e-6, moving_s))


@pytest.mark.parametrize("group", [2, 4, 8])
def test_large_gathers_reach_the_fraction_of_the_link_that_is_theirs(group):
    n = 1e13
    rate = n * (group - 1) / group / all_gather_s(n, [Level(group, 400e9, 1e-6, LIBRARY)])
    # of (G−1) + own_share parts a rank sends G−1
    assert rate == pytest.approx(400e9 * (group - 1) / (group - 1 + 0.8), rel=1e-4)


def test_a_switch_that_adds_up_wins_where_it_moves_less():
    # (1 + 1/8)/(0.75·400e9) per byte beats the ring's (14 + 0.8)/8/400e9, and only more than two ranks use it
    n = 1e10
    assert all_reduce_s(n, [SWITCHED]) == pytest.approx(55e-6 + n * 1.125 / 300e9)
    pair = Level(2, 400e9, 1e-6, LIBRARY)
    assert all_reduce_s(n, [pair]) == all_reduce_s(n, [pair], "ring") < all_reduce_s(n, [pair], "multicast")


def test_a_tree_is_a_chain_in_the_node_and_branches_between_nodes():
    # NCCL tuning.cc: 2 · (ranks/nodes − 1) hops inside, 2 · log2(nodes) between
    assert all_reduce_s(1.0, NODES, "tree") == pytest.approx(8e-6 + 2 * (7 * 1e-6 + 2 * 5e-6), rel=1e-3)


def test_sums_in_switches_are_joined_by_trees_between_nodes():
    n = 1e10
    between = 2 * n / (8 * 50e9)  # up and down, through eight interfaces
    assert all_reduce_s(n, NODES, "multicast") == pytest.approx(58e-6 + 4 * 14e-6 + between)


def test_a_library_has_no_hierarchy_of_gathers():
    assert all_gather_s(1e3, NODES) > all_gather_s(1e3, NODES, "hierarchical")
    plain = tuple(Level(level.members, level.bytes_per_s, level.latency_s) for level in NODES)
    assert all_gather_s(1e3, plain) == all_gather_s(1e3, plain, "hierarchical")


def test_exchange_is_bound_by_the_peer_then_by_the_link():
    # eight peers' parts of 1/8: 6 µs + 7 · 0.5 µs + n/8/10e9 while that is less than the bulk protocol's start
    assert all_to_all_s(8e3, [SWITCHED]) == pytest.approx(9.5e-6 + 1e3 / 10e9)
    assert all_to_all_s(1e9, [SWITCHED]) == pytest.approx(15.5e-6 + 1e9 * 7.2 / 8 / 320e9)


def test_a_send_goes_over_the_innermost_tier_that_holds_the_group():
    assert point_to_point_s(1e9, NODES) == pytest.approx(1e9 / 50e9)
    inside = (SWITCHED, Level(8, 50e9, 5e-6, RAIL))
    assert point_to_point_s(1e9, inside) == pytest.approx(12e-6 + 1e9 / 400e9)
    assert point_to_point_s(100.0, inside) == pytest.approx(6e-6, rel=2e-2)


def test_custom_all_reduce_is_one_shot_then_two_then_the_library():
    one, two = 3e-6 + 7 * 4096 / 280e9, 6e-6 + 1.75 * 2**20 / 280e9
    assert custom_all_reduce_s(4096, [SWITCHED]) == pytest.approx(one)
    assert custom_all_reduce_s(2**20, [SWITCHED]) == pytest.approx(two)
    assert custom_all_reduce_s(2.0**24, [SWITCHED]) == all_reduce_s(2.0**24, [SWITCHED])


def test_links_without_direct_kernels_fall_back_on_the_library():
    assert custom_all_reduce_s(4096, NODES) == all_reduce_s(4096, NODES)


@pytest.mark.parametrize("time_s", [all_reduce_s, all_gather_s, all_to_all_s, broadcast_s, point_to_point_s])
def test_library_costs_grow_with_size_and_vanish_for_one_rank(time_s):
    sizes = np.logspace(0, 11, 60)
    assert (np.diff(time_s(sizes, NODES)) > 0).all()
    alone = (Level(1, 400e9, 1e-6, LIBRARY), Level(1, 50e9, 5e-6, RAIL))
    np.testing.assert_array_equal(time_s(sizes, alone), np.zeros(60))


def test_groups_side_by_side_have_a_share_of_the_interfaces_each():
    # One member per node of a group with stride 8: each of the eight groups leaves by its own interface, at its own rate.
    spread = (Level(1, 400e9, 1e-6, LIBRARY), Level(4, 50e9, 5e-6, RAIL))
    n = 1e11
    assert all_gather_s(n, spread) == pytest.approx(n * (3 + 0.8) / 4 / 50e9, rel=1e-3)
