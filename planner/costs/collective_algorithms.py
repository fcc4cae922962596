"""The algorithms of collectives: what each costs on the levels of a network, as coefficients that price any number of messages.

A level without a :class:`Transport` is the textbook's α–β link, on which every algorithm is ``hops · α + bytes / W``. A
transport says how a communication library drives the link: a call has a fixed cost; small messages go by a protocol of short
hops and little bandwidth (NCCL's LL and LL128), large ones by a protocol of long hops that overlap with the transfer (Simple);
a switch may add up what passes through it (NVLS). The library is taken to choose the faster protocol, which NCCL nearly does.

Sources: R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of Collective Communication Operations in MPICH", IJHPCA 19(1),
2005 (ring, latency–bandwidth model); P. Patarasu, X. Yuan, JPDC 69(2), 2009 (ring all-reduce is bandwidth optimal); P. Sanders,
J. Speck, J. L. Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", Parallel Computing 35(12), 2009
(the double binary tree of NCCL); NVIDIA/nccl, src/graph/tuning.cc (hops of each algorithm; trees are chains inside a node).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from planner.costs.arrays import Real

__all__ = ["Level", "MessageCost", "Transport", "collective_costs"]

Collective = Literal[
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "point_to_point"
]


class Transport(NamedTuple):
    """How a communication library drives one kind of link: what its rate and the hop of a small message leave open.

    Fractions are of the level's ``bytes_per_s``. *Small* is the protocol of small messages, *bulk* that of large ones.

    Attributes:
        launch_s: of every call of a collective.
        small_fraction: bandwidth of the small protocol.
        bulk_hop_s: one hop of the bulk protocol, which overlaps with the transfer.
        own_share: time of a rank's own part (its copy, and filling the pipeline), in parts that it passes on.
        exchange_s: of a small all-to-all or send.
        peer_s: of every peer that an all-to-all addresses.
        peer_bytes_per_s: to one peer, small protocol.
        bulk_exchange_s: of a large all-to-all or send.
        exchange_fraction: bandwidth of a large all-to-all.
        exchange_own_share: time of a rank's own part in it, in parts that it sends.
        multicast_s: of an all-reduce that the switch adds up (NVLS).
        multicast_fraction: its bandwidth; 0: the switch adds nothing up.
        direct_hop_s: one round of a kernel that reads its peers' memory itself (the custom all-reduce of serving frameworks).
        direct_fraction: its bandwidth; 0: there is no such kernel for the link.
        scale_out: whether the link joins nodes: trees branch there, and are chains inside a node.
    """

    launch_s: Real = 0.0
    small_fraction: Real = 1.0
    bulk_hop_s: Real = 0.0
    own_share: Real = 0.0
    exchange_s: Real = 0.0
    peer_s: Real = 0.0
    peer_bytes_per_s: Real = np.inf
    bulk_exchange_s: Real = 0.0
    exchange_fraction: Real = 1.0
    exchange_own_share: Real = 0.0
    multicast_s: Real = 0.0
    multicast_fraction: Real = 0.0
    direct_hop_s: Real = 0.0
    direct_fraction: Real = 0.0
    scale_out: bool = False


class Level(NamedTuple):
    """What one tier of the network offers a group.

    ``members`` counts the group's ranks inside one domain of the tier: cumulative, non-decreasing from tier to tier, on the last
    tier the size of the group. ``bytes_per_s`` is what a large collective reaches, ``latency_s`` that of one hop of a small
    message. All three broadcast. ``transport`` says how a library drives the link; None: there is nothing but rate and latency.
    """

    members: Real
    bytes_per_s: Real
    latency_s: Real
    transport: Transport | None = None


class MessageCost(NamedTuple):
    """What an algorithm costs on a network: ``latency_s + √(hidden_s² + (n_bytes · s_per_byte)²)``.

    ``latency_s`` is paid besides the bytes; ``hidden_s`` overlaps with them, all but completely where one of the two is much the
    larger. None: nothing does.
    """

    s_per_byte: Real
    latency_s: Real
    hidden_s: Real | None = None


def collective_costs(
    collective: Collective, levels: Sequence[Level], algorithm: str = "auto"
) -> tuple[MessageCost, ...]:
    """The algorithms and protocols that compete for a collective, for :func:`fastest_s`.

    They depend on the network alone: compute them once per group and price any number of messages. ``auto`` is what a
    communication library has where the levels say how one drives them, and every textbook algorithm where they do not.

    Raises:
        ValueError: the collective has no such algorithm.

    >>> (ring,) = collective_costs("all_gather", [Level(4, 100.0, 0.5)], "ring")
    >>> float(ring.s_per_byte) * 100, float(ring.latency_s)  # 3/4, 3 hops
    (0.75, 1.5)
    """
    offered = _ALGORITHMS[collective]
    path = _path(levels)
    names = (algorithm,) if algorithm != "auto" else (_LIBRARY if path.library else _COMPETING)[collective]
    if not set(names) <= offered.keys():
        known = ", ".join(("auto", *offered))
        raise ValueError(f"{algorithm!r} is no algorithm of {collective}; there are: {known}")
    return tuple(cost for name in names for cost in offered[name](path))


class _Crossing(NamedTuple):
    """One tier as the group meets it: members in a domain of the tier below, and of this tier."""

    below: Real
    members: Real
    bytes_per_s: Real
    latency_s: Real
    transport: Transport

    @property
    def crossed(self) -> Real:
        """1 where the group uses the tier at all, else 0."""
        return np.greater(self.members, self.below) * 1.0


class _Path(NamedTuple):
    """A group's way through the network: its crossings, and whether a library drives any of them."""

    crossings: tuple[_Crossing, ...]
    library: bool

    @property
    def group(self) -> Real:
        """Ranks of the group."""
        return self.crossings[-1].members


