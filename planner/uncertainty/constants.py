"""How far a prediction may be off because its software was never measured.

A constant moves the step by the share of it that it slows: to first order, errors of independent constants add up as
``√Σ (share · spread)²``. What a user has fitted comes with its standard error in logarithms (``spread`` in the stack's file).
Of a peak of memory, states and activations are arithmetic; what the software holds beside them is not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import hypot

from planner.engine.kernel_prices import slowdown_constant
from planner.ledger import Collective
from planner.plans.attribution import Spend
from planner.specs.device import Sourced
from planner.specs.stack import Stack

__all__ = ["constant_shares", "constants_spread", "share_of_software", "slowed_by"]

_PUBLISHED = "published-training-runs"
_OF_SOFTWARE = ("framework", "communicators", "fragmentation", "buffers")


def slowed_by(spend: Spend, stack: Stack) -> str | None:
    """Name of the stack's constant that an item's seconds are proportional to; None: there is none."""
    return slowdown_constant(spend.share.item, stack)


def constant_shares(spends: Iterable[Spend], stack: Stack) -> dict[str, float]:
    """Share of the busiest device's work that is proportional to each constant of the stack.

    What is hidden counts nothing, but for the stretch that it causes. Where the host sets the pace, only its own time counts.

    Args:
        spends: of the step on the busiest device.
        stack: the software, as it is on the device's generation.
    """
    spends = list(spends)
    host = [spend for spend in spends if spend.share.item is None]
    paced = {(s.share.block, s.share.phase) for s in host if s.share.exposed_s < s.share.price_s}
    busy_s = sum(spend.seconds for spend in spends)
    seconds: dict[str, float] = defaultdict(float)
    for spend in spends:
        if (spend.share.block, spend.share.phase) in paced:
            seconds["dispatch_s"] += spend.seconds
        elif spend.share.item is None:
            seconds["waited_dispatches"] += spend.seconds
        elif (name := slowed_by(spend, stack)) is not None:
            seconds[name] += spend.seconds
            if isinstance(spend.share.item, Collective):
                hidden_s = max(spend.alone_s - spend.seconds, 0.0)
                seconds["overlap_slowdown"] += hidden_s * max(stack.overlap_slowdown.value - 1.0, 0.0)
    return {name: spent_s / busy_s for name, spent_s in seconds.items()} if busy_s else {}


def constants_spread(shares: Mapping[str, float], stack: Stack, between: float) -> float:
    """Standard deviation of the logarithm of a step time, as far as it comes from constants of software that was never measured.

    Args:
        shares: :func:`constant_shares`.
        stack: the software, as it is on the device's generation.
        between: how far its constants may lie from those that it takes over (:class:`~planner.uncertainty.residuals.Spreads`);
            what its user has fitted is as certain as the fit says.
    """
    return hypot(*(share * _spread(getattr(stack, name), between) for name, share in shares.items()))


def share_of_software(pools: Mapping[str, float], cached_bytes: float = 0.0) -> float:
    """Share of a peak that follows from what software is like, and not from the sizes of states and activations.

    Args:
        pools: bytes by pool, of what is counted.
        cached_bytes: freed bytes that the allocator keeps, where they are counted.

    >>> share_of_software({"parameters": 6e9, "framework": 1e9, "buffers": 2e9}, 1e9)
    0.4
    """
    soft = sum(held for pool, held in pools.items() if pool in _OF_SOFTWARE) + cached_bytes
    return soft / (sum(pools.values()) + cached_bytes)


def _spread(constant: Sourced | None, between: float) -> float:
    if constant is None or constant.spread is None or constant.source == _PUBLISHED:
        return between
    return constant.spread
