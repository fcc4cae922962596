"""Elimination under a budget: tables whose entries are fronts of (time, memory) instead of one number.

Where the budget binds, the best price of memory leaves a gap between its bound and the best answer within the budget.
Eliminating variables once more closes it: every entry keeps all partial answers that no other one beats in both time and
memory, and of those only the ones that may still be part of an answer as good as the best known one, as the beliefs at
that price tell. Few remain: the layers of a model are alike, so that most partial answers of several layers cost and hold
the same as some other one.

Labels are rows of flat arrays, joined like tables of a database, so that nothing is looped over but the variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.solve.combinatorial.certificate import Clock
from planner.solve.combinatorial.elimination import Elimination, Scope, spread

__all__ = ["TooMany", "within_budget"]

Floats: TypeAlias = NDArray[np.float64]
Index: TypeAlias = NDArray[np.intp]

_MOST_LABELS = 1_000_000
_SLACK = 1e-9  # relative: sums in another order differ by rounding


class TooMany(Exception):
    """There are more labels than memory or time allow."""


@dataclass(frozen=True, slots=True, eq=False)
class _Message:
    """The labels that a bucket leaves over its scope: rows sorted by ``key`` (the scope's choices in one number).

    ``choice`` is that of the bucket's variable, ``rows`` those of its children's messages.
    """

    key: Index
    time_s: Floats
    memory_bytes: Floats
    choice: Index
    rows: tuple[Index, ...]


def within_budget(
    relaxed: Elimination, s_per_byte: float, limit: float, time_s: Sequence[Floats], memory_bytes: Sequence[Floats],
    edges: Mapping[tuple[int, int], Floats], budget_bytes: float, clock: Clock,
) -> list[int] | None:  # fmt: skip
    """The fastest assignment within the budget that is faster than what ``limit`` stands for; None: there is none.

    Args:
        relaxed: elimination of the same problem with memory at ``s_per_byte``.
        s_per_byte: the price.
        limit: time + price · budget of the best known answer: partial answers that cannot end below it are dropped.
        time_s: per variable, of each of its choices.
        memory_bytes: per variable, of each of its choices.
        edges: seconds of every pair of choices of two variables.
        budget_bytes: of all variables together.
        clock: whose limit ends the attempt.

    Raises:
        TooMany: too many labels are left, or too little time.
    """
    sizes = [len(cost) for cost in time_s]
    beliefs = relaxed.beliefs()
    messages: list[_Message] = []
    least_bytes = _least_outside(relaxed, memory_bytes)
    for index, (bucket, belief) in enumerate(zip(relaxed.buckets, beliefs, strict=True)):
        axes = bucket.axes
        known = np.zeros(belief.shape) + spread(time_s[bucket.variable], (bucket.variable,), axes)
        for pair in bucket.pairs:
            known = known + spread(np.asarray(edges[pair]), pair, axes)
        at = np.nonzero(belief <= limit + _SLACK * abs(limit))
        chosen = dict(zip(axes, at, strict=True))
        seconds, held = known[at], np.asarray(memory_bytes[bucket.variable], dtype=float)[at[0]]
        # What else there is, at least: everything outside this bucket, and the children that are not joined yet.
        rest = belief[at] - (seconds + s_per_byte * held)
        rows: list[Index] = []
        for child in bucket.children:
            scope, message = relaxed.buckets[child].scope, messages[child]
            key = _key([chosen[v] for v in scope], scope, sizes)
            first, last = (np.searchsorted(message.key, key, side=side) for side in ("left", "right"))
            count = last - first
            if count.sum() > _MOST_LABELS or clock.over:
                raise TooMany
            left = np.repeat(np.arange(len(key)), count)
            right = (
                np.arange(len(left)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
            )
            least = relaxed.buckets[child].message[tuple(chosen[v] for v in scope)]
            rest = (rest - least)[left]
            seconds, held = seconds[left] + message.time_s[right], held[left] + message.memory_bytes[right]
            keep = seconds + s_per_byte * held + rest <= limit + _SLACK * abs(limit)
            left, right = left[keep], right[keep]
            seconds, held, rest = seconds[keep], held[keep], rest[keep]
            chosen = {v: values[left] for v, values in chosen.items()}
            rows = [*(r[left] for r in rows), right]
        keep = held + least_bytes[index] <= budget_bytes
        key = _key([chosen[v] for v in bucket.scope], bucket.scope, sizes)
        if not bucket.scope:
            key = np.zeros(len(seconds), dtype=np.intp)
        message = _Message(
            key[keep], seconds[keep], held[keep], chosen[bucket.variable][keep], tuple(r[keep] for r in rows)
        )
        messages.append(_front(message))
        if not len(messages[-1].key):
            return None
    return _best(relaxed, messages, budget_bytes)


def _least_outside(relaxed: Elimination, memory_bytes: Sequence[Floats]) -> list[float]:
    """Per bucket, what all variables hold at least that are not below it."""
    least = [float(np.min(held)) for held in memory_bytes]
    below: list[float] = []
    for bucket in relaxed.buckets:
        below.append(least[bucket.variable] + sum(below[child] for child in bucket.children))
    return [sum(least) - inside for inside in below]


def _key(columns: Sequence[Index], scope: Scope, sizes: Sequence[int]) -> Index:
    """Choices of several variables as one number."""
    if not scope:
        return np.zeros(0, dtype=np.intp)
    return np.ravel_multi_index(tuple(columns), [sizes[v] for v in scope]).astype(np.intp)


def _front(labels: _Message) -> _Message:
    """Per key, the labels that no other one beats in both time and memory, in the order of memory."""
    at = np.lexsort((labels.time_s, labels.memory_bytes, labels.key))
    key, seconds = labels.key[at], labels.time_s[at]
    new = np.r_[True, key[1:] != key[:-1]] if len(key) else np.zeros(0, dtype=bool)
    # The least time so far within each key: ranks of times, lifted so that every key begins above all before it.
    rank = np.empty(len(key), dtype=np.intp)
    rank[np.argsort(seconds, kind="stable")] = np.arange(len(key))
    group = np.cumsum(new) - 1
    lifted = rank - group * (len(key) + 1)
    before = np.r_[np.iinfo(np.intp).max, np.minimum.accumulate(lifted)[:-1]] if len(key) else lifted
    keep = new | (lifted < before)
    at = at[keep]
    return _Message(
        labels.key[at],
        labels.time_s[at],
        labels.memory_bytes[at],
        labels.choice[at],
        tuple(r[at] for r in labels.rows),
    )


def _best(relaxed: Elimination, messages: Sequence[_Message], budget_bytes: float) -> list[int] | None:
    """The fastest combination of the labels of all roots (parts of the graph that no edge joins), traced back."""
    roots = [index for index, bucket in enumerate(relaxed.buckets) if not bucket.scope]
    total = _Message(np.zeros(1, np.intp), np.zeros(1), np.zeros(1), np.zeros(1, np.intp), ())
    for root in roots:
        one = messages[root]
        left, right = (part.ravel() for part in np.indices((len(total.key), len(one.key))))
        if len(left) > _MOST_LABELS:
            raise TooMany
        held = total.memory_bytes[left] + one.memory_bytes[right]
        keep = held <= budget_bytes
        left, right = left[keep], right[keep]
        none = np.zeros(len(left), dtype=np.intp)
        rows = (*(r[left] for r in total.rows), right)
        total = _front(_Message(none, total.time_s[left] + one.time_s[right], held[keep], none, rows))
    if not len(total.key):
        return None
    best = int(np.argmin(total.time_s))
    pending = {root: int(rows[best]) for root, rows in zip(roots, total.rows, strict=True)}
    choice = [0] * len(relaxed.buckets)
    for index in reversed(range(len(relaxed.buckets))):
        bucket, message, row = relaxed.buckets[index], messages[index], pending[index]
        choice[bucket.variable] = int(message.choice[row])
        pending |= {child: int(rows[row]) for child, rows in zip(bucket.children, message.rows, strict=True)}
    return choice