def _path(levels: Sequence[Level]) -> _Path:
    """The levels as an algorithm walks them; a level without a transport has one protocol with its latency per hop."""
    crossings = []
    below: Real = 1.0
    for level in levels:
        alpha_s = level.latency_s
        transport = level.transport or Transport(
            bulk_hop_s=alpha_s,
            exchange_s=alpha_s,
            bulk_exchange_s=alpha_s,
            direct_hop_s=alpha_s,
            direct_fraction=1.0,
        )
        members = np.multiply(level.members, 1.0)
        crossings.append(_Crossing(below, members, level.bytes_per_s, alpha_s, transport))
        below = members
    return _Path(tuple(crossings), any(level.transport is not None for level in levels))


class _Link(NamedTuple):
    """A crossing under one protocol."""

    below: Real
    members: Real
    bytes_per_s: Real
    hop_s: Real
    branches: bool


Algorithm = Callable[[_Path], tuple[MessageCost, ...]]
_Hops = Callable[[Sequence[_Link]], Real]


def _launch_s(path: _Path) -> Real:
    """A call costs what the slowest link that it uses asks for."""
    launch_s: Real = 0.0
    for crossing in path.crossings:
        launch_s = np.maximum(launch_s, crossing.crossed * crossing.transport.launch_s)
    return launch_s


def _over_protocols(
    path: _Path, passes: float, hops: _Hops, s_per_byte: Callable[[Sequence[_Link]], Real]
) -> tuple[MessageCost, ...]:
    """An algorithm by the small protocol, and, where a library drives the links, by the bulk protocol as well."""
    small = [
        _Link(
            c.below,
            c.members,
            c.bytes_per_s * c.transport.small_fraction,
            c.latency_s,
            c.transport.scale_out or not path.library,
        )
        for c in path.crossings
    ]
    launch_s = _launch_s(path)
    cost = MessageCost(s_per_byte(small), launch_s + passes * hops(small))
    if not path.library:
        return (cost,)
    bulk = [
        link._replace(bytes_per_s=c.bytes_per_s, hop_s=c.transport.bulk_hop_s)
        for link, c in zip(small, path.crossings, strict=True)
    ]
    return (cost, MessageCost(s_per_byte(bulk), launch_s, passes * hops(bulk)))


def _bottleneck_s_per_byte(links: Sequence[_Link]) -> Real:
    """Seconds per byte of a ring or tree that visits domains one after the other.

    A domain with ``k`` members is left through ``k`` interfaces, on which ``k`` rotated rings share the bytes: tier ``j`` runs at
    ``bytes_per_s · m[j−1]``, and all tiers work at once, so the slowest of the crossed ones decides.
    """
    slowest: Real = 0.0
    for link in links:
        slowest = np.maximum(slowest, (link.members > link.below) / (link.below * link.bytes_per_s))
    return slowest


def _chain_s(links: Sequence[_Link]) -> Real:
    """Latency of a chain through all members: ``G − 1`` hops, ``G/m[j−1] − G/m[j]`` of them on tier ``j``."""
    group = links[-1].members
    latency_s: Real = 0.0
    for link in links:
        latency_s = latency_s + (group / link.below - group / link.members) * link.hop_s
    return latency_s


def _tree_s(links: Sequence[_Link]) -> Real:
    """Latency from a tree's leaves to its root: ``⌈log2⌉`` hops on a tier where it branches, a chain where it does not."""
    latency_s: Real = 0.0
    for link in links:
        share = link.members / link.below
        latency_s = latency_s + (np.ceil(np.log2(share)) if link.branches else share - 1.0) * link.hop_s
    return latency_s


