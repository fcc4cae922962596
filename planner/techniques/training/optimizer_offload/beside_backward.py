"""What updates beside the backward share: as a block's last gradients arrive, the host updates the block, and its weights go up.

Reads, arithmetic and weights pass drives, host memory and host link side by side, block after block, in the shadow of what is
left of the backward; only the last block's update has nothing to hide behind.
"""

from __future__ import annotations

from planner.ledger import Item, Ledger, Transfer

__all__ = ["beside_backward"]

_LANES = {"host_link": "main", "host_memory": "host_memory", "nvme": "nvme"}


def beside_backward(ledger: Ledger, by: str) -> Ledger:
    """Takes an offloaded update out of the serial step: a window of the track that the backward hides."""

    def hidden(item: Transfer) -> Item | None:
        if item.phase != "step" or ("optimizer" not in item.tags and "gradients" not in item.tags):
            return None
        return item.but(window="gradients", track=_LANES[item.tier], by=by)

    return ledger.edit(Transfer, hidden)
