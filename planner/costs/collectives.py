"""Time and bytes of collectives on a hierarchical network.

A group's path through the network is a sequence of :class:`Level`, innermost tier first. Every algorithm's cost has coefficients
that depend on the levels alone (:mod:`planner.costs.collective_algorithms`), so that one set of levels prices a whole stack of
messages. Bytes are bytes sent per rank, bandwidth is per device and per direction.

Every device has its own network interface, or its share of one: a group with ``k`` members in a node leaves it through ``k``
shares. Groups that work side by side, such as the data-parallel rings of eight tensor-parallel ranks, have their own shares and
are priced as if all of them sent at once, which they do.

Sources: those of the algorithms, which are named there; sizes per rank as in NVIDIA/nccl-tests, doc/PERFORMANCE.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.costs.arrays import Real
from planner.costs.collective_algorithms import Level, MessageCost, Transport, collective_costs

__all__ = [
    "CUSTOM_ALL_REDUCE",
    "CUSTOM_ALL_REDUCE_BYTES",
    "Level",
    "MessageCost",
    "Transport",
    "all_gather_bytes",
    "all_gather_s",
    "all_reduce_bytes",
    "all_reduce_s",
    "all_to_all_bytes",
    "all_to_all_s",
    "broadcast_bytes",
    "broadcast_s",
    "collective_costs",
    "custom_all_reduce_s",
    "fastest_s",
    "group_members",
    "point_to_point_s",
    "reduce_scatter_bytes",
    "reduce_scatter_s",
]


def group_members(size: Real, stride: Real, domain: Real, ranks: Real | None = None) -> Real:
    """Members of a group inside one domain of a tier.

    The group holds ``size`` ranks that lie ``stride`` apart (the product of the mesh axes inside it), the
    domain holds ``domain`` consecutive ranks, and ``ranks`` is how many there are in all (a domain that holds
    all ranks holds every group). The answer divides ``size`` and is the largest block of consecutive members
    that lies inside one domain for *every* group of the mesh: ``gcd(size, domain / stride)``, or 1 where the
    stride does not divide the domain. It is therefore exact where the mesh divides the domain and
    conservative where groups straddle a boundary.

    >>> group_members([8, 16, 16, 6], [1, 1, 4, 1], 8).tolist()
    [8, 8, 2, 2]
    """
    # Rows that a validity check will reject may hold degrees below one; they must not divide by zero here.
    size_, stride_, domain_ = (np.maximum(np.asarray(x).astype(np.int64), 1) for x in (size, stride, domain))
    inside = np.where(domain_ % stride_ == 0, np.gcd(size_, domain_ // stride_), 1)
    return inside[()] if ranks is None else np.where(domain_ >= ranks, size_, inside)[()]


def all_reduce_s(n_bytes: Real, levels: Sequence[Level], algorithm: str = "auto") -> Real:
    """Seconds of an all-reduce of ``n_bytes`` (the full tensor on every rank).

    ``algorithm`` is ``ring``, ``tree``, ``hierarchical``, ``multicast`` (the switch adds up), ``one_shot``, ``direct`` or
    ``auto``, the element-wise fastest of what :func:`collective_costs` names. ``one_shot`` (every rank reads all of every peer)
    and ``direct`` (reduce-scatter and all-gather in one hop each) want a kernel that reaches all peers at once on a switched
    domain, which the caller has to know.

    One level, ring: ``2(G−1)/G · n/W + 2(G−1)·α``; tree: ``2n/W + 2⌈log2 G⌉·α``. Range: ``n_bytes >= 0``; no bytes, or a group of
    one, take no time.

    >>> round(float(all_reduce_s(8e9, [Level(8, 250e9, 0.0)], "ring")), 6)  # 2 * 7/8 * 8e9 / 250e9
    0.056
    >>> float(all_reduce_s(1e9, [Level(1, 300e9, 1e-6)]))
    0.0
    """
    return fastest_s(n_bytes, collective_costs("all_reduce", levels, algorithm))


CUSTOM_ALL_REDUCE = ("one_shot", "direct")
"""Algorithms of the kernels that serving frameworks bring for small all-reduces."""

CUSTOM_ALL_REDUCE_BYTES = 8 * 2**20
"""Largest message of such a kernel: vLLM ``vllm/distributed/device_communicators/custom_all_reduce.py``, ``max_size``."""


def custom_all_reduce_s(
    n_bytes: Real, levels: Sequence[Level], largest_bytes: float = CUSTOM_ALL_REDUCE_BYTES
) -> Real:
    """Seconds of an all-reduce where a serving framework brings kernels of its own for small messages.

    Up to ``largest_bytes`` the fastest of its ``one_shot`` and ``direct`` kernels and of the library's algorithms, beyond it the
    library alone.

    >>> round(1e6 * float(custom_all_reduce_s(65536, [Level(8, 400e9, 1e-6)])), 2)  # one hop, 7 * 65536 / 400e9
    2.15
    """
    library = collective_costs("all_reduce", levels)
    own = tuple(cost for name in CUSTOM_ALL_REDUCE for cost in collective_costs("all_reduce", levels, name))
    small = fastest_s(n_bytes, (*own, *library))
    return np.where(np.less_equal(n_bytes, largest_bytes), small, fastest_s(n_bytes, library))[()]


def all_gather_s(n_bytes_full: Real, levels: Sequence[Level], algorithm: str = "auto") -> Real:
    """Seconds of an all-gather whose result is ``n_bytes_full``.

    ``algorithm`` is ``ring``, ``hierarchical``, ``direct`` or ``auto``, the element-wise faster of the first
    two. One level, ring: ``(G−1)/G · n/W + (G−1)·α``.

    >>> round(float(all_gather_s(64e9, [Level(64, 50e9, 1e-6)], "ring")), 9)  # 63/64 * 64e9 / 50e9 + 63e-6
    1.260063
    """
    return fastest_s(n_bytes_full, collective_costs("all_gather", levels, algorithm))


def reduce_scatter_s(n_bytes_full: Real, levels: Sequence[Level], algorithm: str = "auto") -> Real:
    """Seconds of a reduce-scatter of ``n_bytes_full``: the all-gather, backwards.

    >>> levels = [Level(8, 300e9, 2e-6), Level(64, 25e9, 5e-6)]
    >>> bool(reduce_scatter_s(1e9, levels) == all_gather_s(1e9, levels))
    True
    """
    return all_gather_s(n_bytes_full, levels, algorithm)


def all_to_all_s(n_bytes_local: Real, levels: Sequence[Level]) -> Real:
    """Seconds of an all-to-all in which every rank holds ``n_bytes_local`` and keeps ``1/G`` of it.

    Tier ``j`` carries what leaves the domain below, ``n · (G − m[j−1])/G`` (the interface to a tier also
    carries what goes further out). The tiers are separate links that carry different peers' messages at the
    same time (grouped sends in NCCL, the forwarding kernels of DeepEP), so they overlap and the slowest
    decides. Messages to all peers are posted at once, so the latency is one hop per tier crossed and not ``G
    − 1``: 512 B over 2, 4 and 8 H100 take 6.5, 6.5 and 7.4 µs with NCCL 2.27, while the all-gather grows by
    0.8 µs a hop (aiconfigurator's nccl-tests tables). Where peers receive unequal amounts, ``n_bytes_local`` is
    what the busiest rank sends or receives: all wait for it.

    >>> round(float(all_to_all_s(8e9, [Level(8, 350e9, 0.0)])), 6)  # 7/8 * 8e9 / 350e9
    0.02
    """
    return fastest_s(n_bytes_local, collective_costs("all_to_all", levels))


def broadcast_s(n_bytes: Real, levels: Sequence[Level], algorithm: str = "auto") -> Real:
    """Seconds of a pipelined broadcast: ``n/W`` plus the depth of a chain or a tree.

    ``algorithm`` is ``ring`` (a chain), ``tree`` or ``auto``, the element-wise faster of the two; a library has the chain alone.

    A chain passes every byte over every hop, so its bandwidth term is ``n/W`` as the tree's, without
    ``(G−1)/G``, and nothing of its ``(G−1)·α`` hides behind that.

    >>> round(float(broadcast_s(25e9, [Level(8, 50e9, 0.0)])), 6)
    0.5
    """
    return fastest_s(n_bytes, collective_costs("broadcast", levels, algorithm))


def point_to_point_s(n_bytes: Real, levels: Sequence[Level]) -> Real:
    """Seconds of one message between neighbours of a group, over the innermost tier that holds all of the group.

    >>> float(point_to_point_s(25e6, [Level(1, 250e9, 1e-6), Level(4, 25e9, 5e-6)]))
    0.001005
    """
    return fastest_s(n_bytes, collective_costs("point_to_point", levels))


def fastest_s(n_bytes: Real, costs: Sequence[MessageCost]) -> Real:
    """Seconds of the element-wise fastest of some costs; no bytes take no time.

    >>> float(fastest_s(10.0, [MessageCost(1.0, 5.0), MessageCost(2.0, 0.0)]))
    15.0
    >>> float(fastest_s(4.0, [MessageCost(1.0, 5.0, 3.0)]))  # 5 + √(3² + 4²)
    10.0
    """
    best: Real = np.inf
    for s_per_byte, latency_s, hidden_s in costs:
        bytes_s = n_bytes * s_per_byte
        if hidden_s is not None:
            bytes_s = np.sqrt(bytes_s * bytes_s + hidden_s * hidden_s)
        best = np.minimum(best, bytes_s + latency_s)
    return best * np.greater(n_bytes, 0)


def all_reduce_bytes(n_bytes: Real, group: Real) -> Real:
    """Bytes sent per rank by a bandwidth-optimal all-reduce: ``2n(G−1)/G``.

    >>> all_reduce_bytes(16.0, 8)
    28.0
    """
    return 2.0 * n_bytes * (group - 1) / group


def all_gather_bytes(n_bytes_full: Real, group: Real) -> Real:
    """Bytes sent per rank by an all-gather to ``n_bytes_full``: ``n(G−1)/G``.

    >>> all_gather_bytes(16.0, 8)
    14.0
    """
    return 1.0 * n_bytes_full * (group - 1) / group


def reduce_scatter_bytes(n_bytes_full: Real, group: Real) -> Real:
    """Bytes sent per rank by a reduce-scatter of ``n_bytes_full``: ``n(G−1)/G``.

    >>> reduce_scatter_bytes(16.0, 8)
    14.0
    """
    return 1.0 * n_bytes_full * (group - 1) / group


def all_to_all_bytes(n_bytes_local: Real, group: Real) -> Real:
    """Bytes sent per rank by an all-to-all of ``n_bytes_local``: ``n(G−1)/G``.

    >>> all_to_all_bytes(16.0, 8)
    14.0
    """
    return 1.0 * n_bytes_local * (group - 1) / group


def broadcast_bytes(n_bytes: Real, group: Real) -> Real:
    """Bytes sent by a rank in the middle of a pipelined broadcast: ``n``, or nothing in a group of one.

    >>> broadcast_bytes(16.0, 8)
    16.0
    """
    return 1.0 * n_bytes * (group > 1)
