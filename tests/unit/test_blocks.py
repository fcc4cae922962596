"""Blocks of a pipeline that need not be neighbours, against enumeration and against the best runs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from planner import TrainWorkload, load_cluster, load_model, load_stack
from planner.errors import Infeasible
from planner.solve.block_costs import model_blocks
from planner.solve.combinatorial.blocks import Block, contiguous, deal_blocks


def brute(blocks: list[Block], devices: int, room: float, *, runs: bool) -> float:
    """The least busy busiest device over all dealings, or over those in which every device's blocks are neighbours."""
    best = np.inf
    for dealt in product(range(devices), repeat=len(blocks)):
        if runs and list(dealt) != sorted(dealt):
            continue
        busy, held = np.zeros(devices), np.zeros(devices)
        for block, device in zip(blocks, dealt, strict=True):
            busy[device] += block.time_s
            held[device] += block.held_bytes
        if (held <= room).all():
            best = min(best, busy.max())
    return best


@pytest.mark.parametrize("seed", range(6))
def test_dealings_are_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    blocks = [Block(str(i), float(s), float(b)) for i, (s, b) in enumerate(rng.integers(1, 6, (7, 2)))]
    room = float(sum(block.held_bytes for block in blocks)) / 3 + 3.0
    free, runs = (brute(blocks, 3, room, runs=r) for r in (False, True))
    dealt = deal_blocks(blocks, 3, room)
    assert dealt.time_s == pytest.approx(free)
    loads = [sum(b.time_s for b, d in zip(blocks, dealt.device, strict=True) if d == i) for i in range(3)]
    assert max(loads) == pytest.approx(free)
    if np.isfinite(runs):
        assert contiguous(blocks, 3, room).time_s == pytest.approx(runs)
    else:
        with pytest.raises(Infeasible):
            contiguous(blocks, 3, room)


def test_layers_that_differ_are_dealt_better_apart():
    # DeepSeekMoE's first layer is dense, and its head is as long as several layers (arXiv:2401.06066).
    cluster, stack = load_cluster("a100-sxm-80gb:1x8"), load_stack()
    blocks = model_blocks(load_model("deepseek-moe-16b"), cluster, stack, TrainWorkload(1, 4096))
    assert len(blocks) == 2 * 28 + 2
    dealt, runs = deal_blocks(blocks, 8, 80e9), contiguous(blocks, 8)
    assert dealt.time_s < 0.95 * runs.time_s
    assert dealt.time_s >= sum(block.time_s for block in blocks) / 8
    with pytest.raises(Infeasible, match="of head alone"):
        deal_blocks(blocks, 8, 1e9)
