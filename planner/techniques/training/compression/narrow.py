"""What the quantised collectives share: data-parallel traffic in fewer bits, and the casts around it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.costs.precision import cast_bytes, dtype_bytes
from planner.ledger import Collective, Item, Ledger, Stream
from planner.technique import Context

__all__ = ["narrow", "replicated"]


def narrow(ledger: Ledger, pool: str, dtype: str, by: str) -> Ledger:
    """Sends what the data-parallel collectives of a pool carry in ``dtype``.

    The side that handles a whole tensor casts it (an all-reduce on both halves); the side that handles a shard is neglected.
    """
    casts: list[Item] = []

    def shrink(item: Collective) -> Item | None:
        if not {"data_parallel", pool} <= item.tags:
            return None
        halves = 2.0 if item.kind == "all_reduce" else 1.0
        moved = halves * float(cast_bytes(1.0, dtype_bytes(item.dtype), dtype_bytes(dtype)))
        casts.append(
            Stream(
                what=f"{item.what}.cast", block=item.block, phase=item.phase, tags=frozenset({"compression"}), by=by,
                size=item.size, bytes_per_element=moved,
            )
        )  # fmt: skip
        return item.but(dtype=dtype, by=by)

    return ledger.edit(Collective, shrink).add(casts)


def replicated(ctx: Context) -> NDArray[np.bool_]:
    """Rows with traffic between replicas."""
    return np.asarray(ctx.mesh.dp * ctx.mesh.cp > 1)
