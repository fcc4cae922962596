"""Galvatron's own formulation, kept as a reference for tests and benchmarks.

Per-layer dynamic programming over memory in whole units: ``f[v][s] = min over s' of f[v − mem(s)][s'] + switch(s', s) +
time(s)``, layer after layer, with a table of all choices for the way back (Miao et al., VLDB 2023, arXiv:2211.13878, section
4.2; the public implementation's ``dp_core.cpp``). O(layers · units · strategies²) time, O(layers · units · strategies) memory.
Memory is rounded up to units, a megabyte each in the implementation: what fits by less than the rounding is lost.
"""

from __future__ import annotations

import numpy as np

from planner.ledger import Array

__all__ = ["galvatron"]


def galvatron(
    seconds: Array,
    n_bytes: Array,
    switch: Array,
    layers: int,
    budget_bytes: float,
    unit_bytes: float = 2.0**20,
) -> tuple[float, list[int]] | None:
    """The least time of a chain of equal layers, and every layer's strategy; None where nothing fits in whole units.

    Vectorised over memory, where the implementation's compiled core loops.

    Args:
        seconds, n_bytes: of a layer under each strategy.
        switch: (strategies, strategies) seconds between neighbours.
        layers: how many.
        budget_bytes: for all layers together.
        unit_bytes: to which memory is rounded up.

    >>> cost, held = np.array([3.0, 4.0]), np.array([10.0, 4.0])
    >>> galvatron(cost, held, np.zeros((2, 2)), 5, 36.0, 1.0)  # as exact as its units
    (18.0, [1, 1, 1, 0, 0])
    """
    units = np.ceil(n_bytes / unit_bytes).astype(int)
    room = int(budget_bytes // unit_bytes)
    possible = [s for s in range(len(seconds)) if units[s] <= room]
    best = np.zeros((len(seconds), room + 1))  # before the first layer nothing is paid for a change
    choices = np.zeros((layers, len(seconds), room + 1), dtype=np.int8)
    total, smaller = np.empty(room + 1), np.empty(room + 1, dtype=bool)
    for layer in range(layers):
        following = np.full_like(best, np.inf)
        for s in possible:
            width = room + 1 - units[s]
            least = best[0, :width] + (switch[0, s] if layer else 0.0)
            taken = choices[layer, s, units[s] :]
            for before in range(1, len(seconds)):
                np.add(best[before, :width], switch[before, s] if layer else 0.0, out=total[:width])
                np.less(total[:width], least, out=smaller[:width])
                np.minimum(least, total[:width], out=least)
                np.putmask(taken, smaller[:width], before)
            following[s, units[s] :] = least + seconds[s]
        best = following
    s = int(best[:, room].argmin())
    if not np.isfinite(best[s, room]):
        return None
    found, left, chain = float(best[s, room]), room, [s]
    for layer in range(layers - 1, 0, -1):
        left, s = left - int(units[s]), int(choices[layer, s, left])
        chain.append(s)
    return found, chain[::-1]
