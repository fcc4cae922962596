"""Time of the kernels that bring tokens to their experts and back: dispatch and combine of libraries made for it.

Unlike an all-to-all of a communication library they read the routing on the device, send a token once to a rank or a node that
several of its experts share, and pass it on inside the node while the network works.

Sources: C. Zhao et al., DeepEP (deepseek-ai/DeepEP, README: normal kernels forward from the network to NVLink and take a number
of multiprocessors; low-latency kernels send every copy by itself); NVIDIA TensorRT-LLM, cpp/tensorrt_llm/kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.costs.arrays import Real
from planner.costs.collective_algorithms import Level
from planner.costs.moe import distinct_domains, neighbouring_domains

__all__ = ["exchange_traffic", "expert_exchange_s"]


def exchange_traffic(
    token_bytes: Real,
    choices: Real,
    levels: Sequence[Level],
    *,
    per_rank: bool = True,
    neighbours_of: float = 0.0,
) -> tuple[Real, Real]:
    """Bytes that a rank sends over the innermost tier, its own copies included, and to other domains of that tier.

    Args:
        token_bytes: all tokens of a rank, once.
        choices: experts of a token; they lie anywhere with the same probability, or beside one another.
        levels: the group's way through the network.
        per_rank: a token goes once to every rank, and over the network once to every domain, that holds any of its experts; else
            once per expert.
        neighbours_of: of so many experts a token's choices are neighbours; 0: they lie anywhere.

    >>> link, remote = exchange_traffic(1.0, 8, [Level(8, 400e9, 1e-6), Level(64, 50e9, 5e-6)])
    >>> round(float(link), 2), round(float(remote), 2)  # 64 * (1 - (63/64)**8), 7/8 of 8 * (1 - (7/8)**8)
    (7.58, 4.59)
    """
    ranks = np.asarray(levels[-1].members, dtype=np.float64)
    domains = ranks / levels[0].members

    def reached(parts: Real) -> Real:
        if not per_rank:
            return choices
        if neighbours_of:
            return neighbouring_domains(choices, neighbours_of, parts)
        return distinct_domains(choices, parts)

    copies, messages = reached(ranks), reached(domains)
    return token_bytes * copies, token_bytes * messages * (domains - 1.0) / domains


def expert_exchange_s(
    link_bytes: Real,
    remote_bytes: Real,
    levels: Sequence[Level],
    *,
    launches: Real = 1.0,
    link_fraction: Real = 1.0,
    units: Real = np.inf,
    unit_bytes_per_s: Real = 1.0,
    remote_s: Real = 0.0,
) -> Real:
    """Seconds of one dispatch or combine.

    Args:
        link_bytes: what a rank sends over the innermost tier, or receives: the busier of the two, own copies included.
        remote_bytes: what it sends to other nodes.
        levels: the group's way through the network.
        launches: fixed cost, in calls of a collective on the innermost tier; in hops where no library drives that tier.
        link_fraction: of the innermost tier's ``bytes_per_s`` that the kernel reaches.
        units: multiprocessors that copy.
        unit_bytes_per_s: what one of them moves.
        remote_s: fixed cost of reaching other nodes.

    >>> node = [Level(8, 400e9, 1e-6)]
    >>> float(expert_exchange_s(4e8, 0.0, node, launches=10.0, link_fraction=0.5))  # 10 us + 4e8 / 200e9
    0.00201
    """
    inner, outer = levels[0], levels[-1]
    call_s = inner.latency_s if inner.transport is None else inner.transport.launch_s
    rate = np.minimum(inner.bytes_per_s * link_fraction, units * unit_bytes_per_s)
    moving_s = np.maximum(link_bytes / rate, remote_bytes / outer.bytes_per_s)
    return launches * call_s + remote_s * np.greater(remote_bytes, 0.0) + moving_s
