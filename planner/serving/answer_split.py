"""How much of a limit of whole answers generation may take, the rest being the first token's: within a stated gap of the best.

Either part alone is better the longer it is. What two pools answer with the first token's part of one split and generation's part
of another, longer one therefore bounds every split between the two; the interval with the largest bound is halved next.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import pairwise

__all__ = ["best_split"]

_CLOSE = 1.0 + 5e-3  # of the best value, up to which a bound is let be
_PARTS = 8  # of the limit, at first
_NARROW = 2.0**-10  # of the limit: a split within it is told from no other


def best_split(value: Callable[[float, float], float], limit_s: float) -> tuple[float, float]:
    """Seconds for generation with the best value, and a bound that no split's value exceeds.

    Args:
        value: of seconds for the first token and seconds for generation; grows with both, 0 where they do not suffice.
        limit_s: sum of both.

    >>> split_s, bound = best_split(lambda first_s, answer_s: min(3.0 * first_s, answer_s), 8.0)
    >>> split_s, round(bound, 2)
    (6.0, 6.03)
    """
    ends = [limit_s * k / _PARTS for k in range(_PARTS + 1)]
    best, split_s = max((value(limit_s - end, end), end) for end in ends[1:-1])
    pending: list[tuple[float, float, float]] = []

    def push(low_s: float, high_s: float) -> None:
        bound = value(limit_s - low_s, high_s)
        if bound > best * _CLOSE:
            heappush(pending, (-bound, low_s, high_s))

    for low_s, high_s in pairwise(ends):
        push(low_s, high_s)
    left = 0.0  # the largest bound of what is too narrow to be halved
    while pending:
        bound, low_s, high_s = heappop(pending)
        if -bound <= best * _CLOSE:
            left = max(left, -bound)
            break
        if high_s - low_s <= _NARROW * limit_s:
            left = max(left, -bound)
            continue
        middle_s = 0.5 * (low_s + high_s)
        best, split_s = max((best, split_s), (value(limit_s - middle_s, middle_s), middle_s))
        push(low_s, middle_s)
        push(middle_s, high_s)
    return split_s, max(left, best * _CLOSE)