def _rings_s(links: Sequence[_Link]) -> Real:
    """Latency of a ring per tier, one tier after the other."""
    latency_s: Real = 0.0
    for link in links:
        latency_s = latency_s + (link.members / link.below - 1.0) * link.hop_s
    return latency_s


def _ring(passes: float) -> Algorithm:
    """A closed chain: in each pass a rank sends all parts but one."""

    def ring(path: _Path) -> tuple[MessageCost, ...]:
        parts = passes * (1.0 - 1.0 / path.group) + path.crossings[0].transport.own_share / path.group
        return _over_protocols(path, passes, _chain_s, lambda links: _bottleneck_s_per_byte(links) * parts)

    return ring


def _whole(passes: float, hops: _Hops) -> Algorithm:
    """All bytes over every hop: a pipelined chain, or two binary trees that carry half of the bytes each."""

    def whole(path: _Path) -> tuple[MessageCost, ...]:
        return _over_protocols(path, passes, hops, lambda links: _bottleneck_s_per_byte(links) * passes)

    return whole


def _broadcast(path: _Path) -> tuple[MessageCost, ...]:
    """A ring from its root on: a rank sends on what it has, chunk by chunk, and the last waits until the chain is filled.

    Nothing of the filling overlaps with the transfer, of which the last rank has seen nothing by then. Chunks are of one length
    all the way: where a ring leaves its node, every hop takes as long as one over the network (NVIDIA/nccl @v2.18.5,
    src/graph/tuning.cc: a broadcast takes ``nRanks`` steps at the network's latency, by Simple 14 µs with "some chunk latency";
    28 µs @v2.14.3 and @v2.21.5). By the small protocol a rank sends on inside its node what it is still receiving; a network
    interface is handed whole steps, and there every hop moves a message again. NCCL has no tree for it.
    """
    if not path.library:
        return _whole(1.0, _chain_s)(path)
    small_hop_s: Real = 0.0
    bulk_hop_s: Real = 0.0
    again: Real = 0.0
    for crossing in path.crossings:
        link, crossed = crossing.transport, crossing.members > crossing.below
        small_hop_s = np.where(crossed, crossing.latency_s, small_hop_s)[()]
        bulk_hop_s = np.where(crossed, link.bulk_hop_s, bulk_hop_s)[()]
        if link.scale_out:
            hops = np.maximum(path.group / crossing.below - path.group / crossing.members - 1.0, 0.0)
            again = again + hops / (crossing.below * crossing.bytes_per_s * link.small_fraction)
    small, bulk = _over_protocols(path, 1.0, lambda _: path.group - 1.0, _bottleneck_s_per_byte)
    return (
        MessageCost(small.s_per_byte + again, _launch_s(path) + (path.group - 1.0) * small_hop_s),
        MessageCost(bulk.s_per_byte, _launch_s(path) + (path.group - 1.0) * bulk_hop_s),
    )


def _hierarchical(passes: float) -> Algorithm:
    """A ring per tier, one tier after the other, each on the share of the inner tiers, ``n/m[j−1]``."""

    def s_per_byte(links: Sequence[_Link]) -> Real:
        total: Real = 0.0
        for link in links:
            total = total + (1.0 / link.below - 1.0 / link.members) / link.bytes_per_s
        return total * passes

    return lambda path: _over_protocols(path, passes, _rings_s, s_per_byte)


def _direct(passes: float, whole: bool = False) -> Algorithm:
    """One message to every peer, all at once, in every pass; ``whole``: of all bytes instead of the peer's part."""

    def direct(path: _Path) -> tuple[MessageCost, ...]:
        group = path.group
        s_per_byte: Real = 0.0
        latency_s: Real = 0.0
        for below, members, bytes_per_s, _, transport in path.crossings:
            if transport.direct_fraction == 0.0:
                latency_s = np.where(members > below, np.inf, latency_s)[()]
                continue
            crossed = members > below
            leaves = group - below if whole else 1.0 - below / group
            s_per_byte = np.maximum(s_per_byte, crossed * leaves / (bytes_per_s * transport.direct_fraction))
            latency_s = latency_s + crossed * transport.direct_hop_s
        return (MessageCost(passes * s_per_byte, passes * latency_s),)

    return direct


