"""What the recompute techniques share: which work runs again, and which tensors are then not kept."""

from __future__ import annotations

from collections.abc import Callable

from planner.ledger import Collective, Item, Ledger, Resident

__all__ = ["UNREAD", "recompute"]

UNREAD = "unread"
"""Tag of what follows the last tensor that a block saves: a recomputation that stops there leaves it out."""

_OUTSIDE = ("embedding", "head", "boundary")  # not part of any layer


def recompute(
    ledger: Ledger, inside: Callable[[Item], bool], keeps: Callable[[Resident], bool], by: str
) -> Ledger:
    """Copies the forward of what is ``inside`` to the backward; its saved tensors stay only where it is at work.

    Collectives of activations run again, those of weights do not: weights are whole for the backward anyway.

    Args:
        ledger: the ledger.
        inside: whether an item belongs to what is recomputed.
        keeps: saved tensors inside that are kept all the same (what the recomputation starts from, or ends in).
        by: key of the technique.
    """

    def again(item: Item) -> bool:
        weights = isinstance(item, Collective) and "data_parallel" in item.tags
        apart = item.block in _OUTSIDE or UNREAD in item.tags or weights
        return item.phase == "forward" and not apart and inside(item)

    def transient(item: Resident) -> Item | None:
        if "saved" not in item.tags or item.block in _OUTSIDE or not inside(item) or keeps(item):
            return None
        return item.but(lifetime="recomputed", by=by)

    return ledger.copy_to_phase(again, "recompute", by).edit(Resident, transient)
