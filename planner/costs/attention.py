"""Volumes and balance of attention whose sequence is split over ``c`` ranks (context parallelism).

All volumes are elements sent per rank, per layer and micro-batch; multiply by the dtype's bytes. ``hidden``
is query heads times head dimension, ``kv_hidden`` KV heads times head dimension.

Sources: H. Liu et al., "Ring Attention", arXiv:2310.01889; W. Brandon et al., "Striped Attention",
arXiv:2311.09431; S. Jacobs et al., "DeepSpeed Ulysses", arXiv:2309.14509; J. Fang, S. Zhao, "USP",
arXiv:2405.07719.
"""

from __future__ import annotations

import numpy as np

from planner.costs.arrays import Real

__all__ = [
    "all_gather_attention_elements",
    "contiguous_imbalance",
    "ring_attention_elements",
    "ring_attention_s",
    "ring_overlap_tokens",
    "ulysses_elements",
    "usp_elements",
]


def ring_attention_elements(
    batch: Real, seq: Real, kv_hidden: Real, cp: Real, *, backward: bool = False
) -> Real:
    """Elements of K and V that travel the ring: ``2bs·h_kv(c−1)/c``; with dK and dV backward, twice that.

    ``seq`` is the whole sequence; a rank sends its block of ``s/c`` tokens on in each of ``c − 1`` steps.

    >>> ring_attention_elements(1, 8192, 1024, 8)  # 7 steps of 2 * 1024 tokens * 1024
    14680064.0
    """
    return (4.0 if backward else 2.0) * batch * seq * kv_hidden * (cp - 1) / cp


def all_gather_attention_elements(
    batch: Real, seq: Real, kv_hidden: Real, cp: Real, *, backward: bool = False
) -> Real:
    """Elements sent when K and V are gathered before the kernel: as many as the ring's, but not behind it.

    Forward: an all-gather of K and V. Backward: the gather again and a reduce-scatter of dK and dV.

    >>> all_gather_attention_elements(1, 8192, 1024, 8)
    14680064.0
    """
    return ring_attention_elements(batch, seq, kv_hidden, cp, backward=backward)


def ulysses_elements(batch: Real, seq: Real, hidden: Real, kv_hidden: Real, cp: Real) -> Real:
    """Elements of the all-to-alls of Q, K, V and output: ``(2h + 2h_kv)·b·(s/c)·(c−1)/c``, backward as much.

    Where there are fewer KV heads than ranks they are replicated first: pass ``kv_hidden · max(1, c/a_kv)``.

    >>> ulysses_elements(1, 65536, 4096, 4096, 64) / (4 * 65536 * 4096 / 64)  # times 4Nh/P
    0.984375
    """
    return 2.0 * batch * seq * (1.0 * hidden + kv_hidden) * (cp - 1) / (1.0 * cp * cp)


def usp_elements(
    batch: Real,
    seq: Real,
    hidden: Real,
    kv_hidden: Real,
    ulysses: Real,
    ring: Real,
    *,
    backward: bool = False,
) -> Real:
    """Elements of the two-dimensional form: all-to-alls on ``s/ring`` tokens, then a ring on fewer heads.

    ``c = ulysses · ring``; with either degree 1 it is the other method.

    >>> usp_elements(1, 8192, 4096, 1024, 1, 8) == ring_attention_elements(1, 8192, 1024, 8)
    True
    """
    exchanged = ulysses_elements(batch, 1.0 * seq / ring, hidden, kv_hidden, ulysses)
    return exchanged + ring_attention_elements(batch, seq, 1.0 * kv_hidden / ulysses, ring, backward=backward)


def ring_overlap_tokens(
    flop_per_s: Real, bytes_per_s: Real, hidden: Real, kv_hidden: Real, bytes_per_element: Real = 2.0
) -> Real:
    """Tokens per rank from which a ring step hides behind attention: ``(F/W)·(h_kv/h)·(β/2)``, full mask.

    A step computes ``4b(s/c)²h`` FLOP and sends ``2b(s/c)h_kv`` elements of β bytes. A causal mask doubles
    the answer. ``flop_per_s`` is what the kernel reaches, ``bytes_per_s`` what the link carries one way.

    >>> ring_overlap_tokens(312e12, 12.5e9, 4096, 4096)  # A100 over InfiniBand at 100 Gbit/s
    24960.0
    """
    return 0.5 * bytes_per_element * flop_per_s / bytes_per_s * kv_hidden / hidden


def ring_attention_s(step_compute_s: Real, step_transfer_s: Real, cp: Real) -> Real:
    """Seconds of a ring of ``c`` steps, each transfer behind a step: ``(c−1)·max(comp, comm) + comp``.

    >>> float(ring_attention_s(2.0, 3.0, 4))
    11.0
    """
    return (cp - 1.0) * np.maximum(step_compute_s, step_transfer_s) + step_compute_s


def contiguous_imbalance(cp: Real) -> Real:
    """Work of the slowest rank relative to the mean, causal mask, contiguous blocks: ``(2c − 1)/c``.

    The last rank computes ``c − 1`` whole blocks and half of one, ``(2c − 1)/c²`` of the triangle. Zig-zag
    and striped layouts give every rank two mirrored chunks, or every c-th token, and the ratio is 1.

    >>> contiguous_imbalance(2), contiguous_imbalance(8)
    (1.5, 1.875)
    """
    return (2.0 * cp - 1.0) / cp
