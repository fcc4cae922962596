"""Offloading by a linear program: weights, cache and activations over device, host and disk, a block of batches at a time.

What it does: a block's batches go through the layers together, so that a layer's weights are brought once for all of them; a
    linear program says which part of what lies where.
Saves: devices: a model larger than the device's memory is served, at the throughput of the slowest stream.
Costs: latency: a block's answers take minutes to hours.
Assumes: streams overlap but for the way in; a place is filled to four fifths; attention to what lies beyond the device is the
    host's.
Not reproduced: of its table, the runs with weights and caches in 4 bits, whose compression takes host and device time that is not
    published; OPT-175B from disk needs the paper's disk, not the slower one that its repository's constants are of.
Source: Sheng et al. 2023 (FlexGen, ICML, arXiv:2303.06865); FMInference/FlexLLMGen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from planner.technique import Figure, Knob, Technique
from planner.techniques.solvers import solver

GIB = 2.0**30


def _opt_30b(subject: Callable[..., Any]) -> float:
    """Tokens per second of OPT-30B on one T4 in blocks of 3 batches of 48: prompts of 512, answers of 32 tokens."""
    from planner.costs.block_schedule import BlockLinks, BlockWork
    from planner.solve.combinatorial.block_placement import Room

    # FMInference/FlexLLMGen, experimental/cost_model.py: fitted on a Google Cloud T4 with 208 GB of memory and an SSD of 1.5 TB.
    links = BlockLinks(
        12.89 * GIB, 0.97 * GIB, 4.82 * GIB, 0.473 * GIB, 0.746 * GIB, 2.015 * GIB, 2.015 * GIB
    )
    prompts, steps, scores, seen, host = (
        21.24e12,
        4.3e12,
        9.97e12,
        0.079e12,
        0.0123e12,
    )  # FLOP/s of FlexGen's products
    h, s, n, b = 7168.0, 512.0, 32.0, 144.0
    linear, core = 24.0 * h * h, 4.0 * h
    work = BlockWork(
        24.0 * h * h, 4.0 * h, 2.0 * h, b, s, n, b * (s * linear / prompts + core * s * s / scores), b * linear / steps,
        b * core * (s + n / 2.0) / seen, b * core * (s + n / 2.0) / host,
    )  # fmt: skip
    return float(subject(work, links, Room(15.0 * GIB, 204.0 * GIB, 1500.0 * GIB), 48.0, 48, 3).tokens_per_s)


TECHNIQUE = Technique(
    key="flexgen",
    name="FlexGen: LP offload policy, zig-zag block schedule",
    slot=None,
    job="serving",
    kind="solver",
    source="ICML 2023",
    summary="Weights, cache and activations on device, host and disk, by a linear program",
    knobs=(
        Knob("mode", "one pool, one per phase, or offloaded", ("aggregated", "disaggregated", "offloaded")),
        Knob("gpu_batch_size", "sequences of a batch"),
        Knob("gpu_batches", "batches of a block"),
    ),
    figures=(
        Figure(
            "tokens per second of OPT-30B on one T4, 512 in, 32 out, batches of 48, 3 to a block",
            7.32,
            0.05,
            "Sheng et al. 2023 (arXiv:2303.06865), Table 2; FMInference/FlexLLMGen README",
            _opt_30b,
        ),
    ),
    solve=solver("block_placement.best_placement"),
    naive=solver("block_placement.on_disk"),
)
