"""Bytes that a training rank holds: activations of a layer, logits, and model states under each sharding.

Sources: V. Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models",
arXiv:2205.05198, Table 2 (coefficients include the 16-bit element size: do not multiply by a dtype again); S.
Rajbhandari et al., "ZeRO", arXiv:1910.02054, Figure 1; Y. Zhao et al., "PyTorch FSDP", arXiv:2304.11277,
section 3.2; T. Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from planner.costs.arrays import Real

__all__ = [
    "activation_bytes",
    "checkpoint_bytes",
    "checkpoint_segments",
    "end_activation_bytes",
    "flash_activation_bytes",
    "fsdp_parameter_peak_bytes",
    "interleaved_memory_factor",
    "logits_bytes",
    "megatron_state_bytes",
    "zero_state_bytes",
]


def activation_bytes(
    seq: Real,
    batch: Real,
    hidden: Real,
    heads: Real,
    tp: Real = 1.0,
    *,
    sequence_parallel: bool = False,
    recompute: Literal["none", "selective", "full"] = "none",
) -> Real:
    """Bytes one layer keeps for its backward, per micro-batch of ``batch`` sequences (Table 2).

    Range: GPT block with dropout, 16-bit activations, GELU MLP of 4h, attention scores in memory.

    ==============================  ==============================
    none                            ``sbh(10 + 24/t + 5as/(ht))``
    none, sequence parallel         ``sbh/t (34 + 5as/h)``
    selective                       ``sbh(10 + 24/t)``
    selective, sequence parallel    ``34sbh/t``
    full                            ``2sbh``
    ==============================  ==============================

    >>> 48 * activation_bytes(2048, 4, 6144, 64, 8) / 2**30  # 22B model, Figure 1: 59.25 GiB
    59.25
    >>> 48 * activation_bytes(2048, 4, 6144, 64, 8, sequence_parallel=True, recompute="selective") / 2**30
    9.5625
    """
    sbh = 1.0 * seq * batch * hidden
    if recompute == "full":
        return 2.0 * sbh
    scores = 5.0 * heads * seq / hidden if recompute == "none" else 0.0
    if sequence_parallel:
        return sbh * ((34.0 + scores) / tp)
    return sbh * (10.0 + (24.0 + scores) / tp)


def end_activation_bytes(seq: Real, batch: Real, hidden: Real, vocab: Real, tp: Real, pp: Real) -> Real:
    """Bytes kept outside the layers, sequence parallel: ``sbh/t · (p + [p = 1]·4(1 + V/h))``.

    The dropout mask of the embedding for ``p`` micro-batches in flight on the first stage, and, where the
    first stage is also the last, the final norm, the head's input and FP32 logits (Korthikanti et al.,
    section 4.3).

    >>> float(end_activation_bytes(2048, 4, 6144, 51200, 8, 1)) / 2**20  # 6 MiB * (1 + 4 + 100/3)
    230.0
    """
    return 1.0 * seq * batch * hidden / tp * (pp + np.equal(pp, 1) * (4.0 + 4.0 * vocab / hidden))


def flash_activation_bytes(
    seq: Real,
    batch: Real,
    hidden: Real,
    ffn: Real,
    heads: Real,
    kv_hidden: Real,
    tp: Real = 1.0,
    cp: Real = 1.0,
    *,
    gated: bool = True,
    sequence_parallel: bool = True,
) -> Real:
    """Bytes one pre-norm layer with fused attention and no dropout keeps for its backward.

    ``sbh·(12 + 4·h_kv/h + 6·f/h)/(t·c) + 4abs/(t·c)``: two norm inputs, the inputs of the QKV and of the MLP
    projections (2h each), Q and attention output (2h each), K and V (4h_kv), gate, up and their product (6f;
    4f ungated), and the FP32 log-sum-exp. Without sequence parallelism the first four are whole on every
    rank.

    Derived by counting tensors; 16-bit activations. ``kv_hidden`` is KV heads times head dimension.

    >>> flash_activation_bytes(1, 1, 4096, 14336, 32, 1024) / 4096  # Llama 3 8B: 12 + 1 + 21 + 4*32/4096
    34.03125
    """
    tokens = 1.0 * seq * batch / cp
    whole = 8.0 * hidden
    split = 4.0 * hidden + 4.0 * kv_hidden + (6.0 if gated else 4.0) * ffn + 4.0 * heads
    return tokens * (((whole + split) / tp) if sequence_parallel else (whole + split / tp))


def logits_bytes(seq: Real, batch: Real, vocab: Real, tp: Real = 1.0, copies: Real = 1.0) -> Real:
    """Bytes of FP32 logits on the last stage: ``4sbV/t``.

    Two ``copies`` where their gradient has a buffer of its own.

    >>> logits_bytes(8192, 1, 128256, 8) / 1e9
    0.525336576
    """
    return 4.0 * copies * seq * batch * vocab / tp


def interleaved_memory_factor(pp: Real, vpp: Real) -> Real:
    """First-stage activations under interleaved 1F1B relative to 1F1B: ``1 + (p − 1)/(p·v)``, ``v > 1``.

    Korthikanti et al., section 4.2.3. Range: at least ``p`` micro-batches.

    >>> round(float(interleaved_memory_factor(8, 3)), 6)  # 175B model of the paper
    1.291667
    """
    return 1.0 + np.greater(vpp, 1) * ((pp - 1.0) / (1.0 * pp * vpp))


def checkpoint_segments(layers: Real, input_bytes: Real, internal_bytes: Real) -> Real:
    """Number of checkpoints that minimises :func:`checkpoint_bytes`: ``√(l·A_int/A_in)``.

    ``input_bytes`` is kept per segment, ``internal_bytes`` per layer of the segment at work. Chen et al.,
    section 4; Narayanan et al., arXiv:2104.04473, section 3.5.

    >>> float(checkpoint_segments(100, 2.0, 8.0))
    20.0
    """
    return np.sqrt(1.0 * layers * internal_bytes / input_bytes)


def checkpoint_bytes(layers: Real, input_bytes: Real, internal_bytes: Real, segments: Real) -> Real:
    """Peak bytes with ``c`` checkpoints over ``l`` layers: ``c·A_in + (l/c)·A_int``.

    >>> checkpoint_bytes(100, 2.0, 8.0, 20)  # at the optimum 2·√(l·A_in·A_int)
    80.0
    """
    return 1.0 * segments * input_bytes + 1.0 * layers * internal_bytes / segments


def zero_state_bytes(
    parameters: Real,
    shards: Real,
    stage: Literal[0, 1, 2, 3],
    weight_bytes: Real = 2.0,
    gradient_bytes: Real = 2.0,
    optimizer_bytes: Real = 12.0,
) -> Real:
    """Bytes of weights, gradients and optimizer states: stage 1 shards the last, 2 the last two, 3 all.

    ``(w + g + K/d)Ψ``, ``(w + (g + K)/d)Ψ``, ``(w + g + K)Ψ/d``. The defaults are the paper's mixed-precision
    Adam, 16 bytes a parameter.

    >>> [zero_state_bytes(7.5e9, 64, stage) / 1e9 for stage in (0, 1, 2, 3)]  # Figure 1
    [120.0, 31.40625, 16.640625, 1.875]
    """
    parts = (optimizer_bytes, gradient_bytes, weight_bytes)
    split = sum(parts[:stage], 0.0)
    return parameters * (sum(parts[stage:], 0.0) + split / shards)


def megatron_state_bytes(parameters: Real, shards: Real = 1.0) -> Real:
    """Bytes of model states in Megatron-LM, BF16 with FP32 main gradients: ``(6 + 12/d)Ψ``.

    18 bytes a parameter unsharded, with the distributed optimizer over ``d`` ranks 12 of them divided
    (Megatron-LM, ``theoretical_memory_usage.py``).

    >>> megatron_state_bytes(12 * 48 * 6144**2 / 8) / 2**30  # 22B on 8 ranks, arXiv:2205.05198, Figure 1
    45.5625
    """
    return parameters * (6.0 + 12.0 / shards)


def fsdp_parameter_peak_bytes(
    parameters: Real,
    largest_unit: Real,
    shards: Real,
    shard_bytes: Real = 4.0,
    gathered_bytes: Real = 2.0,
    live_units: Real = 1.0,
) -> Real:
    """Peak bytes of parameters under FSDP: ``K_full·Σψ/F + K_low·live·max ψ``.

    ``parameters`` counts all, ``largest_unit`` those of the largest unit that is gathered at once,
    ``live_units`` is 2 with prefetch (the rate limiter allows no more).

    >>> fsdp_parameter_peak_bytes(8e9, 0.25e9, 64, live_units=2) / 1e9
    1.5
    """
    return shard_bytes * parameters / shards + gathered_bytes * live_units * largest_unit
