"""Time and bytes of collectives on a hierarchical network.

A group's path through the network is a sequence of :class:`Level`, innermost tier first. Every algorithm is
a linear cost ``n_bytes · seconds_per_byte + latency_s`` whose two coefficients depend on the levels alone,
so that one set of levels prices a whole stack of messages. Bytes are bytes sent per rank, bandwidth is per
device and per direction.

Every device has its own network interface: a group with ``k`` members in a node leaves it through ``k``
interfaces.

Sources: R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of Collective Communication Operations in MPICH",
IJHPCA 19(1), 2005 (ring, latency–bandwidth model); P. Patarasu, X. Yuan, JPDC 69(2), 2009 (ring all-reduce is
bandwidth optimal); P. Sanders, J. Speck, J. L. Träff, "Two-tree algorithms for full bandwidth broadcast,
reduction and scan", Parallel Computing 35(12), 2009 (the double binary tree of NCCL).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from planner.costs.arrays import Real

__all__ = [
    "Level",
    "LinearCost",
    "all_gather_bytes",
    "all_gather_s",
    "all_reduce_bytes",
    "all_reduce_s",
    "all_to_all_bytes",
    "all_to_all_s",
    "broadcast_bytes",
    "broadcast_s",
    "collective_costs",
    "fastest_s",
    "group_members",
    "point_to_point_s",
    "reduce_scatter_bytes",
    "reduce_scatter_s",
]

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"]


@dataclass(frozen=True, slots=True)
class Level:
    """What one tier of the network offers a group.

    ``members`` counts the group's ranks inside one domain of the tier: cumulative, non-decreasing from tier
    to tier, on the last tier the size of the group. ``latency_s`` is that of one hop. All three broadcast.
    """

    members: Real
    bytes_per_s: Real
    latency_s: Real


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

    ``algorithm`` is ``ring``, ``tree``, ``hierarchical``, ``direct`` or ``auto``, the element-wise fastest of
    the first three. ``direct`` (reduce-scatter and all-gather in one hop each) wants a kernel that writes to
    all peers at once on a switched domain, which the caller has to know.

    One level, ring: ``2(G−1)/G · n/W + 2(G−1)·α``; tree: ``2n/W + 2⌈log2 G⌉·α``. Range: ``n_bytes >= 0``; no
    bytes, or a group of one, take no time.

    >>> round(float(all_reduce_s(8e9, [Level(8, 250e9, 0.0)], "ring")), 6)  # 2 * 7/8 * 8e9 / 250e9
    0.056
    >>> float(all_reduce_s(1e9, [Level(1, 300e9, 1e-6)]))
    0.0
    """
    return fastest_s(n_bytes, collective_costs("all_reduce", levels, algorithm))


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
    0.8 µs a hop (aiconfigurator's nccl-tests tables).

    >>> round(float(all_to_all_s(8e9, [Level(8, 350e9, 0.0)])), 6)  # 7/8 * 8e9 / 350e9
    0.02
    """
    return fastest_s(n_bytes_local, collective_costs("all_to_all", levels))


def broadcast_s(n_bytes: Real, levels: Sequence[Level], algorithm: str = "auto") -> Real:
    """Seconds of a pipelined broadcast: ``n/W`` plus the depth of a chain or a tree.

    ``algorithm`` is ``ring`` (a chain), ``tree`` or ``auto``, the element-wise faster of the two.

    A chain passes every byte over every hop, so its bandwidth term is ``n/W`` as the tree's, without
    ``(G−1)/G``.

    >>> round(float(broadcast_s(25e9, [Level(8, 50e9, 0.0)])), 6)
    0.5
    """
    return fastest_s(n_bytes, collective_costs("broadcast", levels, algorithm))


def point_to_point_s(n_bytes: Real, bytes_per_s: Real, latency_s: Real) -> Real:
    """Seconds of one message: ``n/W + α``; no bytes take no time.

    >>> float(point_to_point_s(25e6, 25e9, 5e-6))
    0.001005
    """
    return n_bytes / bytes_per_s + latency_s * np.greater(n_bytes, 0)


class LinearCost(NamedTuple):
    """What an algorithm costs on a network: ``n_bytes · s_per_byte + latency_s``."""

    s_per_byte: Real
    latency_s: Real


def collective_costs(
    collective: Collective, levels: Sequence[Level], algorithm: str = "auto"
) -> tuple[LinearCost, ...]:
    """The algorithms that compete for a collective, as linear costs for :func:`fastest_s`.

    They depend on the network alone: compute them once per group and price any number of messages.

    Raises:
        ValueError: the collective has no such algorithm.

    >>> (ring,) = collective_costs("all_gather", [Level(4, 100.0, 0.5)], "ring")
    >>> float(ring.s_per_byte) * 100, float(ring.latency_s)  # 3/4, 3 hops
    (0.75, 1.5)
    """
    offered = _ALGORITHMS[collective]
    names = _COMPETING[collective] if algorithm == "auto" else (algorithm,)
    if not set(names) <= offered.keys():
        known = ", ".join(("auto", *offered))
        raise ValueError(f"{algorithm!r} is no algorithm of {collective}; there are: {known}")
    path = list(_crossings(levels))
    return tuple(offered[name](path) for name in names)


def fastest_s(n_bytes: Real, costs: Sequence[LinearCost]) -> Real:
    """Seconds of the element-wise fastest of some linear costs; no bytes take no time.

    >>> float(fastest_s(10.0, [LinearCost(1.0, 5.0), LinearCost(2.0, 0.0)]))
    15.0
    """
    best: Real = np.inf
    for cost in costs:
        best = np.minimum(best, n_bytes * cost.s_per_byte + cost.latency_s)
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


class _Crossing(NamedTuple):
    """One tier as the group meets it: members in a domain of the tier below, and of this tier."""

    below: Real
    members: Real
    bytes_per_s: Real
    latency_s: Real


def _crossings(levels: Sequence[Level]) -> Iterator[_Crossing]:
    below: Real = 1.0
    for level in levels:
        members = np.multiply(level.members, 1.0)
        yield _Crossing(below, members, level.bytes_per_s, level.latency_s)
        below = members


def _bottleneck_s_per_byte(path: Sequence[_Crossing]) -> Real:
    """Seconds per byte of a ring or tree that visits domains one after the other.

    A domain with ``k`` members is left through ``k`` interfaces, on which ``k`` rotated rings share the
    bytes: tier ``j`` runs at ``bytes_per_s · m[j−1]``, and all tiers work at once, so the slowest of the
    crossed ones decides.
    """
    slowest: Real = 0.0
    for below, members, bytes_per_s, _ in path:
        slowest = np.maximum(slowest, (members > below) / (below * bytes_per_s))
    return slowest


def _chain(path: Sequence[_Crossing]) -> LinearCost:
    """A chain through all members: ``G − 1`` hops, ``G/m[j−1] − G/m[j]`` of them on tier ``j``."""
    group = path[-1].members
    latency_s: Real = 0.0
    for below, members, _, hop_s in path:
        latency_s = latency_s + (group / below - group / members) * hop_s
    return LinearCost(_bottleneck_s_per_byte(path), latency_s)


def _ring(path: Sequence[_Crossing]) -> LinearCost:
    """The closed chain of one pass: a rank sends all parts but one."""
    chain = _chain(path)
    return LinearCost(chain.s_per_byte * (1.0 - 1.0 / path[-1].members), chain.latency_s)


def _tree(path: Sequence[_Crossing]) -> LinearCost:
    """Two binary trees that carry half of the bytes each: full bandwidth, ``⌈log2⌉`` hops per tier."""
    latency_s: Real = 0.0
    for below, members, _, hop_s in path:
        latency_s = latency_s + np.ceil(np.log2(members / below)) * hop_s
    return LinearCost(_bottleneck_s_per_byte(path), latency_s)


def _hierarchical(path: Sequence[_Crossing]) -> LinearCost:
    """A ring per tier, one tier after the other, each on the share of the inner tiers, ``n/m[j−1]``."""
    s_per_byte: Real = 0.0
    latency_s: Real = 0.0
    for below, members, bytes_per_s, hop_s in path:
        s_per_byte = s_per_byte + (1.0 / below - 1.0 / members) / bytes_per_s
        latency_s = latency_s + (members / below - 1.0) * hop_s
    return LinearCost(s_per_byte, latency_s)


def _direct(path: Sequence[_Crossing]) -> LinearCost:
    """One message to every peer, all at once; see :func:`all_to_all_s`."""
    group = path[-1].members
    s_per_byte: Real = 0.0
    latency_s: Real = 0.0
    for below, members, bytes_per_s, hop_s in path:
        crossed = members > below
        s_per_byte = np.maximum(s_per_byte, crossed * (1.0 - below / group) / bytes_per_s)
        latency_s = latency_s + crossed * hop_s
    return LinearCost(s_per_byte, latency_s)


_Algorithm = Callable[[Sequence[_Crossing]], LinearCost]


def _twice(algorithm: _Algorithm) -> _Algorithm:
    """An all-reduce is two passes: a reduction and its mirror image."""

    def two_passes(path: Sequence[_Crossing]) -> LinearCost:
        s_per_byte, latency_s = algorithm(path)
        return LinearCost(2.0 * s_per_byte, 2.0 * latency_s)

    return two_passes


_GATHER: dict[str, _Algorithm] = {"ring": _ring, "hierarchical": _hierarchical, "direct": _direct}
_ALGORITHMS: dict[Collective, dict[str, _Algorithm]] = {
    "all_reduce": {name: _twice(algorithm) for name, algorithm in (_GATHER | {"tree": _tree}).items()},
    "all_gather": _GATHER,
    "reduce_scatter": _GATHER,
    "all_to_all": {"direct": _direct},
    "broadcast": {"ring": _chain, "tree": _tree},
}
_COMPETING: dict[Collective, tuple[str, ...]] = {
    "all_reduce": ("ring", "tree", "hierarchical"),
    "all_gather": ("ring", "hierarchical"),
    "reduce_scatter": ("ring", "hierarchical"),
    "all_to_all": ("direct",),
    "broadcast": ("ring", "tree"),
}
