"""What the offload techniques share: a tensor that lives in a slower tier, and visits the device while its block is at work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, TypeAlias

from planner.ledger import Item, Ledger, Phase, Resident, Transfer, times
from planner.technique import Check, Context

__all__ = ["Tier", "Trip", "cxl", "host", "nvme", "swap"]

Tier: TypeAlias = Literal["host", "cxl", "nvme"]
_LINKS: dict[Tier, tuple[tuple[Literal["host_link", "cxl", "nvme"], str], ...]] = {
    "host": (("host_link", ""),),
    "cxl": (("host_link", ""), ("cxl", ".cxl")),
    "nvme": (("host_link", ""), ("nvme", ".drives")),
}
_STAGES = 2.0  # copies on the device: of the block at work, and of the one whose transfer runs beside it


class Trip(NamedTuple):
    """One way of a tensor over the links to its tier, on tracks of their own or (``main``) in the block's serial order."""

    what: str
    phase: Phase
    track: str = "host"


def host(ctx: Context) -> Iterable[Check]:
    """There must be a host to offload to."""
    yield Check("no host memory is described for this cluster", ctx.cluster.host_memory_bytes > 0, True)


def nvme(ctx: Context) -> Iterable[Check]:
    """There must be drives to offload to, and a host that they belong to."""
    yield from host(ctx)
    yield Check("no NVMe is described for this cluster", ctx.cluster.nvme_bytes > 0, True)


def cxl(ctx: Context) -> Iterable[Check]:
    """There must be CXL memory to offload to, and a host that it belongs to."""
    yield from host(ctx)
    yield Check("no CXL memory is described for this cluster", ctx.cluster.cxl_bytes > 0, True)


def swap(
    ledger: Ledger,
    trips: Callable[[Resident], Iterable[Trip]],
    by: str,
    share: str = "",
    tier: Tier = "host",
) -> Ledger:
    """Moves to a slower tier what makes any trips; adds the traffic, and the staging buffers while its block is at work.

    What lives on drives or in CXL memory passes these and the host link, side by side.

    Args:
        ledger: the ledger.
        trips: of a resident, per occurrence of their phase; none: it stays where it is.
        by: key of the technique.
        share: axis that says which part of every tensor moves, on the average over blocks; left out: all of it. What stays is
            the axis ``<share>_kept``.
        tier: where it lives.
    """
    added: list[Item] = []
    trip = Transfer(what="", block="", by=by, size="", bytes_per_element=0.0)  # a copy is made in less time

    def move(item: Resident) -> Item | None:
        ways = list(trips(item))
        if not ways:
            return None
        moved = times(item.size, share) if share else item.size
        added.extend(
            trip.but(
                what=f"{item.what}.{way.what}{suffix}", block=item.block, phase=way.phase, tags=item.tags | {"offload"},
                track=link if suffix and way.track == "host" else way.track, size=moved,
                bytes_per_element=item.bytes_per_element, tier=link,
            )
            for way in ways for link, suffix in _LINKS[tier]
        )  # fmt: skip
        added.append(
            item.but(what=f"{item.what}.staging", lifetime="block", pool="buffers", by=by,
                bytes_per_element=_STAGES * item.bytes_per_element,
            )
        )  # fmt: skip
        if share:
            added.append(item.but(size=times(item.size, f"{share}_kept")))
        return item.but(size=moved, tier=tier, by=by)

    return ledger.edit(Resident, move).add(added)
