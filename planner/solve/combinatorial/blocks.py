"""Blocks of a model to devices of a pipeline, neighbours or not: the busiest device has the least work (FTPipe).

A block is half a layer, attention or network, the embedding or the head. A device that holds blocks from several places of the
model is several stages of the pipeline; a full pipeline runs at the pace of its busiest device, however its blocks lie. Blocks
that are alike are one bucket of the program that deals sequences to groups: every device is a group of one, with its memory for
a budget.

Source: S. Eliad et al. 2021 (FTPipe, USENIX ATC 2021), Mixed-pipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from planner.errors import Infeasible, Problem
from planner.solve.combinatorial.certificate import Certificate
from planner.solve.combinatorial.sequences import SequenceProblem, assign_sequences
from planner.units import format_bytes

__all__ = ["Block", "Dealing", "contiguous", "deal_blocks"]


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the model: seconds of a micro-batch, forward and backward, and bytes while the pipeline is full."""

    name: str
    time_s: float
    held_bytes: float


@dataclass(frozen=True, slots=True)
class Dealing:
    """The device of every block, seconds of the busiest one per micro-batch, and what is proved of them.

    ``cuts``: pairs of neighbouring blocks on different devices, between which a message goes.
    """

    device: tuple[int, ...]
    time_s: float
    cuts: int
    certificate: Certificate | None


def deal_blocks(
    blocks: Sequence[Block], devices: int, budget_bytes: float = np.inf, *, backend: str = "scipy",
    time_limit_s: float | None = None,
) -> Dealing:  # fmt: skip
    """Every block to a device, so that the busiest one is least busy; among blocks that are alike, neighbours stay together.

    Raises:
        Infeasible: the blocks do not fit.
        SolverError: nothing is found in time.
    """
    kinds = list(dict.fromkeys((block.time_s, block.held_bytes) for block in blocks))
    of = [kinds.index((block.time_s, block.held_bytes)) for block in blocks]
    table = np.array(kinds)
    problem = SequenceProblem(
        tuple(range(len(kinds))), tuple(of.count(kind) for kind in range(len(kinds))), (1,), table[:, :1], table[:, 1:],
        devices, budget_bytes, packed=True,
    )  # fmt: skip
    try:
        found = assign_sequences(problem, backend=backend, time_limit_s=time_limit_s)
    except Infeasible:
        largest = max(blocks, key=lambda block: block.held_bytes)
        whole = sum(block.held_bytes for block in blocks)
        found_bytes = (
            f"{format_bytes(whole)} in all, {format_bytes(largest.held_bytes)} of {largest.name} alone"
        )
        raise Infeasible(
            Problem("memory", found_bytes, f"blocks that fit into {devices} × {format_bytes(budget_bytes)}")
        ) from None
    left = found.counts.copy()
    device: list[int] = []
    for kind in of:
        stays = bool(device) and left[device[-1], kind] > 0
        device.append(device[-1] if stays else int(np.flatnonzero(left[:, kind])[0]))
        left[device[-1], kind] -= 1
    return Dealing(tuple(device), found.time_s, _cuts(device), found.certificate)


def contiguous(blocks: Sequence[Block], devices: int, budget_bytes: float = np.inf) -> Dealing:
    """The best cut of the blocks into runs, one per device: the least busy busiest one.

    Raises:
        Infeasible: no cut fits.
    """
    n = len(blocks)
    seconds, held = (
        np.cumsum([0.0, *values]) for values in zip(*((b.time_s, b.held_bytes) for b in blocks), strict=True)
    )
    price = np.where(
        held[None, :] - held[:, None] <= budget_bytes, seconds[None, :] - seconds[:, None], np.inf
    )
    best = np.full((devices + 1, n + 1), np.inf)
    best[0, 0] = 0.0
    origin = np.zeros((devices + 1, n + 1), dtype=int)
    for k in range(1, devices + 1):
        for end in range(n + 1):
            longest = np.maximum(best[k - 1, : end + 1], price[: end + 1, end])
            origin[k, end] = int(np.argmin(longest))
            best[k, end] = longest[origin[k, end]]
    if not np.isfinite(best[devices, n]):
        raise Infeasible(
            Problem("memory", f"no cut into {devices} runs fits", "more devices, or smaller micro-batches")
        )
    device = np.zeros(n, dtype=int)
    end = n
    for k in range(devices, 0, -1):
        device[origin[k, end] : end] = k - 1
        end = origin[k, end]
    return Dealing(tuple(device.tolist()), float(best[devices, n]), _cuts(device.tolist()), None)


def _cuts(device: Sequence[int]) -> int:
    return sum(one != other for one, other in pairwise(device))