def _multicast(path: _Path) -> tuple[MessageCost, ...]:
    """An all-reduce that the switch of the innermost tier adds up, and trees between such domains (NVLS, NVLS tree).

    A rank sends its bytes to the switch and receives the sum of its part, which it sends to all: ``n·(1 + 1/m)`` over its link.
    NCCL uses it where more than two ranks share the switch.
    """
    inner, *outer = path.crossings
    transport = inner.transport
    if transport.multicast_fraction == 0.0:
        return ()
    s_per_byte: Real = (1.0 + 1.0 / inner.members) / (inner.bytes_per_s * transport.multicast_fraction)
    latency_s = np.where(inner.members > 2, transport.multicast_s, np.inf)[()]
    for crossing in outer:
        share = crossing.members / crossing.below
        between = crossing.crossed * 2.0 / (crossing.below * crossing.bytes_per_s)
        s_per_byte = np.maximum(s_per_byte, between)
        latency_s = latency_s + 2.0 * np.ceil(np.log2(share)) * crossing.transport.bulk_hop_s
    return (MessageCost(s_per_byte, _launch_s(path) + latency_s),)


def _all_to_all(path: _Path) -> tuple[MessageCost, ...]:
    """Grouped sends: a small protocol bound by the rate to one peer, a bulk one by the links."""
    if not path.library:
        return _direct(1.0)(path)
    group = path.group
    peers_s: Real = 0.0
    small, bulk = MessageCost(0.0, 0.0), MessageCost(0.0, 0.0)
    own = path.crossings[0].transport.exchange_own_share
    for below, members, bytes_per_s, _, link in path.crossings:
        crossed = members > below
        peers_s = peers_s + (members - below) * link.peer_s
        leaves = (1.0 - below / group + own / group) / (bytes_per_s * link.exchange_fraction)
        to_peer = np.maximum(1.0 / (group * link.peer_bytes_per_s), (1.0 - below / group) / bytes_per_s)
        small = _slower(small, crossed * to_peer, crossed * link.exchange_s)
        bulk = _slower(bulk, crossed * leaves, crossed * link.bulk_exchange_s)
    return tuple(cost._replace(latency_s=cost.latency_s + peers_s) for cost in (small, bulk))


def _send(path: _Path) -> tuple[MessageCost, ...]:
    """One message between neighbours of the group: over the innermost tier that holds all of it.

    A boundary inside a tier's domain is at least as common as one across it: the slowest one paces the ring of neighbours.
    """
    group = path.group
    small, bulk = MessageCost(0.0, 0.0), MessageCost(0.0, 0.0)
    for crossing in reversed(path.crossings):
        link, holds = crossing.transport, crossing.members >= group
        wire = 1.0 / crossing.bytes_per_s
        to_peer = np.maximum(wire, 1.0 / link.peer_bytes_per_s)
        small = MessageCost(np.where(holds, to_peer, small[0]), np.where(holds, link.exchange_s, small[1]))
        bulk = MessageCost(np.where(holds, wire, bulk[0]), np.where(holds, link.bulk_exchange_s, bulk[1]))
    sends = np.greater(group, 1)
    costs = (small, bulk) if path.library else (small,)
    return tuple(MessageCost((cost.s_per_byte * sends)[()], (cost.latency_s * sends)[()]) for cost in costs)


def _slower(cost: MessageCost, s_per_byte: Real, latency_s: Real) -> MessageCost:
    return MessageCost(np.maximum(cost.s_per_byte, s_per_byte), np.maximum(cost.latency_s, latency_s))


_GATHER = {"ring": _ring(1.0), "hierarchical": _hierarchical(1.0), "direct": _direct(1.0)}
_ALGORITHMS: dict[str, dict[str, Algorithm]] = {
    "all_reduce": {
        "ring": _ring(2.0),
        "tree": _whole(2.0, _tree_s),
        "hierarchical": _hierarchical(2.0),
        "direct": _direct(2.0),
        "one_shot": _direct(1.0, whole=True),
        "multicast": _multicast,
    },
    "all_gather": _GATHER,
    "reduce_scatter": _GATHER,
    "all_to_all": {"direct": _all_to_all},
    "broadcast": {"ring": _broadcast, "tree": _whole(1.0, _tree_s)},
    "point_to_point": {"direct": _send},
}
_COMPETING: dict[str, tuple[str, ...]] = {
    "all_reduce": ("ring", "tree", "hierarchical"),
    "all_gather": ("ring", "hierarchical"),
    "reduce_scatter": ("ring", "hierarchical"),
    "all_to_all": ("direct",),
    "broadcast": ("ring", "tree"),
    "point_to_point": ("direct",),
}
# What NCCL and its kin have: one ring through all ranks, or trees between nodes.
_LIBRARY: dict[str, tuple[str, ...]] = _COMPETING | {
    "all_reduce": ("ring", "tree", "multicast"),
    "all_gather": ("ring",),
    "reduce_scatter": ("ring",),
    "broadcast": ("ring",),
}
