"""Whole counts near those of a relaxation: layers change their strategy one by one until budgets are kept, then while it pays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.ledger import Array

__all__ = ["repaired"]


def repaired(
    counts: Sequence[Sequence[int]], cost: Sequence[Array], held: Sequence[Array], room: Array
) -> list[list[int]] | None:
    """Counts that keep every budget, and that no change of one layer makes cheaper; None where none are found.

    Args:
        counts: per group and strategy, which may exceed budgets.
        cost, held: per group, (strategies) seconds and (budgets, strategies) bytes of one layer.
        room: (budgets).

    >>> repaired([[3, 0]], [np.array([3.0, 4.0])], [np.array([[10.0, 4.0]])], np.array([25.0]))  # 30 bytes: one has to change
    [[2, 1]]
    """
    taken = [np.array(row, dtype=float) for row in counts]
    used = np.sum([h @ n for h, n in zip(held, taken, strict=True)], axis=0)
    scale = np.maximum(np.abs(room), 1e-300)
    for _ in range(2 * int(sum(n.sum() for n in taken)) + 2):
        over = np.maximum(used - room, 0.0)
        best: tuple[float, int, int, int] | None = None
        for g, (c, h, n) in enumerate(zip(cost, held, taken, strict=True)):
            there = np.flatnonzero(n)
            dearer = c[None, :] - c[there][:, None]  # (from, to)
            after = np.maximum(
                used[:, None, None] + h[:, None, :] - h[:, there][:, :, None] - room[:, None, None], 0.0
            )
            excess = (after / scale[:, None, None]).sum(axis=0)
            if over.any():
                less = (over / scale).sum() - excess
                worth = np.where(less > 0.0, dearer / np.where(less > 0.0, less, 1.0), np.inf)
            else:
                worth = np.where(excess == 0.0, dearer, np.inf)
            at = np.unravel_index(int(np.argmin(worth)), worth.shape)
            value = float(worth[at])
            if np.isfinite(value) and (best is None or value < best[0]):
                best = (value, g, int(there[at[0]]), int(at[1]))
        if best is None or (not over.any() and best[0] >= -1e-12 * float(np.abs(cost[best[1]]).max())):
            break
        _, g, a, b = best
        taken[g][a] -= 1.0
        taken[g][b] += 1.0
        used = used + held[g][:, b] - held[g][:, a]
    return [n.astype(int).tolist() for n in taken] if np.all(used <= room) else None
