"""Closed forms of training and serving cost, each with its equation, units, range, source and an example.

Every function is pure, needs numpy alone, and broadcasts: the same call prices one plan or a million. Numbers
in give a float out, arrays in give an array. Units are SI base units and end the names; FLOP count 2 per
multiply–add; collective bytes are bytes sent per rank; bandwidth is per direction.
"""

from __future__ import annotations

from planner.costs.collectives import (
    Level,
    all_gather_bytes,
    all_gather_s,
    all_reduce_bytes,
    all_reduce_s,
    all_to_all_bytes,
    all_to_all_s,
    broadcast_bytes,
    broadcast_s,
    group_members,
    point_to_point_s,
    reduce_scatter_bytes,
    reduce_scatter_s,
)
from planner.costs.compute import (
    FLASH_BACKWARD_PASSES,
    attention_bytes,
    attention_flop,
    attention_s,
    causal_fraction,
    matmul_bytes,
    matmul_efficiency,
    matmul_flop,
    matmul_s,
    memory_bound_s,
    memory_efficiency,
)
from planner.costs.overlap import (
    bucket_exposure_s,
    overlapped_s,
    pipelined_s,
    serial_finish_s,
    uniform_bucket_exposure_s,
)

__all__ = [
    "FLASH_BACKWARD_PASSES",
    "Level",
    "all_gather_bytes",
    "all_gather_s",
    "all_reduce_bytes",
    "all_reduce_s",
    "all_to_all_bytes",
    "all_to_all_s",
    "attention_bytes",
    "attention_flop",
    "attention_s",
    "broadcast_bytes",
    "broadcast_s",
    "bucket_exposure_s",
    "causal_fraction",
    "group_members",
    "matmul_bytes",
    "matmul_efficiency",
    "matmul_flop",
    "matmul_s",
    "memory_bound_s",
    "memory_efficiency",
    "overlapped_s",
    "pipelined_s",
    "point_to_point_s",
    "reduce_scatter_bytes",
    "reduce_scatter_s",
    "serial_finish_s",
    "uniform_bucket_exposure_s",
]
