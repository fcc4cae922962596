"""What the offload techniques share: a tensor that lives on the host, and visits the device while its block is at work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from planner.ledger import Item, Ledger, Phase, Resident, Transfer, times
from planner.technique import Check, Context

__all__ = ["Trip", "host", "swap"]

_STAGES = 2.0  # copies on the device: of the block at work, and of the one whose transfer runs beside it


@dataclass(frozen=True, slots=True)
class Trip:
    """One way of a tensor over the host link, on a track of its own or (``main``) in the block's serial order."""

    what: str
    phase: Phase
    track: str = "host"


def host(ctx: Context) -> Iterable[Check]:
    """There must be a host to offload to."""
    yield Check("no host memory is described for this cluster", ctx.cluster.host_memory_bytes > 0)


def swap(ledger: Ledger, trips: Callable[[Resident], Iterable[Trip]], by: str, share: str = "") -> Ledger:
    """Moves to the host what makes any trips; adds the traffic, and the staging buffers while its block is at work.

    Args:
        ledger: the ledger.
        trips: of a resident, per occurrence of their phase; none: it stays where it is.
        by: key of the technique.
        share: axis that says which part of every tensor moves, on the average over blocks; left out: all of it. What stays is
            the axis ``<share>_kept``.
    """
    added: list[Item] = []

    def move(item: Resident) -> Item | None:
        ways = list(trips(item))
        if not ways:
            return None
        moved = times(item.size, share) if share else item.size
        added.extend(
            Transfer(
                what=f"{item.what}.{way.what}", block=item.block, phase=way.phase, tags=item.tags | {"offload"}, by=by,
                track=way.track, size=moved, bytes_per_element=item.bytes_per_element,
            )
            for way in ways
        )  # fmt: skip
        staging = replace(item, what=f"{item.what}.staging", lifetime="block", pool="buffers", by=by)
        added.append(replace(staging, bytes_per_element=_STAGES * item.bytes_per_element))
        if share:
            added.append(replace(item, size=times(item.size, f"{share}_kept")))
        return replace(item, size=moved, tier="host", by=by)

    return ledger.edit(Resident, move).add(added)
