"""Collectives: the alpha–beta arithmetic worked by hand, on one tier and on several."""

import numpy as np
import pytest

from planner.costs import (
    Level,
    all_gather_bytes,
    all_gather_s,
    all_reduce_bytes,
    all_reduce_s,
    all_to_all_bytes,
    all_to_all_s,
    broadcast_bytes,
    broadcast_s,
    collective_costs,
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
