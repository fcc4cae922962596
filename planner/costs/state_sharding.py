"""Traffic of sharded model states: ZeRO stages, hybrid sharding, quantised collectives.

Volumes are elements sent per rank and step, in units of the argument (parameters, or bytes if bytes are
passed).

Sources: S. Rajbhandari et al., "ZeRO", arXiv:1910.02054, section 7; Y. Zhao et al., "PyTorch FSDP",
arXiv:2304.11277, section 3.2.2; G. Wang et al., "ZeRO++", arXiv:2306.10209, and the volume table of its
DeepSpeed announcement.
"""

from __future__ import annotations

from typing import Literal

from planner.costs.arrays import Real

__all__ = ["cross_host_traffic", "hybrid_shard_traffic", "zero_plus_plus_traffic", "zero_traffic"]


def zero_traffic(
    parameters: Real, shards: Real, stage: Literal[0, 1, 2, 3], micro_batches: Real = 1.0
) -> Real:
    """Elements a rank sends per step: 2Ψ(d−1)/d up to stage 2, 3Ψ(d−1)/d in stage 3, with one micro-batch.

    Stages 0 and 1 communicate once per step: an all-reduce, or a reduce-scatter and an all-gather. Stage 2
    scatters gradients in every micro-batch, ``(m + 1)Ψ``; stage 3 gathers parameters twice as well, ``3mΨ``.

    >>> zero_traffic(1.0, 64, 3) / zero_traffic(1.0, 64, 0)  # 1.5 times data parallelism
    1.5
    """
    passes = {0: 2.0, 1: 2.0, 2: 1.0 + micro_batches, 3: 3.0 * micro_batches}[stage]
    return passes * parameters * (shards - 1) / shards


def hybrid_shard_traffic(parameters: Real, shards: Real, replicas: Real) -> tuple[Real, Real]:
    """Elements a rank sends per step when ``replicas`` groups shard over ``shards`` ranks: (inside, between).

    Inside a group two all-gathers and a reduce-scatter, ``3Ψ(F−1)/F``; between replicas an all-reduce of a
    shard, ``2(Ψ/F)(R−1)/R``.

    >>> hybrid_shard_traffic(1.0, 8, 64)  # 3 * 7/8, 2/8 * 63/64
    (2.625, 0.24609375)
    """
    inside = 3.0 * parameters * (shards - 1) / shards
    between = 2.0 * parameters / shards * (replicas - 1) / replicas
    return inside, between


def cross_host_traffic(
    parameters: Real, ranks: Real, ranks_per_host: Real, strategy: Literal["replicate", "full", "hybrid"]
) -> Real:
    """Elements a rank sends across hosts per step, as the FSDP paper counts them.

    Replicated ``2M(W−1)/W``, fully sharded ``3M(W−1)/W``, sharded inside a host and replicated across
    ``2M(W−1)/(GW)``. The last neglects that a replica group has W/G and not W members;
    :func:`hybrid_shard_traffic` does not.

    >>> [round(cross_host_traffic(1.0, 512, 8, s), 6) for s in ("replicate", "full", "hybrid")]
    [1.996094, 2.994141, 0.249512]
    """
    passes = {"replicate": 2.0, "full": 3.0, "hybrid": 2.0 / ranks_per_host}[strategy]
    return passes * parameters * (ranks - 1) / ranks


def zero_plus_plus_traffic(
    parameters: Real,
    *,
    quantised_weights: bool = True,
    secondary_shards: bool = True,
    quantised_gradients: bool = True,
) -> Real:
    """Elements across nodes per step of quantised stage 3, in 16-bit equivalents: 3Ψ to 0.75Ψ.

    INT8 weights halve the forward gather, a secondary copy inside the node removes the backward gather, INT4
    gradients quarter the reduce-scatter. Block scales and ``(d−1)/d`` neglected, as in the paper.

    >>> zero_plus_plus_traffic(1.0)
    0.75
    >>> zero_plus_plus_traffic(1.0, quantised_weights=False, secondary_shards=False)  # 1 + 1 + 1/4
    2.25
    """
    weight = 0.5 if quantised_weights else 1.0
    gradient = 0.25 if quantised_gradients else 1.0
    return parameters * (weight + (0.0 if secondary_shards else weight) + gradient)
