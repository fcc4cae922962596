"""Sizes, traffic and balance of mixture-of-experts layers.

Symbols: ``x`` experts, ``k`` of them per token, ``T`` tokens, ``e`` ranks that share the experts, ``β`` bytes
per element.

Sources: D. Lepikhin et al., "GShard", arXiv:2006.16668 (capacity, all-to-all); M. Raab, A. Steger, "Balls
into Bins", RANDOM 1998, Theorem 1 (maximum load of random routing); the rest is counting.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.costs.arrays import Real

__all__ = [
    "dispatch_bytes",
    "distinct_domains",
    "distinct_experts",
    "expert_capacity",
    "expert_flop",
    "expert_parameters",
    "expert_traffic_ratio",
    "neighbouring_domains",
    "random_load_factor",
    "router_flop",
    "skewed_load_factor",
    "zipf_shares",
]


def expert_parameters(experts: Real, hidden: Real, expert_ffn: Real, matrices: Real = 3.0) -> Real:
    """Parameters of all experts of a layer: ``x·n_mat·h·f_e``; three matrices gated, two ungated.

    >>> 58 * expert_parameters(256, 7168, 2048) / 1e9  # DeepSeek-V3, 58 MoE layers, of 671B
    653.908770816
    """
    return 1.0 * experts * matrices * hidden * expert_ffn


def expert_flop(tokens: Real, topk: Real, hidden: Real, expert_ffn: Real, matrices: Real = 3.0) -> Real:
    """Forward FLOP of the routed experts: ``2·n_mat·h·f_e·k·T``.

    >>> expert_flop(1, 8, 7168, 2048) / 1e6
    704.643072
    """
    return 2.0 * matrices * hidden * expert_ffn * topk * tokens


def router_flop(tokens: Real, hidden: Real, experts: Real) -> Real:
    """Forward FLOP of the gate: ``2·T·h·x``.

    >>> router_flop(1, 7168, 256)
    3670016.0
    """
    return 2.0 * tokens * hidden * experts


def dispatch_bytes(
    tokens: Real,
    topk: Real,
    hidden: Real,
    ep: Real,
    bytes_per_element: Real = 2.0,
    copies: Real | None = None,
) -> Real:
    """Bytes a rank sends to dispatch its ``tokens``, or to combine them: ``k·T·h·β·(e−1)/e``.

    One all-to-all; a layer has two forward (dispatch, combine) and two backward. ``copies`` replaces ``k``
    where a token is sent once per domain and not once per expert: :func:`distinct_domains`.

    >>> dispatch_bytes(4096, 8, 7168, 64, 1.0) / 1e6  # FP8 dispatch: 4096 * 8 * 7168 * 63/64
    231.211008
    """
    sent = topk if copies is None else copies
    return 1.0 * tokens * sent * hidden * bytes_per_element * (ep - 1) / ep


def expert_capacity(tokens: Real, topk: Real, experts: Real, capacity_factor: Real = 1.0) -> Real:
    """Tokens that an expert takes at most: ``⌈CF·k·T/x⌉``; the rest is dropped.

    >>> float(expert_capacity(4096, 2, 64, 1.25))
    160.0
    """
    return np.ceil(1.0 * capacity_factor * topk * tokens / experts)


def distinct_experts(tokens: Real, topk: Real, experts: Real) -> Real:
    """Expected experts that a batch touches: ``x·(1 − (1 − k/x)^T)``.

    Exact for tokens that each choose ``k`` different experts uniformly and independently; a skewed router
    touches fewer. It is what a decode step has to read.

    >>> distinct_experts(1, 8, 256), round(distinct_experts(32, 8, 256), 2)  # 256 * (1 - (31/32)**32)
    (8.0, 163.31)
    """
    return experts * (1.0 - (1.0 - 1.0 * topk / experts) ** tokens)


def distinct_domains(topk: Real, domains: Real) -> Real:
    """Expected nodes that a token's experts lie on: ``N·(1 − (1 − 1/N)^k)``.

    For experts spread evenly over ``N`` nodes. Choosing with replacement makes it a lower estimate, 1 % low
    at 8 of 256 experts over 8 nodes. Group-limited routing caps it: take the minimum with its limit.

    >>> round(distinct_domains(8, 8), 3)
    5.251
    """
    return domains * (1.0 - (1.0 - 1.0 / domains) ** topk)


def neighbouring_domains(topk: Real, experts: Real, domains: Real) -> Real:
    """Expected nodes that a token's experts lie on where they are neighbours: ``1 + (k − g)/m``, at most ``N``.

    Of ``m = x/N`` experts per node, for tokens whose first expert is any multiple of ``g = gcd(k, m)``: experts dealt out in
    turn, ``k`` to a token, as benchmarks without a router do (NeMo Automodel, ``moe/layers.py``: FakeBalancedGate).

    >>> float(neighbouring_domains(8, 256, 64)), float(neighbouring_domains(22, 512, 64))  # two nodes; 1 + (22 - 2)/8
    (2.0, 3.5)
    """
    each = np.maximum(np.floor_divide(experts, domains), 1).astype(np.int64)
    common = np.gcd(np.asarray(topk, dtype=np.int64), each)
    reached: Real = np.minimum(1.0 + (np.asarray(topk) - common) / each, domains)
    return reached


def random_load_factor(tokens: Real, topk: Real, ranks: Real) -> Real:
    """Expected maximum over mean load of ``e`` ranks when a balanced router spreads tokens at random.

    ``λ = 1 + √(2·ln e·(1 − 1/e)/μ)``, mean ``μ = k·T/e``: Raab and Steger's ``m/n + √(2(m/n)·ln n)`` with the
    binomial's variance. Range: ``μ`` well above ``ln e``. A lower bound for real routers, whose expert
    popularity differs.

    >>> round(float(random_load_factor(4096, 8, 64)), 4)  # 1 + sqrt(8.1878/512)
    1.1265
    """
    mean = 1.0 * topk * tokens / ranks
    return 1.0 + np.sqrt(2.0 * np.log(ranks) * (1.0 - 1.0 / ranks) / mean)


def expert_traffic_ratio(
    tokens: Real, topk: Real, hidden: Real, machines: Real, experts_per_device: Real
) -> Real:
    """Bytes between machines when tokens move, relative to moving experts: ``k·T/(4·n·h·E)``.

    Above 1 it is cheaper to fetch every expert once per machine (J. Liu et al., "Janus", SIGCOMM 2023).
    Forward and backward: four passes of ``T`` tokens per device against a fetch and a gradient of ``8h²``
    parameters each, so ``f_e = 4h`` and two matrices.

    >>> expert_traffic_ratio(131072, 2, 1024, 4, 1)
    16.0
    """
    return 1.0 * topk * tokens / (4.0 * machines * hidden * experts_per_device)


def zipf_shares(experts: int, exponent: float) -> NDArray[np.float64]:
    """Shares of the tokens that experts get, most popular first, where the j-th gets ``j^-s`` of the first.

    >>> zipf_shares(4, 1.0).round(2).tolist()
    [0.48, 0.24, 0.16, 0.12]
    """
    weights = np.arange(1, experts + 1, dtype=np.float64) ** (-1.0 * exponent)
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def skewed_load_factor(shares: NDArray[np.float64], ranks: Real, replicated: int = 0) -> Real:
    """Load of the busiest of ``e`` ranks relative to the mean, by the shares of experts (most popular first).

    It holds the most popular expert, and average ones beside it. The first ``replicated`` experts are on every
    rank, which works on its own tokens for them.

    >>> float(skewed_load_factor(np.array([0.4, 0.2, 0.2, 0.2]), 2))  # 2 (0.4 + 0.2)
    1.2
    >>> float(skewed_load_factor(np.array([0.4, 0.2, 0.2, 0.2]), 2, replicated=1))  # of 3 alike, 1.5 on each
    1.0
    """
    experts = len(shares)
    own = shares[:replicated].sum() / ranks
    rest = shares[replicated:]
    if not len(rest):
        return 1.0 + 0.0 * np.asarray(ranks)
    others = (rest.sum() - rest[0]) / max(len(rest) - 1, 1)
    beside = np.maximum((experts - replicated) / np.asarray(ranks, dtype=np.float64) - 1.0, 0.0)
    busiest = own + rest[0] + beside * others
    # Fewer experts than ranks left over: a rank holds one of them at most.
    load: Real = np.maximum(busiest * ranks, 1.0)
    return load
